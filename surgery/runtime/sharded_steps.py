"""Refuse an optimiser's step in a model that is sharded in part, where nothing averages an adapter's gradients.

Takes adapters; the user calls nothing. Promises: the step is not made, so that all processes still hold the same
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from surgery.runtime.optimizer_steps import OptimizerSteps, stepped_by
from surgery.runtime.sharding import refuse_unshared

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


def refuse_unshared_steps(adapter: Adapter) -> None:
    """From now on, refuse the step of an optimiser that holds some of the adapter's tensors whole where the layer is
    sharded. (Before a step whatever is sharded is in parts; in a forward pass it is not.)"""
    _STEPS.watch(adapter)


def _before_step(adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    stepped = stepped_by(optimizer)
    for adapter in adapters:
        ours = {adapter.shared.get(key, key): t for key, t in adapter.tensors().items() if id(t) in stepped}
        module = adapter.owner() if adapter.owner else None
        if ours and module is not None:
            refuse_unshared(ours, module._parameters.values())


_STEPS = OptimizerSteps(register_optimizer_step_pre_hook, _before_step)
