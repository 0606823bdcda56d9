"""Expressions as maths: `cayley(C Dᵀ - D Cᵀ)`.

Takes an expression and a symbol for some of its parts; gives one line of text. Promises: it reads back to one
expression only, up to what associativity and commuting scalars leave open. A part that is shared is written out
wherever it stands, unless it has a symbol: `parts_to_name` says which need one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from surgery.ir.expression import Expr, walk
from surgery.ir.notation_forms import ATOM, SUM, Text, number_text
from surgery.ir.operations import operation, shape_text

_LONG, _DEEP = 400, 50  # nodes of a text, and nodes within nodes, up to which nothing needs a symbol
_BRIEF = 6  # nodes within nodes of a text that will be cut anyway


class Maths:
    """Writes expressions; `symbols` maps nodes to what stands for them."""

    def __init__(self, symbols: Mapping[Expr, str]):
        self.symbols = symbols

    def text(self, expr: Expr) -> str:
        """The expression written out: its own symbol is not used, those of its parts are."""
        return self.written(expr)[0]

    def short(self, expr: Expr) -> str:
        """The symbol of the expression, or its text."""
        return self.at_least(expr, SUM)

    def at_least(self, expr: Expr, least: int) -> str:
        """In parentheses, if it binds less tightly than `least`."""
        text, binding = self.named(expr)
        return text if binding >= least else f"({text})"

    def named(self, expr: Expr) -> Text:
        """Its symbol or its text, with how tightly that binds."""
        return (self.symbols[expr], ATOM) if expr in self.symbols else self.written(expr)

    def written(self, expr: Expr) -> Text:
        """Its text, with how tightly that binds."""
        rule = operation(expr).notation
        if rule:
            return rule(self, expr)
        # an identity alone does not say its size, which a function of it may depend on
        arguments = [f"I[{a.shape[-1]}]" if a.op == "eye" else self.short(a) for a in expr.args]
        return f"{expr.op}({', '.join([*arguments, *map(number_text, expr.data or ())])})", ATOM


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


def listing(*exprs: Expr) -> list[str]:
    """The expressions with one distinct node a line, arguments first: `%3 = matmul %1 %2 : [out, in]`."""
    names = {node: f"%{i}" for i, node in enumerate(walk(*exprs))}
    lines = []
    for node, name in names.items():
        data = [] if node.data is None else [number_text(node.data)]
        words = " ".join([node.op, *data, *(names[a] for a in node.args)])
        lines.append(f"{name} = {words} : {shape_text(node.shape)}")
    return lines


def brief(expr: Expr) -> str:
    """The expression, what stands deep in it as `…`."""
    level = {expr}
    for _ in range(_BRIEF):
        level = {a for node in level for a in node.args}
    return Maths({node: "…" for node in level if node.args}).text(expr)
