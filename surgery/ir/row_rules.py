"""Which part of its arguments some rows of a result are made of: what rows of the table are made of.

A rule takes a node and an axis of its result, counted from the end. It gives for each argument the axis along which the
same entries suffice for some of the result's, or None where all of the argument is read; and None in all where nothing
less than every argument suffices.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.ir.expression import Expr

Rows = Callable[[Expr, int], tuple[int | None, ...] | None]


def entrywise(node: Expr, axis: int) -> tuple[int | None, ...]:
    """Entry by entry. What has no such axis, such as a number, is read whole."""
    return tuple(axis if len(a.shape) >= -axis else None for a in node.args)


def turned(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """Of a transpose."""
    return (-3 - axis,) if axis >= -2 else None


def product(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """Rows of a b are those of a times b, and columns a times those of b; of matrices and vectors, not of stacks."""
    left, right = (len(a.shape) for a in node.args)
    if left == 2 and right <= 2 and axis == -len(node.shape):
        return (-2, None)
    return (None, -1) if left <= 2 and right == 2 and axis == -1 else None


def of_rows(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """A number for each row of matrices."""
    return (-2,) * len(node.args) if axis == -1 and all(len(a.shape) == 2 for a in node.args) else None


def of_columns(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """A number for each column of matrices."""
    return (-1,) * len(node.args) if axis == -1 and all(len(a.shape) == 2 for a in node.args) else None


def row_by_row(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """A row for each row of matrices."""
    return (-2,) * len(node.args) if axis == -2 and all(len(a.shape) == 2 for a in node.args) else None


def first_by_row(node: Expr, axis: int) -> tuple[int | None, ...] | None:
    """A row for each row of the first argument."""
    return (-2, *(None,) * (len(node.args) - 1)) if axis == -2 else None
