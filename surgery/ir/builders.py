"""Building blocks of expressions: constants, tensors of one value, scalings and sums, in their one normal form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

from surgery.ir.expression import UNFOLDED, Expr, Shape
from surgery.ir.table import constant, make

_Part = TypeVar("_Part")
_NUMBERS = (float, int, Fraction)  # and no abstract class, which takes long to ask


def every(parts: Iterable[_Part | None]) -> list[_Part] | None:
    """All the parts, or None where one of them is None."""
    parts = list(parts)
    given = [part for part in parts if part is not None]
    return given if len(given) == len(parts) else None


def fill(value: float, shape: Shape) -> Expr:
    """A tensor whose entries are all `value` (a constant for a scalar)."""
    return Expr("fill", (), float(value), shape) if shape else constant(float(value))


def eye(shape: Shape) -> Expr:
    """The identity matrix, or a stack of them: shape [..., n, n]."""
    return Expr("eye", (), None, shape)


def value_of(node: Expr) -> float | None:
    """The one number that a node consists of, if it is known."""
    return float(node.data) if node.op in ("const", "fill") and isinstance(node.data, _NUMBERS) else None


def is_zero(node: Expr) -> bool:
    return value_of(node) == 0.0


def times(scalar: Any, node: Expr) -> Expr:
    """scalar * node, the scalar (a number or a scalar expression) in front; numbers are multiplied out."""
    factor = scalar if isinstance(scalar, Expr) else constant(float(scalar))  # one float type: 2 and 2.0 are one node
    if value_of(factor) == 1.0:
        return node
    if node.op == "mul" and value_of(factor) is not None and node.args[0].op == "const":
        return times(float(factor.data) * float(node.args[0].data), node.args[1])
    return make("mul", factor, node)


def scaled(node: Expr) -> tuple[Expr | None, Expr]:
    """(scalar, rest) of `scalar * rest`; (None, node) when there is no scalar in front."""
    if node.op == "mul" and not node.args[0].shape and node.args[1].shape:
        return node.args[0], node.args[1]
    return None, node


def selection(node: Expr) -> Expr | None:
    """The places i, j, ... of [e_i, e_j, ...], the columns of an identity matrix."""
    is_of_identity = node.op == "columns" and node.args[0].op == "eye" and len(node.shape) == 2
    return node.args[1] if is_of_identity else None


def summands(node: Expr) -> Iterator[Expr]:
    """The terms of a sum, left to right; a part that would be endless when written out is one term."""
    stack = [node]
    while stack:
        term = stack.pop()
        if term.op == "add" and term.unfolded <= UNFOLDED:  # a chain of x + x has 2^n terms
            stack += reversed(term.args)
        else:
            yield term


def total(terms: list[Expr], shape: Shape) -> Expr:
    """The sum of terms (zero for none)."""
    result = terms[0] if terms else fill(0, shape)
    for term in terms[1:]:
        result = make("add", result, term)
    return result
