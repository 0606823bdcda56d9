"""What a primitive is: its arity, shape rule and dense meaning in one row, and the parts that shape rules are made of.

Shape rules work on symbolic sizes and raise `ShapeError`; dense meanings take and give torch tensors (torch is imported
when one runs, so that checking a text needs none).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.ir.expression import Shape


class ShapeError(Exception):
    """Shapes that a primitive cannot take; the message says why."""


@dataclass(frozen=True)
class Primitive:
    """`shape(*shapes)` gives the result's shape; `dense(*tensors)` its value; `doc` is its one line of maths.

    `sizes` are the names of the whole numbers that a call gives after its tensors (the last with `*` for any number of
    them); with them, `shape` and `dense` take their tuple first, and a `dense` without a tensor takes one whose dtype
    and device the result gets. `places` says which arguments are whole numbers, places of entries; `whole` whether the
    result is. A row that is not `public` is for the compiler: a spec cannot call it.
    """

    name: str
    arity: int
    shape: Callable[..., Shape]
    dense: Callable[..., Any]
    doc: str
    public: bool = True
    sizes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    whole: bool = False

    def shape_of(self, data: Any, shapes: tuple[Shape, ...]) -> Shape:
        """The shape of the result for a node's data and its arguments' shapes. Raises: ShapeError."""
        return self.shape(data, *shapes) if self.sizes else self.shape(*shapes)

    def value(self, data: Any, args: list, like: Any) -> Any:
        """The value for a node's data and its arguments' values; `like` has the dtype and device of what has none."""
        if not self.sizes:
            return self.dense(*args)
        return self.dense(data, *(args or [like]))


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
        if {len(a), len(b)} != {1, 2}:
            raise
        raise ShapeError(f"{error}; a gain for each row is `diag(d) @ x`, for each column `x @ diag(d)`") from None


def product(a: Shape, b: Shape) -> Shape:
    if not a or not b:
        raise ShapeError(f"`@` needs matrices, not {shape_text(a)} and {shape_text(b)}; use `*` to scale")
    inner_a, inner_b = a[-1], b[-2] if len(b) > 1 else b[0]
    if inner_a != inner_b:
        raise ShapeError(f"{shape_text(a)} @ {shape_text(b)}: the inner dimensions {inner_a} and {inner_b} differ")
    stack_a, stack_b = a[:-2], b[:-2]
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
