"""Sums over shared axes of tensors of any rank: `einsum("nab,ncd->acbd", A, B)`.

An equation has a letter for each axis; a letter that is not in the result is summed over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

from surgery.ir.expression import Expr, Shape
from surgery.ir.notation_forms import ATOM
from surgery.ir.shape_rules import ShapeError, shape_text
from surgery.ir.table import Linear, Memory, Operation

_EQUATION = re.compile(r"([a-zA-Z]+(?:,[a-zA-Z]+)*)->([a-zA-Z]*)")


def read(equation: str) -> tuple[tuple[str, ...], str]:
    """The letters of each argument, and of the result. Raises: ShapeError for what is no equation."""
    match = _EQUATION.fullmatch(equation.replace(" ", ""))
    if match is None:
        raise ShapeError(f'needs an equation like "ab,bc->ac", and not "{equation}"')
    arguments, result = tuple(match[1].split(",")), match[2]
    for letters in (*arguments, result):
        if len(set(letters)) < len(letters):
            raise ShapeError(f'"{equation}" names one axis twice in "{letters}"')
    if unknown := set(result) - set("".join(arguments)):
        raise ShapeError(f'"{equation}" gives an axis `{min(unknown)}` that no argument has')
    return arguments, result


def sizes(arguments: Sequence[str], shapes: Sequence[Shape]) -> dict[str, Any]:
    """The size of each letter. Raises: ShapeError where arguments do not agree."""
    if len(arguments) != len(shapes):
        raise ShapeError(f"has {len(shapes)} tensors, and its equation names {len(arguments)}")
    known: dict[str, Any] = {}
    for letters, shape in zip(arguments, shapes):
        if len(letters) != len(shape):
            raise ShapeError(f'takes a tensor of {len(letters)} axes for "{letters}", not {shape_text(shape)}')
        for letter, size in zip(letters, shape):
            if known.setdefault(letter, size) != size:
                raise ShapeError(f"the axis `{letter}` is {known[letter]} and {size}")
    return known


def _shape(equation: tuple[str], *shapes: Shape) -> Shape:
    arguments, result = read(*equation)
    known = sizes(arguments, shapes)
    return tuple(known[letter] for letter in result)


def _dense(equation: tuple[str], *tensors: Any) -> Any:
    import torch

    return torch.einsum(*equation, *tensors)


def _flops(node: Expr, count: Any) -> float:
    """Of two arguments at a time from the left, as torch contracts them: an axis is summed over as soon as nothing
    behind names it."""
    arguments, result = read(*node.data)
    known = sizes(arguments, [a.shape for a in node.args])
    made, total = set(arguments[0]), 0.0
    for number, letters in enumerate(arguments[1:], 2):
        total += 2.0 * prod(known[letter] for letter in made | set(letters))
        made = (made | set(letters)) & set("".join((*arguments[number:], result)))
    return total or 2.0 * prod(known.values())


def _notation(maths: Any, node: Expr) -> tuple[str, int]:
    return f'einsum("{node.data[0]}", {", ".join(map(maths.short, node.args))})', ATOM


ROWS = [
    Operation("einsum", None, _shape, _dense, "the sum over the axes that the result does not name",
              sizes=("equation",), linear=Linear.EACH, memory=Memory.EITHER, flops=_flops, notation=_notation),
]
