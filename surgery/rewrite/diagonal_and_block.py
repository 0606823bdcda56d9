"""Rules for matrices that keep a shape: diagonal ones, block-diagonal ones and Kronecker products with an identity.

Sums and functions of them have that shape too, so that what has little work stays so.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.ir.builders import every, eye, fill, scaled, summands, times, total, value_of
from surgery.ir.expression import Expr
from surgery.ir.operations import constant, make
from surgery.ir.sizes import TOKENS
from surgery.rewrite.engine import Rule


def _diag_of_fill(node: Expr) -> Expr | None:
    value = value_of(node.args[0])
    # 0 I is written as zeros, which the rules of sums and products know
    return None if value is None else fill(0, node.shape) if value == 0 else times(value, eye(node.shape))


def _as_diag(node: Expr) -> Expr | None:
    """The diagonal of a diagonal matrix, as a vector; None for another matrix."""
    if node.op == "eye" and len(node.shape) == 2:
        return fill(1, node.shape[:1])
    return node.args[0] if node.op == "diag" else None


def _kron_of_identities(node: Expr) -> Expr | None:
    return eye(node.shape) if all(a.op == "eye" for a in node.args) else None


def _kron_of_a_number(node: Expr) -> Expr | None:
    for one, other in (node.args, node.args[::-1]):
        if one.op in ("fill", "eye") and all(size == 1 for size in one.shape):
            return times(one.data if one.op == "fill" else 1, other)
    return None


def _kron_of_diagonals(node: Expr) -> Expr | None:
    parts = every(map(_as_diag, node.args))
    return None if parts is None else make("diag", make("kron", *parts))


def _diagonals(node: Expr) -> Expr | None:
    """Combine the diagonal terms of a sum, the identity too, into one matrix."""
    terms = list(summands(node))
    diagonal = [t for t in terms if scaled(t)[1].op in ("diag", "eye")] if len(node.shape) == 2 else []
    if len(diagonal) < 2 or any(t.shape != node.shape for t in terms):
        return None
    vectors = [each if scalar is None else times(scalar, each) for scalar, each in
               ((scaled(t)[0], _as_diag(scaled(t)[1])) for t in diagonal) if each is not None]
    return total([make("diag", total(vectors, node.shape[:1])), *(t for t in terms if t not in diagonal)], node.shape)


def _blocks(node: Expr) -> Expr | None:
    """Combine the terms of a sum that keep to square blocks of one size, diagonal ones too."""
    terms = list(summands(node))
    stacks = dict.fromkeys(s.args[0].shape for _, s in map(scaled, terms) if s.op == "block_diag")
    in_blocks = [t for t in terms if scaled(t)[1].op == "block_diag" or _as_diag(scaled(t)[1]) is not None]
    if len(stacks) != 1 or len(in_blocks) < 2:
        return None
    (shape,) = stacks
    if shape[1] != shape[2]:  # a diagonal matrix has no part in blocks that are not square
        return None
    parts = []
    for scalar, each in map(scaled, in_blocks):  # each as the stack of its blocks
        blocks = each.args[0] if each.op == "block_diag" else eye(shape) if each.op == "eye" else make(
            "diag", make("reshape", each.args[0], data=shape[:2]))
        parts.append(blocks if scalar is None else times(scalar, blocks))
    return total([make("block_diag", total(parts, shape)), *(t for t in terms if t not in in_blocks)], node.shape)


def _product_of_diagonals(node: Expr) -> Expr | None:
    parts = every(_as_diag(a) if len(a.shape) == 2 else None for a in node.args)
    return None if parts is None else make("diag", make("mul", *parts))


def _of_diagonal(function: Callable[[Expr], Expr]) -> Callable[[Expr], Expr | None]:
    """f(diag(d)) = diag(f(d))."""
    return lambda node: make("diag", function(node.args[0].args[0])) if node.args[0].op == "diag" else None


def _cayley_of_numbers(d: Expr) -> Expr:
    return make("div", make("add", constant(1.0), times(0.5, d)), make("add", constant(1.0), times(-0.5, d)))


def _through_kron(node: Expr) -> Expr | None:
    """A function of equal blocks is the function of one block."""
    inner = node.args[0]
    others = [a for a in inner.args if a.op != "eye"] if inner.op == "kron" and len(inner.shape) == 2 else []
    if len(others) != 1 or others[0].shape[0] != others[0].shape[1]:
        return None
    return make("kron", *(a if a.op == "eye" else make(node.op, a) for a in inner.args))


def _through_blocks(node: Expr) -> Expr | None:
    inner = node.args[0]
    return make("block_diag", make(node.op, inner.args[0])) if inner.op == "block_diag" else None


def _columns(node: Expr) -> Expr | None:
    """Some columns of a product, a sum or a multiple are those of its last factor, its terms, of what it is of."""
    inner = node.args[0]

    def same(a: Expr) -> Expr:
        return make(node.op, a, *node.args[1:], data=node.data)

    if TOKENS in inner.shape and scaled(inner)[0] is None:  # made once, for all that read other columns
        return None
    if inner.op == "matmul" and len(inner.args[1].shape) > 1:
        return make("matmul", inner.args[0], same(inner.args[1]))
    if inner.op in ("add", "mul"):
        return make(inner.op, *(same(a) if a.shape else a for a in inner.args))
    if inner.op == "eye" and len(inner.shape) == 2 and node.op == "between":
        return make("columns", inner, make("range", data=node.data))
    if inner.op == "diag" and len(inner.shape) == 2 and node.op == "columns":  # e_i d_i is d_i e_i
        return make("matmul", same(eye(inner.shape)), make("diag", make("take", inner.args[0], node.args[1])))
    return fill(inner.data, node.shape) if inner.op == "fill" else None


def _side_by_side_columns(node: Expr) -> Expr | None:
    """Columns that stand side by side are a part of the matrix, or all of it; of I they stay places."""
    a, places = node.args
    if places.op != "range":
        return None
    if places.data == (0, a.shape[-1]):
        return a
    return None if a.op == "eye" and len(a.shape) == 2 else make("between", a, data=places.data)


SHAPED = (
    Rule("diag(d) + c I = diag(d + c 1)", "add", _diagonals, "I(n) + diag(d)"),
    Rule("block_diag(s) + block_diag(t) = block_diag(s + t)", "add", _blocks,
         "block_diag(S) + g * block_diag(Z) + diag(d)"),
    Rule("diag(d) diag(e) = diag(d e), entry by entry", "mul", _product_of_diagonals, "diag(d) * diag(e)"),
    Rule("diag(c, c, ...) = c I", "diag", _diag_of_fill, "diag(0 * d + 2)", drops=True),
    Rule("some columns side by side, or all", "columns", _side_by_side_columns, "columns(A, range(2, 5))"),
    Rule("the columns of x y, x + y, c x, diag(d)", "columns", _columns, "columns(A @ B + 2 * I(n) + diag(d), at)"),
    Rule("the columns of x y, x + y, c x, side by side", "between", _columns, "columns(A @ B + 2 * A, 2)"),
    Rule("I ⊗ I = I", "kron", _kron_of_identities, "kron(I(2), I(3))"),
    Rule("[c] ⊗ x = x ⊗ [c] = c x", "kron", _kron_of_a_number, "kron(2 * ones(1, 1), K)"),
    Rule("diag(d) ⊗ diag(e) = diag(d ⊗ e)", "kron", _kron_of_diagonals, "kron(diag(d), I(3))"),
    Rule("block_diag(I, I, ...) = I", "block_diag", lambda node: eye(node.shape) if node.args[0].op == "eye" else None,
         "block_diag(cayley(0 * S))", drops=True),
    Rule("f(block_diag(s)) = block_diag(f(s))", "cayley", _through_blocks, "cayley(block_diag(S))"),
    Rule("f(block_diag(s)) = block_diag(f(s))", "expm", _through_blocks, "expm(block_diag(S))"),
    Rule("f(block_diag(s)) = block_diag(f(s))", "skew", _through_blocks, "skew(block_diag(S))"),
    *(Rule("f(I ⊗ k) = I ⊗ f(k), f(k ⊗ I) = f(k) ⊗ I", op, _through_kron, f"{op}(kron(I(4), K))")
      for op in ("cayley", "expm", "skew")),
    Rule("cayley(diag(d)) = diag((1 + d/2) / (1 - d/2))", "cayley", _of_diagonal(_cayley_of_numbers),
         "cayley(diag(d))"),
    Rule("e^diag(d) = diag(e^d)", "expm", _of_diagonal(lambda d: make("exp", d)), "expm(diag(d))"),
)
