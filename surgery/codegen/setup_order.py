"""Choose the multiplication order of the set-up's products, and solve f(X) and f(Xᵀ) once.

Takes the outputs of a program; gives equal ones. Activations are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.codegen.apply_to_activations import matrix, turned
from surgery.ir.builders import selection
from surgery.ir.expression import Expr, substituted, walk
from surgery.ir.operations import operation
from surgery.ir.sizes import TOKENS
from surgery.ir.table import Transpose


def in_cheapest_order(expr: Expr) -> Expr:
    """The expression with each product of matrices in it built the cheapest way; where one is too large to be taken
    apart, all are left as they stand, for a part that is taken apart shares nothing with the rest."""
    if any(node.is_large for node in walk(expr) if TOKENS not in node.shape):
        return expr
    done: dict[Expr, Expr] = {}
    ways: dict[Expr, Expr] = {}
    stack = [expr]
    while stack:  # no recursion: a formula may be deeper than Python's stack
        node = stack[-1]
        if node not in ways:
            of_matrices = all(len(a.shape) == 2 and TOKENS not in a.shape for a in node.args)
            fits = node.op == "matmul" and of_matrices or selection(node) is not None
            ways[node] = matrix(node) if fits else node
        if waiting := [a for a in ways[node].args if a not in done]:
            stack += reversed(waiting)
        else:
            done[node] = ways[node].with_args(tuple(done[a] for a in ways[node].args))
            stack.pop()
    return done[expr]


def solved_once(outputs: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The outputs with f(x) turned in the place of f(xᵀ), where there are both: one solve in the place of two."""
    return made_once(outputs, lambda node: operation(node).is_solve and operation(node).transpose is Transpose.INSIDE)


def made_once(outputs: tuple[Expr, ...], is_costly: Callable[[Expr], bool]) -> tuple[Expr, ...]:
    """The outputs in which a costly node whose transpose is there too, by another name, is that turned."""
    costly = dict.fromkeys(filter(is_costly, walk(*outputs)))
    again: dict[Expr, Expr] = {}
    for node in costly:
        other = turned(node)
        if other in costly and other is not node and node not in again:
            again[other] = Expr("T", (node,), None, other.shape)
    return tuple(substituted(output, again) for output in outputs) if again else outputs
