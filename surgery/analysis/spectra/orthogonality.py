"""How far the transforms that claim to be orthogonal are from it, in the dtype that they run in.

Takes a formula and its tensors; gives one `Defect` for each such claim. Promises: a block-diagonal matrix is looked at
block by block and I + U V through its factors, so that neither is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.ir.dense import dense
from surgery.ir.expression import Expr, Formula, in_evaluation
from surgery.rewrite.cheaper_forms import cheapest
from surgery.rewrite.low_rank import low_rank_turn


class Defect(NamedTuple):
    """The transform `name` R [n, n] has ‖R Rᵀ - I‖_F / √n = `distance`: 0 for an orthogonal R, and ‖R‖_F is then √n."""

    name: str
    distance: float


def defects(formula: Formula, values: Mapping[str, Tensor]) -> tuple[Defect, ...]:
    """The defect of each transform that claims to be orthogonal, in order. `values`: all tensors,
    "weight" among them."""
    claims = [c for c in dict.fromkeys(formula.claims) if c.name == "orthogonal"]
    return tuple(Defect(c.owner, distance(cheapest(in_evaluation(c.expr)), values)) for c in claims)


@torch.no_grad()
def distance(expr: Expr, values: Mapping[str, Tensor]) -> float:
    """‖R Rᵀ - I‖_F / √n, in float64 for a matrix made in the dtype of `values`."""
    if expr.op == "T":
        return distance(expr.args[0], values)  # R and Rᵀ have the same singular values, and so the same defect
    if expr.op == "block_diag":
        return _of_matrices(dense(expr.args[0], values))
    turn = low_rank_turn(expr) if len(expr.shape) == 2 else None
    if turn is None:
        return _of_matrices(dense(expr, values))
    # (I + U V)(I + U V)ᵀ - I = [U Vᵀ] [[V Vᵀ, I], [I, 0]] [U Vᵀ]ᵀ, and its norm is that of S M Sᵀ for [U Vᵀ] = Q S:
    # nothing of n x n is made.
    u, v = (dense(factor, values).double() for factor in turn)
    r = u.shape[1]
    s = torch.linalg.qr(torch.cat([u, v.mT], dim=1)).R
    middle = torch.zeros(2 * r, 2 * r, dtype=u.dtype, device=u.device)
    middle[:r, :r] = v @ v.mT
    middle[:r, r:] = middle[r:, :r] = torch.eye(r, dtype=u.dtype, device=u.device)
    return float((s @ middle @ s.mT).norm()) / u.shape[0] ** 0.5


def _of_matrices(r: Tensor) -> float:
    """The defect of a matrix, or of the block-diagonal one of a stack of blocks."""
    r = r.double()
    off = r @ r.mT - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    # the number of rows of all blocks together is n
    return float(off.norm()) / (off.numel() / off.shape[-1]) ** 0.5
