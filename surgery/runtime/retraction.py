"""Parameters that are kept on a manifold: moved back to it after each step of an optimiser.

Takes adapters whose formulas say so; needs no call of the user's: every optimiser of torch's (the Trainer's too) tells
of its steps. Promises: only what the optimiser that stepped holds is moved, and what is moved keeps its identity and
its dtype; of a sharded tensor, all processes take part, as in the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from surgery.diagnostics import fail
from surgery.ir.manifolds import MANIFOLDS
from surgery.runtime.sharding import held, part, whole

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter

_WATCHED: WeakSet[Adapter] = WeakSet()
_HOOKS: list[Any] = []  # the one that torch calls after every optimiser's step, once anything is watched


def watch(adapter: Adapter) -> None:
    """From now on, move an adapter's parameters back after each step of whichever optimiser holds them. (A copy of a
    model has adapters of its own, which are watched from when they are made.)"""
    if any(leaf.manifold for leaf in adapter.formula.leaves):
        _WATCHED.add(adapter)
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _refuse_copied(list(_WATCHED), stepped)
    retract(list(_WATCHED), stepped)


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
