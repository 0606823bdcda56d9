"""Norms of rows in parts: of a sum, a turn, gains or blocks, without building the matrix.

Takes matrices in normal form. `dots(a, b, 1)` is Σ a b over each row; `dots(a, b, k)` has the products of every two
rows that stand in one block of k, [m / k, k, k], which is what a block rotation of the rows mixes. Promises: equal
values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.ir.builders import UNFOLDED, fill, is_zero, scaled, summands, times, total, value_of
from surgery.ir.expression import Expr, rebuild, walk
from surgery.ir.operations import make
from surgery.ir.sizes import Dim, known
from surgery.rewrite.engine import Rule
from surgery.rewrite.low_rank import factors
from surgery.rewrite.normal_form import is_orthogonal, simplify


def _row_norm(node: Expr) -> Expr | None:
    inner = node.args[0]
    if len(inner.shape) != 2 or not _pays(inner):
        return None
    return make("root", dots(inner, inner, 1))


def _col_norm(node: Expr) -> Expr | None:
    return make("row_norm", make("T", node.args[0])) if len(node.shape) == 1 and _pays(node.args[0]) else None


def _norm(node: Expr) -> Expr | None:
    inner = node.args[0]
    return make("root", make("total", dots(inner, inner, 1))) if len(inner.shape) == 2 and _pays(inner) else None


def _pays(node: Expr) -> bool:
    """True if a norm is cheaper in parts: a term is low-rank, or a product."""
    is_cheap = any(factors(t) is not None or t.op == "matmul" for t in summands(node))
    return is_cheap and not _cancels(node) or (
        node.op == "mul" and scaled(node)[0] is not None and _pays(scaled(node)[1]))


def _cancels(node: Expr) -> bool:
    """Whether terms of a sum in it take each other away, maybe but for a `detach`: squares that cancel leave √ε x where
    x - x is 0. (The normal form leaves x + y - (x + y), of sums in brackets.)"""
    if node.unfolded > UNFOLDED:
        return False
    bare = node
    if node.has("detach"):
        bare = simplify(rebuild(node, lambda n, args: args[0] if n.op == "detach" else n.with_args(args)))
    return is_zero(bare) or any(_has_opposites(each) for each in walk(bare) if each.op == "add")


def _has_opposites(node: Expr) -> bool:
    """Whether a term of a sum has a negative multiple in it too."""
    signs: dict[Expr, bool] = {}
    stack = [(node, 1.0)]
    while stack:
        term, factor = stack.pop()
        scalar, rest = scaled(term)
        if scalar is not None and (value := value_of(scalar)) is not None:
            term, factor = rest, factor * value
        if term.op == "add":
            stack += ((each, factor) for each in term.args)
        elif signs.setdefault(term, factor > 0) != (factor > 0):
            return True
    return False


def dots(a: Expr, b: Expr, k: int, gains: Expr | None = None) -> Expr:
    """The products of rows of a diag(gains) and b: bilinear over sums, scalings, diagonals, blocks and thin factors."""
    if (part := _part(a, b, k, gains)) is not None:
        return part
    if (part := _part(b, a, k, gains)) is not None:
        return part if k == 1 else make("T", part)
    if k > 1:
        return make("gram", _gained(a, gains), b, data=(k,))
    return make("row_dot", a, b) if gains is None else make("weighted_dot", a, b, gains)


def _gained(a: Expr, gains: Expr | None) -> Expr:
    return a if gains is None else simplify(make("matmul", a, make("diag", gains)))


def _part(a: Expr, b: Expr, k: int, gains: Expr | None) -> Expr | None:
    scalar, rest = scaled(a)
    if scalar is not None:
        return make("mul", scalar, dots(rest, b, k, gains))
    if a.op == "add":
        terms = list(summands(a))
        if a is not b:  # ⟨x + y, b⟩ = ⟨x, b⟩ + ⟨y, b⟩
            return _added([dots(t, b, k, gains) for t in terms])
        # ‖x + y‖² = ‖x‖² + 2 ⟨x, y⟩ + ‖y‖²: each cross term is made once
        squares = [dots(t, t, k, gains) for t in terms]
        crossed = [dots(s, t, k, gains) for i, s in enumerate(terms) for t in terms[i + 1:]]
        twice = [times(2, c) for c in crossed] if k == 1 else [each for c in crossed for each in (c, make("T", c))]
        return _added([*squares, *twice])
    if a.op == "matmul" and (part := _of_product(a, b, k, gains)) is not None:
        return part
    if (pair := factors(a)) is not None:  # (U V) bᵀ: the rows of U with those of b Vᵀ, which are as short
        u, w = pair[0], simplify(make("matmul", _gained(b, gains), make("T", pair[1])))
        if k == 1:  # a number in front of a factor stands in front of the sums, of which there are fewer
            scalar, w = scaled(w)
            return make("row_dot", u, w) if scalar is None else make("mul", scalar, make("row_dot", u, w))
        return make("matmul", _in_blocks(u, k), make("T", _in_blocks(w, k)))
    return None


def _of_product(a: Expr, b: Expr, k: int, gains: Expr | None) -> Expr | None:
    left, right = a.args
    if left.op == "diag":
        d, inner = left.args[0], dots(right, b, k, gains)
        return make("mul", d, inner) if k == 1 else make("matmul", make("diag", _in_blocks(d, k)), inner)
    if right.op == "diag":
        return dots(left, b, k, right.args[0] if gains is None else make("mul", gains, right.args[0]))
    if (blocks := _left_blocks(left)) is not None and k in (1, blocks.shape[1]):
        # (Q x) bᵀ = Q (x bᵀ) on each block; of its diagonal alone, Σ Q (b xᵀ) over each row
        if k > 1:
            return make("matmul", blocks, dots(right, b, k, gains))
        rows = make("row_dot", blocks, dots(b, right, known(blocks.shape[1]), gains))
        return make("reshape", rows, data=right.shape[:1])
    if gains is None and b.op == "matmul" and right is b.args[1] and is_orthogonal(right):
        return dots(left, b.args[0], k)
    # (x + U V) y = x y + U V y too, though not for whoever asks `spread`: only here are thin terms cheap by themselves
    if (apart := spread(a) or _spread(a, lambda term: factors(term) is not None)) is not None:
        return dots(apart, apart if a is b else b, k, gains)
    return None


def _left_blocks(node: Expr) -> Expr | None:
    """The stack of square blocks, of more than one entry, that a matrix of a known size consists of."""
    if isinstance(node.shape[0], Dim):
        return None
    if node.op == "block_diag" and 1 != node.args[0].shape[1] == node.args[0].shape[2]:
        return node.args[0]
    if node.op == "kron" and node.args[0].op == "eye" and 1 != node.args[1].shape[0] == node.args[1].shape[1]:
        count, block = node.args[0].shape[0], node.args[1]
        return make("reshape", make("kron", fill(1, (count, 1)), block), data=(count, *block.shape))
    return None


def _in_blocks(a: Expr, k: int) -> Expr:
    return make("reshape", a, data=(known(a.shape[0]) // k, k, *a.shape[1:]))


def _added(parts: list[Expr]) -> Expr:
    """Their sum, those over the rows of one matrix as one: c ⟨u, x⟩ + d ⟨u, y⟩ = c ⟨u, x + d/c y⟩, by rows."""
    alike: dict[Expr | int, list[Expr]] = {}
    for i, part in enumerate(map(simplify, parts)):
        scalar, dot = scaled(part)
        is_known = scalar is None or value_of(scalar)
        # what is no such product stays alone, though there may be another one like it
        alike.setdefault(dot.args[0] if dot.op == "row_dot" and is_known else i, []).append(part)
    return total([_joined(each) if len(each) > 1 else each[0] for each in alike.values()], parts[0].shape)


def _joined(parts: list[Expr]) -> Expr:
    factors = [1.0 if scalar is None else value_of(scalar) or 1.0 for scalar, _ in map(scaled, parts)]
    products = [scaled(part)[1].args for part in parts]
    inner = total([times(c / factors[0], other) for c, (_, other) in zip(factors, products)], products[0][1].shape)
    return times(factors[0], make("row_dot", products[0][0], inner))


def _over_root(node: Expr) -> Expr | None:
    a, b = node.args
    below = b.args[0] if b.op == "detach" else b
    if below.op != "root":
        return None
    return make("over_root", a, make("detach", below.args[0]) if below is not b else below.args[0])


def spread(a: Expr) -> Expr | None:
    """(I + L) y = y + L y, and y (I + L) = y + y L."""
    return _spread(a, lambda term: term.op == "eye")


def _spread(a: Expr, is_apart: Callable[[Expr], bool]) -> Expr | None:
    for i, x in enumerate(a.args if a.op == "matmul" else ()):
        terms, y = list(summands(x)), a.args[1 - i]
        if len(terms) > 1 and any(map(is_apart, terms)):
            return total([y if t.op == "eye" else make("matmul", *((y, t) if i else (t, y))) for t in terms], a.shape)
    return None


NORMS = (
    Rule("‖x + y‖² = ‖x‖² + 2 ⟨x, y⟩ + ‖y‖², by rows", "row_norm", _row_norm, "row_norm(A + P @ Q.T)"),
    Rule("the columns of x are the rows of xᵀ", "col_norm", _col_norm, "col_norm(A + P @ Q.T)"),
    Rule("x / √y by one root, without a gradient too", "div", _over_root, "d / row_norm(W + P @ Q.T)"),
    Rule("‖x‖² = Σ of its rows' squares", "norm", _norm, "norm(P @ Q.T)"),
)
