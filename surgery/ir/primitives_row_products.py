"""Products of the rows of two matrices, for the compiler alone: what norms are made of."""

from __future__ import annotations

from typing import Any

from surgery.ir import flop_rules, row_rules
from surgery.ir.expression import Shape
from surgery.ir.shape_rules import ShapeError, elementwise, exactly, shape_text
from surgery.ir.table import CORE, Linear, Operation


def _gram_shape(sizes: tuple[Any, ...], a: Shape, b: Shape) -> Shape:
    rows = exactly(2, "two matrices", elementwise(a, b))[0]
    if rows % sizes[0]:
        raise ShapeError(f"{rows} rows are no whole number of blocks of {sizes[0]}")
    return (rows // sizes[0], *sizes, *sizes)


def _gram(sizes: tuple[Any, ...], a: Any, b: Any) -> Any:
    return a.unflatten(0, (-1, *sizes)) @ b.unflatten(0, (-1, *sizes)).mT


def _weighted_shape(a: Shape, b: Shape, d: Shape) -> Shape:
    if elementwise(a, b)[-1:] != d:
        raise ShapeError(f"needs a number for each column, not {shape_text(a)} and {shape_text(d)}")
    return a[:-1]


def _row_dot(a: Any, b: Any) -> Any:
    # A frozen weight with itself, in every forward pass: one pass over it, and no second matrix. (Not where a gradient
    # is taken: the second derivative of a norm is not finite at 0.)
    return a.norm(dim=-1).square() if a is b and not a.requires_grad else (a * b).sum(-1)


ROWS = [
    Operation("row_dot", 2, lambda a, b: elementwise(a, b)[:-1], _row_dot, "Σ a b over each row", stage=CORE,
              linear=Linear.EACH, rows=row_rules.of_rows),
    Operation("gram", 2, _gram_shape, _gram, "a bᵀ of each k rows: [m, n], [m, n] -> [m / k, k, k]", stage=CORE,
              sizes=("k",), linear=Linear.EACH, flops=flop_rules.each(2, 0, -1)),
    Operation("weighted_dot", 3, _weighted_shape, lambda a, b, d: (a * b) @ d, "Σ a b d over each row", stage=CORE,
              linear=Linear.EACH, kernel="kernels_row_sums.weighted_dot", flops=flop_rules.each_read(3)),
]
