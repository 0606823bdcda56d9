"""The numbers of a parameter in each mode of an operated model: W, what training made of it, W'.

Takes a module and a parameter's name; keeps numbers by mode. Promises: they are given back in the dtype and on the
device that the model has moved the parameter to; of a sharded model each process keeps its part alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from surgery.layers.wrappers import own_parameter
from surgery.planning.compile import Placed
from surgery.runtime.adapter import Adapter
from surgery.runtime.merge import merged
from surgery.runtime.sharding import numbers, part


@dataclass(frozen=True)
class Kept:
    """The numbers of a parameter by mode (`base`, `operated`, `merged`); one without a `merged` form is then as when
    operated."""

    module: nn.Module
    name: str
    forms: Mapping[str, torch.Tensor]

    @property
    def parameter(self) -> nn.Parameter:
        return own_parameter(self.module, self.name)

    def form(self, mode: str) -> torch.Tensor:
        """The numbers for a mode, in the dtype and on the device that the model has moved the parameter to."""
        return self.forms[self._known(mode)].to(self.parameter.device, self.parameter.dtype)

    def holding(self, mode: str) -> Kept:
        """The same with the present numbers as the form of this mode."""
        return replace(self, forms={**self.forms, self._known(mode): numbers(self.parameter)})

    def _known(self, mode: str) -> str:
        return "operated" if mode == "merged" and mode not in self.forms else mode


def with_merged(kept: Mapping[str, Kept], placed: Iterable[Placed],
                adapters: Mapping[str, Adapter]) -> tuple[dict[str, Kept], dict[str, float]]:
    """What is kept, with W' (and b') of each operated weight as the merged form, and the relative rounding errors by
    module. Raises: SurgeryError (merge-error)."""
    after, errors = dict(kept), {}
    for each in placed:
        weight = merged(each, adapters[each.site.name])
        errors[each.site.name] = weight.error
        for name, tensor in weight.tensors.items():
            full = each.site.weight_name.removesuffix(each.site.parameter) + name
            parameter = own_parameter(each.site.module, name)
            now = numbers(parameter)
            before = kept[full].forms if full in kept else {"base": now}
            # the part of this process alone: those of the whole model would not fit here
            forms = {**before, "operated": now, "merged": part(tensor, parameter)}
            after[full] = Kept(each.site.module, name, forms)
    return after, errors
