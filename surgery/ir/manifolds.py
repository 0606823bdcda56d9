"""Sets of matrices that a parameter can be kept on while it trains: a row each.

A row says how far a matrix is from the set, and which element is nearest. A `param X[out, rank] ~ orthogonal() on
stiefel` names one; `runtime/retraction` moves the parameter back after each step of an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.ir.dense import without_autocast


@dataclass(frozen=True)
class Manifold:
    """`retract`: the nearest element, of each matrix in [..., m, n], in the dtype that it comes in. `defect`: how far
    matrices are from the set (0 on it, infinite where one is not finite), which is `maths`. `starts`: what a spec can
    start such a parameter at."""

    maths: str
    starts: str
    retract: Callable[[Tensor], Tensor]
    defect: Callable[[Tensor], float]


def _upright(a: Tensor) -> Tensor:
    """[..., m, n] with m >= n, in float32 or wider."""
    wide = a.detach().to(torch.promote_types(a.dtype, torch.float32))
    return wide if a.shape[-2] >= a.shape[-1] else wide.mT


def polar(a: Tensor) -> Tensor:
    """The orthonormal factor of a = Q S, S symmetric: of all matrices with orthonormal columns (rows, where a is wide)
    the nearest in the Frobenius norm. What is not finite is left as it is, for the loss has then said so already."""
    if not a.isfinite().all():
        return a
    left, _, right = torch.linalg.svd(_upright(a), full_matrices=False)
    with without_autocast(a.device.type):  # a step may be made inside of one
        found = left @ right
    return (found if a.shape[-2] >= a.shape[-1] else found.mT).to(a.dtype)


def _from_orthonormal(a: Tensor) -> float:
    tall = _upright(a)
    with without_autocast(tall.device.type):
        gram = tall.mT @ tall
    gap = (gram - torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device)).abs().max()
    return float(gap) if gap.isfinite() else float("inf")


MANIFOLDS = {
    "stiefel": Manifold("max |XᵀX - I|, of the shorter side,", "`~ orthogonal()`, `qr(...)` or singular vectors of W",
                        polar, _from_orthonormal),
}
