"""Products of the rows of two matrices, for the compiler alone: what norms are made of."""

from __future__ import annotations

from typing import Any

from surgery.expr.ir import Shape
from surgery.expr.primitive import Primitive, ShapeError, elementwise, exactly, shape_text

ROWS = 256  # taken at a time, so that no second matrix is made beside a large one


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


def _weighted_dot(a: Any, b: Any, d: Any) -> Any:
    import torch

    rows = [(x * y) @ d for x, y in zip(a.split(ROWS, -2), b.split(ROWS, -2))]
    return torch.cat(rows, -1)


DOTS = [
    Primitive("row_dot", 2, lambda a, b: elementwise(a, b)[:-1], lambda a, b: (a * b).sum(-1), "Σ a b over each row",
              public=False),
    Primitive("gram", 2, _gram_shape, _gram, "a bᵀ of each k rows: [m, n], [m, n] -> [m / k, k, k]", public=False, sizes=("k",)),
    Primitive("weighted_dot", 3, _weighted_shape, _weighted_dot, "Σ a b d over each row", public=False),
]
