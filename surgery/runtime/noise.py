"""Noise of a formula, as a training step draws it.

Takes the noise leaves of a formula; gives tensors by key. Promises: torch's own generator of the device draws, as it
does for dropout, so that a recomputation under gradient checkpointing sees the same, and a compiler traces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.ir.expression import Expr, NoiseLaw
from surgery.ir.sizes import known_shape
from surgery.semantics.distributions import DISTRIBUTIONS

#: How each law that has a mean draws a tensor of a shape on a device, its arguments by name.
_LAWS = {
    "normal": lambda shape, device, mean, std: torch.randn(shape, dtype=torch.float32, device=device) * std + mean,
    "uniform": lambda shape, device, low, high: (
        torch.rand(shape, dtype=torch.float32, device=device) * (high - low) + low),
    "bernoulli": lambda shape, device, p: torch.bernoulli(
        torch.full(shape, p, dtype=torch.float32, device=device)),
}


def drawn(noises: Iterable[Expr], device: torch.device, stack: int | None = None) -> Mapping[str, Tensor]:
    """A draw of each, in float32; of a `stack` of matrices one for each."""
    return {noise.data.key: _one(noise.data, known_shape(noise.shape), device, stack) for noise in noises}


def _one(noise: NoiseLaw, shape: tuple[int, ...], device: torch.device, stack: int | None) -> Tensor:
    given: dict[str, Any] = {**DISTRIBUTIONS[noise.law.distribution].arguments, **dict(noise.law.arguments)}
    return _LAWS[noise.law.distribution]((stack, *shape) if stack else shape, device, **given)
