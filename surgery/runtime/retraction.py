"""Move parameters that are kept on a manifold back to it after each step of an optimiser.

Takes adapters whose formulas say so; the user calls nothing. Promises: only what the optimiser that stepped holds is
moved, and what is moved keeps its identity and its dtype; of a sharded tensor, all processes take part, as in the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from surgery.diagnostics import fail
from surgery.ir.manifolds import MANIFOLDS
from surgery.runtime.optimizer_steps import OptimizerSteps, stepped_by
from surgery.runtime.sharding import held, part, whole

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


def retract_after_steps(adapter: Adapter) -> None:
    """From now on, move the adapter's parameters back after each step of whichever optimiser holds them."""
    if any(leaf.manifold for leaf in adapter.formula.leaves):
        _STEPS.watch(adapter)


def _after_step(adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
    stepped = stepped_by(optimizer)
    _refuse_copied(adapters, stepped)
    retract(adapters, stepped)


_STEPS = OptimizerSteps(register_optimizer_step_post_hook, _after_step)


def _refuse_copied(adapters: Iterable[Adapter], stepped: set[int]) -> None:
    """Raises: SurgeryError (unsupported-module) where DeepSpeed's ZeRO has copies of an adapter's parameters, as its
    marks on these tell, which its optimiser steps: they would leave the manifold, and the adapter with them."""
    for tensor, manifold in _kept(adapters).values():
        marked = hasattr(tensor, "ds_id") or getattr(tensor, "_hp_mapping", None) is not None
        if marked and id(tensor) not in stepped:
            raise fail("unsupported-module", f"what is kept `on {manifold}` trains by copies of DeepSpeed's, which "
                       "would leave it", helps=("shard with torch.distributed.fsdp.fully_shard, whose optimisers hold "
                                                "the parameters",))


@torch.no_grad()
def retract(adapters: Iterable[Adapter], among: set[int] | None = None) -> None:
    """Move what adapters keep on a manifold to its nearest point there, each tensor once; `among` those objects alone.

    Raises: SurgeryError (unsupported-module) for a piece of a flattened tensor, which is no matrix."""
    for tensor, manifold in _kept(adapters).values():
        if among is not None and id(tensor) not in among:
            continue
        if tensor.ndim < 2:
            raise fail("unsupported-module", f"what is kept `on {manifold}` is a piece of a flat tensor of "
                       "FullyShardedDataParallel, which is no matrix",
                       helps=("shard with torch.distributed.fsdp.fully_shard",))
        held(tensor).copy_(part(MANIFOLDS[manifold].retract(whole(tensor)), tensor))


def _kept(adapters: Iterable[Adapter]) -> Mapping[int, tuple[Tensor, str]]:
    found: dict[int, tuple[Tensor, str]] = {}
    for adapter in adapters:
        tensors = adapter.tensors()
        found |= {id(tensors[leaf.key]): (tensors[leaf.key], leaf.manifold) for leaf in adapter.formula.leaves
                  if leaf.manifold}
    return found
