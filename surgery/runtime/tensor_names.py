"""What the tensors of an operated model's adapters are called in it.

Takes a model, its plan and its adapters; gives names. Promises: a tensor that modules share has one name, at the place
that holds it; names under which earlier versions saved are understood.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from surgery.layers.opaque_linear import SUFFIX
from surgery.planning.compile import Placed, Plan
from surgery.runtime.adapter import Adapter
from surgery.runtime.step_tensors import CONTAINERS, SHARED, as_held, held_at


class TensorNames:
    """The names of the adapters' tensors in a model."""

    def __init__(self, model: nn.Module, plan: Plan, adapters: Mapping[str, Adapter]):
        self.model, self.plan, self.adapters = model, plan, adapters

    def of(self, placed: Placed, key: str) -> str:
        """What the tensor of an adapter's key (`add_low_rank.B`) is called in the model."""
        adapter = self.adapters[placed.site.name]
        if key not in adapter.shared:
            return f"{placed.site.weight_name}{SUFFIX}.{'.'.join(held_at(key))}"
        if not isinstance(self.model, CONTAINERS):
            return f"{SHARED}.{adapter.shared[key]}"
        # each child of a container is a layer to its users, so the first adapter holds what all share
        first = next(p for p in self.plan.placed if self.adapters[p.site.name].shared)
        return f"{first.site.weight_name}{SUFFIX}.{SHARED}.{adapter.shared[key]}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of an adapter by its name, shared ones once."""
        return {self.of(p, key): tensor for p in self.plan.placed
                for key, tensor in self.adapters[p.site.name].tensors().items()}

    def translated(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values under today's names and in today's shapes. A shared tensor once went by the name that it had in the
        first module that read it, and a number was held as []."""
        now = {f"{p.site.weight_name}{SUFFIX}.{key}": self.of(p, key) for p in self.plan.placed
               for key in self.adapters[p.site.name].shared}
        named: dict[str, torch.Tensor] = {}  # of a shared tensor's several old copies the first counts
        for name, value in values.items():
            named.setdefault(now.get(name, name), as_held(value))
        return named
