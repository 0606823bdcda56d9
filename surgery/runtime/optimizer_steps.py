"""Call a function before or after every step of an optimiser of torch's (the Trainer's too), with the live adapters.

Takes torch's function that registers such a hook, and what is to be called. Promises: the hook is registered once, when
the first adapter is watched, and no adapter is kept alive by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch.optim import Optimizer

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


class OptimizerSteps:
    """`register`: torch's register_optimizer_step_pre_hook or register_optimizer_step_post_hook. `react`: called with
    the adapters that are watched and the optimiser that steps."""

    def __init__(self, register: Callable[[Any], Any], react: Callable[[Sequence[Adapter], Optimizer], None]) -> None:
        self._register, self._react = register, react
        self._adapters: WeakSet[Adapter] = WeakSet()
        self._is_registered = False

    def watch(self, adapter: Adapter) -> None:
        """From now on, pass this adapter too. (A copy of a model has adapters of its own, which are watched when they
        are made.)"""
        self._adapters.add(adapter)
        if not self._is_registered:
            self._register(self._on_step)
            self._is_registered = True

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._react(list(self._adapters), optimizer)


def stepped_by(optimizer: Optimizer) -> set[int]:
    """The ids of the tensors that an optimiser changes."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
