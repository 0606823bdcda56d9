"""Dropout by hand: the formulas of the methods that drop, over a known mask."""

from __future__ import annotations

import oracle as o
from case import Parameters
from layers import Operated
from torch import Tensor
from zoo import CASES

P = 0.4


def shipped(name: str):
    return next(case for case in CASES if case.name == name)


def by_hand(op: Operated, x: Tensor, dropped: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """T ((T_pre W) x + s B A drop(x)) + b with T of the whole weight, in float64."""
    p, w = Parameters.of(leaves), op.weight
    start = o.mul(o.gains(p, "pre_diagonal"), w) if ("pre_diagonal", "d") in p else w
    update = o.low_rank(p, 3, 5)
    y = o.linear(x, start, None) + o.linear(dropped, update, None)
    return o.linear(y, _post(start + update, p), None) + op.bias


def _post(w: Tensor, p: Parameters) -> Tensor:
    steps = {step for step, _ in p}
    if "post_magnitude" in steps:
        return o.magnitude(w, p)
    if "post_orthogonal" in steps:
        return o.rotation(p, "post_orthogonal")
    return o.gains(p, "post_diagonal") if "post_diagonal" in steps else o.eye(len(w))


METHODS = ["lora", "dora", "pre_diag", "post_diag", "sora"]
