"""Reassociate x (T F) as (x T) F where only T is trained, so that T's gradient is computed at T's rank.

Takes the expression of a body, and what takes a gradient; gives an equal one. Likewise x (F T) becomes (x F) T. The
product T F, as wide as the weight, then needs no gradient, and of x F only what T reads is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import make
from surgery.ir.sizes import TOKENS, known_shape
from surgery.rewrite.low_rank import is_thin


def reassociated(body: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """The body with such products reassociated (itself where there is none)."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op != "matmul" or TOKENS not in node.args[0].shape:
            return node.with_args(args)
        a, matrix = args
        return _acted(a, matrix, is_trained)

    return rebuild(body, change)


def _acted(a: Expr, matrix: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """a M, factor by factor as far as one of two factors trains and the other does not."""
    pair = _pair(matrix)
    # where both train, or neither, nothing is gained: one product with the activations is less than two
    if pair is None or is_trained(pair[0]) == is_trained(pair[1]):
        return make("matmul", a, matrix)
    return _acted(_acted(a, pair[0], is_trained), pair[1], is_trained)


def _pair(matrix: Expr) -> tuple[Expr, Expr] | None:
    """The factors of a product that is made in the set-up, with no more columns between them than it has itself."""
    if matrix.op == "T" and (turned := _pair(matrix.args[0])) is not None:  # (L R)ᵀ = Rᵀ Lᵀ
        return _turn(turned[1]), _turn(turned[0])
    if matrix.op != "matmul" or any(len(part.shape) != 2 for part in matrix.args):
        return None
    left, right = matrix.args
    return (left, right) if is_thin(left.shape[1], max(known_shape(matrix.shape))) else None


def _turn(matrix: Expr) -> Expr:
    return matrix.args[0] if matrix.op == "T" else make("T", matrix)
