"""Low-rank matrices: the factors of an expression, derived from its parts by rules.

Takes an expression in normal form. Promises: what is said holds for all values of the leaves.
"""

from __future__ import annotations

from functools import lru_cache

from surgery.ir.builders import every, fill, is_zero, scaled, summands, times, total
from surgery.ir.expression import Expr
from surgery.ir.operations import make
from surgery.ir.sizes import Dim, Size

Factors = tuple[Expr, Expr]


def is_thin(inner: Size, *outer: Size) -> bool:
    """True if a product over `inner` is cheaper than the matrix that it makes (unknown sizes count as large)."""
    known = [o for o in outer if not isinstance(o, Dim)]
    return not isinstance(inner, Dim) and all(2 * inner <= o for o in known)


@lru_cache(maxsize=4096)
def factors(node: Expr) -> Factors | None:
    """(U, V) with node = U V and fewer columns in U than half of either side; None for what is not low-rank, and for a
    stack."""
    scalar, rest = scaled(node)
    if scalar is not None:
        inner = factors(rest)
        pair = inner and (times(scalar, inner[0]), inner[1])
    else:
        rule = {"matmul": _of_product, "add": _of_sum, "mul": _of_hadamard, "T": _of_transpose, "fill": _of_fill,
                "side_by_side": _of_neighbours}.get(node.op)
        pair = rule(node) if rule and len(node.shape) == 2 else None
    # a sum of thin terms need not be thin itself
    return pair if pair is not None and is_thin(pair[0].shape[-1], *node.shape) else None


def _of_product(node: Expr) -> Factors | None:
    left, right = node.args
    if len(left.shape) != 2 or len(right.shape) != 2:
        return None
    if is_thin(left.shape[1], *node.shape):
        return left, right
    # a thin factor makes the whole thin, and the other factor goes into its inner side
    if (inner := factors(left)) is not None:
        return inner[0], make("matmul", inner[1], right)
    if (inner := factors(right)) is not None:
        return make("matmul", left, inner[0]), inner[1]
    return None


def _of_sum(node: Expr) -> Factors | None:
    parts = every(map(factors, node.args))
    if parts is None:
        return None
    (u, v), (p, q) = parts  # as many columns as both have: `factors` asks whether that is few enough
    return make("side_by_side", u, p), stacked_rows(v, q)


def _of_hadamard(node: Expr) -> Factors | None:
    """(U V) * (P Q) = face(U, P) face(Vᵀ, Qᵀ)ᵀ."""
    parts = every(map(factors, node.args)) if node.args[0].shape else None
    if parts is None:
        return None
    (u, v), (p, q) = parts
    return make("face", u, p), make("T", make("face", make("T", v), make("T", q)))


def _of_fill(node: Expr) -> Factors:
    """c 1 1ᵀ."""
    return fill(node.data, (node.shape[0], 1)), fill(1, (1, node.shape[1]))


def _of_neighbours(node: Expr) -> Factors | None:
    """[U V, P Q] = [U, P] [V, 0; 0, Q], and [U V, U Q] = U [V, Q]."""
    (left, right), parts = node.args, [None if is_zero(a) else factors(a) for a in node.args]
    if any(part is None and not is_zero(a) for a, part in zip(node.args, parts)):
        return None
    first, second = parts
    if first and second and first[0] is second[0]:  # one U for both halves the rank
        return first[0], make("side_by_side", first[1], second[1])
    upper = first and (first[0], make("side_by_side", first[1], fill(0, (first[1].shape[0], right.shape[1]))))
    lower = second and (second[0], make("side_by_side", fill(0, (second[1].shape[0], left.shape[1])), second[1]))
    if upper and lower:
        return make("side_by_side", upper[0], lower[0]), stacked_rows(upper[1], lower[1])
    return upper or lower  # beside zeros


def stacked_rows(v: Expr, q: Expr) -> Expr:
    """The rows of v above those of q."""
    return make("T", make("side_by_side", make("T", v), make("T", q)))


def _of_transpose(node: Expr) -> Factors | None:
    inner = factors(node.args[0])
    return inner and (make("T", inner[1]), make("T", inner[0]))


def low_rank_turn(node: Expr) -> Factors | None:
    """(U, V) with node = I + U V, U V low-rank; None for what is not such a sum, and for a stack."""
    terms = list(summands(node))
    if len(terms) < 2 or terms[0].op != "eye":
        return None
    return factors(total(terms[1:], node.shape))
