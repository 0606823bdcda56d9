"""Recognise norm layers by what they hold and by what a few calls give, and not by their class.

Takes a module (on the meta device too); says whether it normalises the last axis and scales it by a vector of its own.
Promises: the module is not called or changed: a copy of its own, with numbers of ours, is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

_SCALE, _CLOSE = 7.0, 1e-2  # what is under the root beside the squares (eps) moves a row of size 1 by far less


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm, an RMSNorm or the like: a vector `weight`, perhaps a `bias`, and nothing else."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    weight = held.get("weight")
    if weight is None or weight.ndim != 1 or isinstance(weight, nn.UninitializedParameter):
        return False
    alike = all(p.shape == weight.shape and p.is_floating_point() for p in held.values())
    # buffers are running statistics, of another axis
    if not alike or not held.keys() <= {"weight", "bias"} or module._modules or module._buffers:
        return False
    try:
        with by_ourselves():
            return _normalises(copy_with(module, lambda *of, **how: 1 + torch.rand(*of, **how)), weight.shape[0])
    except Exception:  # a third party's module raises whatever it likes
        return False


@contextmanager
def by_ourselves() -> Iterator[None]:
    """Inside, calls of copies are computed on the CPU as they are written, whatever the user's defaults are."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


def copy_with(module: nn.Module, numbers: Callable[..., Tensor]) -> nn.Module:
    """A copy on the CPU in evaluation, its parameters in float32 with `numbers` (torch.rand, ...), its buffers zero."""
    draw = torch.Generator().manual_seed(0)
    ours: dict[int, Any] = {id(p): nn.Parameter(numbers(p.shape, generator=draw))
                            for p in module._parameters.values() if p is not None}
    ours |= {id(b): torch.zeros(b.shape, dtype=b.dtype) for b in module._buffers.values() if b is not None}
    return deepcopy(module, ours).eval()  # `deepcopy` takes these for what it has copied already


def _normalises(norm: nn.Module, n: int) -> bool:
    rows = torch.randn(1, 3, n, generator=torch.Generator().manual_seed(1))
    y = norm(rows)
    if not isinstance(y, Tensor) or y.shape != rows.shape or not y.isfinite().all():
        return False
    # of a longer row it is the same, and of a row alone too: it acts on the last axis, and the size of a row is lost
    if not _agree(norm(_SCALE * rows), y) or not _agree(norm(rows[:, :1]), y[:, :1]):
        return False
    gain = norm._parameters["weight"]
    assert gain is not None  # as `is_norm` has asked
    gain.data[0] += 1  # each gain scales its own feature, and no other
    moved = norm(rows) - y
    return bool(moved[..., 0].abs().max() > _CLOSE) and _agree(moved[..., 1:], torch.zeros_like(moved[..., 1:]))


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _CLOSE * (1 + b.abs())).all())
