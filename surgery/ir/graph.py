"""Expressions as a graph: which nodes read a node's value, and which no gradient reaches."""

from __future__ import annotations

from surgery.ir.expression import Expr, walk
from surgery.ir.table import operation


def readers(*outputs: Expr) -> dict[Expr, list[Expr]]:
    """The nodes that read each node's value, as often as they do."""
    reads: dict[Expr, list[Expr]] = {}
    for node in walk(*outputs):
        for arg in node.args:
            reads.setdefault(arg, []).append(node)
    return reads


def without_gradient(*outputs: Expr) -> frozenset[Expr]:
    """The nodes that no gradient reaches: every way to them passes a `detach` or its like."""
    live: set[Expr] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += () if operation(node).stops_gradient else node.args
    return frozenset(walk(*outputs)) - live
