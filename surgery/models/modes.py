"""Training and evaluation mode of a model, for a while.

Takes a model; gives it back with each module in the mode that it was in. `model.train()` cannot do that: it puts all
modules into one mode, and batch norms that were in evaluation while the rest trains would then train too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, every module is in training or in evaluation mode; afterwards each is in the mode that it was in."""
    # by the attribute and not by `train()`, which some classes override to change their weights
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode
