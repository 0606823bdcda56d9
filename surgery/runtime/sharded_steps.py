"""Refuse an optimiser's step in a model that is sharded in part, where nothing averages an adapter's gradients.

Takes adapters; needs no call of the user's: torch tells of every optimiser's step. Promises: the step is not made, so
that all processes still hold the same values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from surgery.runtime.sharding import refuse_unshared

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter

_WATCHED: WeakSet[Adapter] = WeakSet()
_HOOKS: list[Any] = []  # the one that torch calls before every optimiser's step, once there is an adapter


def watch_sharding(adapter: Adapter) -> None:
    """From now on, refuse the step of an optimiser that holds some of the adapter's tensors whole where the layer is
    sharded. (Before a step whatever is sharded is in parts; in a forward pass it is not.)"""
    _WATCHED.add(adapter)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in _WATCHED:
        ours = {adapter.shared.get(key, key): t for key, t in adapter.tensors().items() if id(t) in stepped}
        module = adapter.owner() if adapter.owner else None
        if ours and module is not None:
            refuse_unshared(ours, module._parameters.values())
