"""How rows of the table of operations say the maths of a node: signs between, around and in front of its arguments.

A form takes a writer (`notation.Maths`) and a node; it gives a text and how tightly that binds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from functools import cache
from typing import Any

from surgery.ir.expression import Expr
from surgery.ir.sizes import Dim

# How tightly a text binds: a sum, a product entry by entry, a product, what never needs parentheses.
SUM, ENTRYWISE, PRODUCT, ATOM = range(4)
Text = tuple[str, int]
Notation = Callable[[Any, Expr], Text]
_is_in_full: ContextVar[bool] = ContextVar("whether numbers are written with all their digits", default=False)


def infix(sign: str, binding: int, left: int, right: int) -> Notation:
    """`a + b`, each side in parentheses where it binds less than `left` and `right`."""
    def rule(maths: Any, expr: Expr) -> Text:
        a, b = expr.args
        return f"{maths.at_least(a, left)} {sign} {maths.at_least(b, right)}", binding

    return rule


def around(before: str, after: str, least: int = SUM, binding: int = ATOM) -> Notation:
    """`‖a‖`, `aᵀ`, `-a`."""
    return lambda maths, expr: (f"{before}{maths.at_least(expr.args[0], least)}{after}", binding)


def as_its_argument(maths: Any, expr: Expr) -> Text:
    return maths.named(expr.args[0])


def product(maths: Any, expr: Expr) -> Text:
    """`a b`."""
    return _side_by_side(maths, *expr.args)


def entrywise_product(maths: Any, expr: Expr) -> Text:
    """`a ∘ b`, or a scalar in front of what it scales."""
    a, b = expr.args
    if a.shape and b.shape:
        base, count = _power(expr)
        if count > 2 and maths.symbols.keys().isdisjoint(expr.args):
            return f"pow({maths.short(base)}, {count})", ATOM
        return infix("∘", ENTRYWISE, ENTRYWISE, PRODUCT)(maths, expr)
    scalar, scaled = (b, a) if a.shape else (a, b)
    if scalar.op == "const" and scalar.data in (1, -1):  # as where a spec's scale is 1
        return maths.named(scaled) if scalar.data == 1 else (f"-{maths.at_least(scaled, PRODUCT)}", SUM)
    return _side_by_side(maths, scalar, scaled)


@cache  # a formula may hold one factor twice, and that one another
def _power(expr: Expr) -> tuple[Expr, int]:
    """x and how often it is a factor, of x ∘ x ∘ ..."""
    if expr.op != "mul":
        return expr, 1
    (a, m), (b, n) = map(_power, expr.args)
    return (a, m + n) if a is b else (expr, 1)


def transpose(maths: Any, expr: Expr) -> Text:
    """`aᵀ`; what is turned twice is as it was."""
    turns, inner = 1, expr.args[0]
    while inner.op == "T" and inner not in maths.symbols:
        turns, inner = turns + 1, inner.args[0]
    return (f"{maths.at_least(inner, ATOM)}ᵀ", ATOM) if turns % 2 else maths.named(inner)


def _side_by_side(maths: Any, a: Expr, b: Expr) -> Text:
    left, right = maths.at_least(a, PRODUCT), maths.at_least(b, PRODUCT)
    return f"{left} {'· ' if right[0].isdigit() else ''}{right}", PRODUCT


# ---------------------------------------------------------------------------------------------------------- leaves


def symbol(text: str) -> Notation:
    return lambda maths, expr: (text, ATOM)


def last_name(maths: Any, expr: Expr) -> Text:
    """`m` of `post_magnitude.m`."""
    return expr.data.rpartition(".")[2], ATOM


def number(maths: Any, expr: Expr) -> Text:
    text = number_text(expr.data)
    if text.startswith("-"):
        return text, SUM
    is_whole = isinstance(expr.data, (int, float)) or isinstance(expr.data, Fraction) and expr.data.denominator == 1
    return text, ATOM if is_whole or text.isidentifier() else SUM


def ones(maths: Any, expr: Expr) -> Text:
    return f"ones({', '.join(map(str, expr.shape))})", ATOM


def rows_of_numbers(maths: Any, expr: Expr) -> Text:
    return f"[{'; '.join(' '.join(map(number_text, row)) for row in expr.data)}]", ATOM


def undecided(maths: Any, expr: Expr) -> Text:
    """An `if` as its text, and in full with what the names in it stand for; an operation on one as that operation."""
    if isinstance(expr.data, str):
        parts = f": {'; '.join(maths.written(arg)[0] for arg in expr.args)}" * (_is_in_full.get() and bool(expr.args))
        return f"({expr.data}{parts})", ATOM
    op, data = expr.data
    return maths.written(Expr(op, expr.args, data, ()))


def number_text(value: Any) -> str:
    """A compile-time value: `2`, `0.5`, `2/3`, `out / 2`; a long one is rounded, unless numbers are written in full."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        return repr(value) if _is_in_full.get() and float(text) != value else text
    return value.rounded if isinstance(value, Dim) and not _is_in_full.get() else str(value)


@contextmanager
def in_full() -> Iterator[None]:
    """Inside, two numbers that differ are two texts."""
    token = _is_in_full.set(True)
    try:
        yield
    finally:
        _is_in_full.reset(token)
