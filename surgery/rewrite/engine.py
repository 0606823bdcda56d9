"""Applies a table of rules to an expression until none fits.

A rule sees a node whose arguments are rewritten already and gives an equal node, or None. Promises: each distinct node
is visited once; the result has the shape of the expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from surgery.ir.expression import Expr


@dataclass(frozen=True)
class Rule:
    """One identity: what it `states`, the operation at its left side's root, and the `change` that applies it.

    `example` is an expression of the language that it must fire on, over the operands of tests/operands.py. `rounds`:
    that what it takes away is zero, or what it turns back is there again, is true but for rounding. `drops`: that it
    does no more than drop work whose result is known, so that finite numbers stay what they are to the bit.
    """

    states: str
    op: str
    change: Callable[[Expr], Expr | None]
    example: str
    rounds: bool = False
    drops: bool = False


Table = dict[str, tuple[Rule, ...]]


def table(*rules: Rule) -> Table:
    """The rules by the operation that they look for, in order."""
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        by_op.setdefault(rule.op, []).append(rule)
    return {op: tuple(rows) for op, rows in by_op.items()}


def rewrite(expr: Expr, rules: Table) -> Expr:
    """The normal form of `expr` under the rules."""
    done: dict[Expr, Expr] = {}
    better: dict[Expr, Expr] = {}  # what a rule made of a node, on the way to its own normal form
    stack = [expr]
    while stack:  # and no recursion: a formula may be deeper than Python's stack
        node = stack[-1]
        if node in done:
            stack.pop()
        elif node in better:
            # what a rule made may hold nodes that no rule has seen: it is rewritten itself before it counts
            if better[node] in done:
                done[node] = done[better[node]]
            else:
                stack.append(better[node])
        elif waiting := [a for a in node.args if a not in done]:
            stack += reversed(waiting)
        else:
            plain = node.with_args(tuple(done[a] for a in node.args))
            changed = first(rules.get(plain.op, ()), plain)
            if changed is None:
                done[node] = plain
            else:
                better[node] = changed
    return done[expr]


def first(rules: Iterable[Rule], node: Expr) -> Expr | None:
    """The result of the first rule that applies to a node; None if none does."""
    for rule in rules:
        better = rule.change(node)
        if better is not None and better is not node:  # a rule may find a form in place already
            assert better.shape == node.shape, f"{rule.states}: {node.shape} became {better.shape}"
            return better
    return None
