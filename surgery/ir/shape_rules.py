"""The parts that shape rules are made of: they work on symbolic sizes and raise `ShapeError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.ir.expression import Shape


class ShapeError(Exception):
    """Shapes that an operation cannot take; the message says why, `argument` which one it is where it is one alone."""

    def __init__(self, message: str, argument: int | None = None, helps: tuple[str, ...] = ()):
        super().__init__(message)
        self.argument, self.helps = argument, helps


def shape_text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else "a scalar"


# ---------------------------------------------------------------------------------------------- shape rules


def same(a: Shape) -> Shape:
    return a


def elementwise(a: Shape, b: Shape) -> Shape:
    if a != b and a and b:
        raise ShapeError(f"{shape_text(a)} and {shape_text(b)} do not agree (only scalars broadcast)")
    return a or b


def entrywise_product(a: Shape, b: Shape) -> Shape:
    try:
        return elementwise(a, b)
    except ShapeError as error:
        if len(a) == len(b) == 2 and a[1] == b[0]:
            raise ShapeError(f"{error}; the product of matrices is `A @ B`") from None
        if {len(a), len(b)} != {1, 2}:  # in NumPy a vector would broadcast over rows: say what does here
            raise
        raise ShapeError(f"{error}; a gain for each row is `diag(d) @ x`, for each column `x @ diag(d)`") from None


def entrywise_quotient(a: Shape, b: Shape) -> Shape:
    try:
        return elementwise(a, b)
    except ShapeError as error:
        if (len(a), len(b)) != (2, 1):
            raise
        raise ShapeError(f"{error}; each row is divided by `diag(1 / d) @ x`, "
                         "each column by `x @ diag(1 / d)`") from None


def product(a: Shape, b: Shape) -> Shape:
    if not a or not b:
        raise ShapeError(f"`@` needs matrices, not {shape_text(a)} and {shape_text(b)}; use `*` to scale")
    inner_a, inner_b = a[-1], b[-2:][0]  # of a vector its only side
    if inner_a != inner_b:
        fits = "the other way round they fit" if len(a) == len(b) == 2 and b[1] == a[0] else (
            "`.T` of the second fits" if len(b) == 2 and b[1] == inner_a else
            "`.T` of the first fits" if len(a) == 2 and a[0] == inner_b else "")
        raise ShapeError(f"{shape_text(a)} @ {shape_text(b)}: the inner dimensions {inner_a} and {inner_b} differ",
                         helps=(fits,) if fits else ())
    stack_a, stack_b = a[:-2], b[:-2]  # one matrix meets each of a stack; two stacks pair up
    if stack_a and stack_b and stack_a != stack_b:
        stacks = f"{shape_text(stack_a)} and {shape_text(stack_b)}"
        raise ShapeError(f"{shape_text(a)} @ {shape_text(b)}: the stacks {stacks} differ")
    return (stack_a or stack_b) + a[-2:-1] * (len(a) > 1) + b[-1:] * (len(b) > 1)


def ranked(least: int, what: str) -> Callable[[Shape], Shape]:
    def rule(a: Shape) -> Shape:
        if len(a) < least:
            raise ShapeError(f"needs {what}, not {shape_text(a)}")
        return a

    return rule


matrix, vector = ranked(2, "a matrix or a stack of them"), ranked(1, "a vector or a stack of them")


def square(a: Shape) -> Shape:
    if matrix(a)[-1] != a[-2]:
        raise ShapeError(f"needs square matrices, not {shape_text(a)}")
    return a


def exactly(rank: int, what: str, a: Shape) -> Shape:
    if len(a) != rank:
        raise ShapeError(f"needs {what}, not {shape_text(a)}")
    return a


def dropped(mask: Any, a: Shape) -> Shape:
    """The shape of an argument; `mask` is the share of it that is dropped, and the step whose mask it is."""
    if not isinstance(mask, tuple) or len(mask) != 2 or not isinstance(mask[1], str):
        raise ShapeError("needs a share and a step")
    if not isinstance(mask[0], float) or not 0 < mask[0] < 1:
        raise ShapeError("needs a share between 0 and 1")
    return a
