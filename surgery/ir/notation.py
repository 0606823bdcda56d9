"""Expressions as maths: `cayley(C Dᵀ - D Cᵀ)`.

Takes an expression and a symbol for some of its parts; gives one line of text. Promises: it reads back to one
expression only, up to what associativity and commuting scalars leave open. A part that is shared is written out
wherever it stands, unless it has a symbol: `parts_to_name` says which need one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from surgery.ir.expression import Expr, walk

# How tightly a text binds: a sum, a product entry by entry, a product, what never needs parentheses.
SUM, ENTRYWISE, PRODUCT, ATOM = range(4)
Text = tuple[str, int]
_LONG, _DEEP = 400, 50  # nodes of a text, and nodes within nodes, up to which nothing needs a symbol
_BRIEF = 6  # nodes within nodes of a text that will be cut anyway


class Maths:
    """Writes expressions; `symbols` maps nodes to what stands for them."""

    def __init__(self, symbols: Mapping[Expr, str]):
        self.symbols = symbols

    def text(self, expr: Expr) -> str:
        """The expression written out: its own symbol is not used, those of its parts are."""
        return self._written(expr)[0]

    def short(self, expr: Expr) -> str:
        """The symbol of the expression, or its text."""
        return self._at_least(expr, SUM)

    def _at_least(self, expr: Expr, least: int) -> str:
        text, binding = self._named(expr)
        return text if binding >= least else f"({text})"

    def _named(self, expr: Expr) -> Text:
        return (self.symbols[expr], ATOM) if expr in self.symbols else self._written(expr)

    def _written(self, expr: Expr) -> Text:
        rule = _RULES.get(expr.op)
        return rule(self, expr) if rule else (f"{expr.op}({', '.join(self._arguments(expr))})", ATOM)

    def _arguments(self, expr: Expr) -> list[str]:
        return [*map(self._argument, expr.args), *map(number_text, expr.data or ())]

    def _argument(self, expr: Expr) -> str:
        return f"I[{expr.shape[-1]}]" if expr.op == "eye" else self.short(expr)


def parts_to_name(roots: Iterable[Expr], symbols: Mapping[Expr, str]) -> list[Expr]:
    """The parts that must have a symbol too, so that the text is no longer than the formula and not nested too deep,
    parts before what they stand in; none of a formula of a usual length."""
    roots = list(dict.fromkeys(roots))
    length: dict[Expr, int] = {}  # how many nodes its text shows, and how deep they stand, where all symbols are used
    depth: dict[Expr, int] = {}
    nodes = list(walk(*roots))
    for node in nodes:
        below = [a for a in node.args if a not in symbols]
        length[node] = 1 + len(node.args) - len(below) + sum(length[a] for a in below)
        depth[node] = 1 + max((depth[a] for a in below), default=0)
    if all(length[root] <= _LONG and depth[root] <= _DEEP for root in roots):
        return []
    reads = Counter(a for node in nodes for a in node.args)
    named: dict[Expr, None] = {}
    for node in nodes:
        depth[node] = 1 + max((depth[a] for a in node.args if a not in named), default=0)
        if node.args and node not in symbols and node not in roots and (reads[node] > 1 or depth[node] > _DEEP):
            named[node] = None
    return list(named)


def brief(expr: Expr) -> str:
    """The expression, what stands deep in it as `…`."""
    level = {expr}
    for _ in range(_BRIEF):
        level = {a for node in level for a in node.args}
    return Maths({node: "…" for node in level if node.args}).text(expr)


def number_text(value: Any) -> str:
    """A compile-time value: `2`, `0.5`, `2/3`, `out / 2`."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(maths: Maths, expr: Expr) -> Text:
    text = number_text(expr.data)
    if text.startswith("-"):
        return text, SUM
    is_whole = isinstance(expr.data, (int, float)) or isinstance(expr.data, Fraction) and expr.data.denominator == 1
    return text, ATOM if is_whole or text.isidentifier() else SUM


def _infix(sign: str, binding: int, left: int, right: int) -> Callable[[Maths, Expr], Text]:
    def rule(maths: Maths, expr: Expr) -> Text:
        a, b = expr.args
        return f"{maths._at_least(a, left)} {sign} {maths._at_least(b, right)}", binding

    return rule


def _mul(maths: Maths, expr: Expr) -> Text:
    a, b = expr.args
    if a.shape and b.shape:
        return _infix("∘", ENTRYWISE, ENTRYWISE, PRODUCT)(maths, expr)
    return _side_by_side(maths, *((b, a) if a.shape else (a, b)))


def _side_by_side(maths: Maths, a: Expr, b: Expr) -> Text:
    left, right = maths._at_least(a, PRODUCT), maths._at_least(b, PRODUCT)
    return f"{left} {'· ' if right[0].isdigit() else ''}{right}", PRODUCT


def _undecided(maths: Maths, expr: Expr) -> Text:
    """An `if` as its text, an operation on one as that operation."""
    if isinstance(expr.data, str):
        return f"({expr.data})", ATOM
    op, data = expr.data
    return maths._written(Expr(op, expr.args, data, ()))


def _around(before: str, after: str, least: int = SUM, binding: int = ATOM) -> Callable[[Maths, Expr], Text]:
    return lambda maths, expr: (f"{before}{maths._at_least(expr.args[0], least)}{after}", binding)


_RULES: dict[str, Callable[[Maths, Expr], Text]] = {
    "weight": lambda maths, expr: ("W", ATOM),
    "undecided": _undecided,
    "bias": lambda maths, expr: ("b", ATOM),
    "param": lambda maths, expr: (expr.data.rpartition(".")[2], ATOM),
    "places": lambda maths, expr: (expr.data.rpartition(".")[2], ATOM),
    "fill": lambda maths, expr: (f"ones({', '.join(map(str, expr.shape))})", ATOM),
    "literal": lambda maths, expr: (f"[{'; '.join(' '.join(map(number_text, row)) for row in expr.data)}]", ATOM),
    "eye": lambda maths, expr: ("I", ATOM),
    "const": _number,
    "drop": lambda maths, expr: maths._named(expr.args[0]),
    "neg": _around("-", "", PRODUCT, SUM),
    "add": _infix("+", SUM, SUM, ENTRYWISE),
    "sub": _infix("-", SUM, SUM, ENTRYWISE),
    "mul": _mul,
    "div": _infix("/", ENTRYWISE, ENTRYWISE, ATOM),
    "matmul": lambda maths, expr: _side_by_side(maths, *expr.args),
    "T": _around("", "ᵀ", ATOM),
    "norm": _around("‖", "‖"),
    "abs": _around("|", "|"),
}
