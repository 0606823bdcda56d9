"""Rules that put a cheap form in the place of a costly one: what makes a structured program possible.

Small cores replace large solves (Cayley, the exponential, reflections), low-rank factors replace Hadamard products, and
norms of W + U V are taken from ‖w‖², ⟨w, U V⟩ and ‖U V‖². A rule fires only where the sizes make it cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.expr.dims import Dim
from surgery.expr.ir import Expr
from surgery.expr.primitives import make
from surgery.rewrite.algebra import RULES, simplify
from surgery.rewrite.engine import Rule, rewrite, table
from surgery.rewrite.structure import Factors, factors, is_orthogonal, is_thin, low_rank_turn, opposed
from surgery.rewrite.terms import eye, scaled, summands, times, total, value_of


def _by_core(core: str) -> Callable[[Expr], Expr | None]:
    """f(U V) = I + U core(V U) V, with U L⁻ᵀ and Lᵀ V in the place of U and V: whatever L is, the value and the gradient are the
    same, and with nearly orthonormal columns in front the core is well conditioned and nothing cancels."""
    def change(node: Expr) -> Expr | None:
        if (found := _centred(node.args[0]) or factors(node.args[0])) is None:
            return None
        frame = make("frame", found[0])
        u, v = make("framed", found[0], frame), make("matmul", make("T", frame), found[1])
        small = make(core, make("matmul", v, u))
        return make("add", eye(node.shape), make("matmul", u, make("matmul", small, v)))

    return change


def _centred(node: Expr) -> Factors | None:
    """x yᵀ - y xᵀ = ((x - y) (x + y)ᵀ - (x + y) (x - y)ᵀ) / 2, which is exact where x = y and cancels less near it."""
    terms = list(summands(node))
    if len(terms) != 2 or factors(node) is None or not opposed(*terms):
        return None
    scalar, product = scaled(terms[0])
    if (pair := factors(product)) is None:
        return None
    x, y = pair[0], simplify(make("T", pair[1]))
    less, more = simplify(make("sub", x, y)), simplify(make("add", x, y))
    half = 0.5 if scalar is None else 0.5 * value_of(scalar)
    columns = make("side_by_side", less, times(-1, more))
    return times(half, columns), make("T", make("side_by_side", more, less))


def _reflect(node: Expr) -> Expr | None:
    mirrors = node.args[0]
    if not is_thin(mirrors.shape[1], mirrors.shape[0]):
        return None
    return make("add", eye(node.shape), times(-2, make("matmul", mirrors, make("mirrored", mirrors))))


def _turned_mirrors(node: Expr) -> Expr | None:
    inner = node.args[0]
    return make("reflect", make("reversed", inner.args[0])) if inner.op == "reflect" else None


def _mirrors_in_a_row(node: Expr) -> Expr | None:
    a, b = node.args
    if not a.op == b.op == "reflect" or not is_thin(a.args[0].shape[1] + b.args[0].shape[1], a.shape[0]):
        return None
    return make("reflect", make("side_by_side", a.args[0], b.args[0]))


def _associate(node: Expr) -> Expr | None:
    """The cheaper of (x y) z and x (y z)."""
    a, b = node.args
    if any(len(m.shape) != 2 for m in (a, b, *a.args, *b.args)):
        return None
    better = None
    if a.op == "matmul":
        better = make("matmul", a.args[0], make("matmul", a.args[1], b))
    elif b.op == "matmul":
        better = make("matmul", make("matmul", a, b.args[0]), b.args[1])
    return better if better is not None and _work(better) < _work(node) else None


def _work(node: Expr) -> float:
    """Multiplications of a product whose factors may be products (unknown sizes are left alone; a diagonal is cheap)."""
    if node.op != "matmul" or any(isinstance(size, Dim) for a in node.args for size in a.shape):
        return 0
    left, right = node.args
    inner = 1 if "diag" in (left.op, right.op) else left.shape[1]
    return _work(left) + _work(right) + left.shape[0] * inner * right.shape[1]


def _turn_pair(node: Expr) -> Expr | None:
    """One low-rank update in the place of two: fewer passes over the activations."""
    turns = [low_rank_turn(a) if len(a.shape) == 2 else None for a in node.args]
    if None in turns:
        return None
    (u, v), (p, q) = turns
    if not is_thin(u.shape[1] + p.shape[1], node.shape[0]):
        return None
    upper = make("add", v, make("matmul", make("matmul", v, p), q))
    rows = make("T", make("side_by_side", make("T", upper), make("T", q)))
    return make("add", eye(node.shape), make("matmul", make("side_by_side", u, p), rows))


def _hadamard(node: Expr) -> Expr | None:
    found = factors(node) if len(node.shape) == 2 and all(len(a.shape) == 2 for a in node.args) else None
    return found and make("matmul", *found)


def _mixed_rows(node: Expr) -> Expr | None:
    a, b = node.args
    if b.op == "T" and len(a.shape) == 2:  # x yᵀ = (y xᵀ)ᵀ
        found = _of_best(b.args[0], make("T", a))
        return found and make("T", found)
    return _of_best(a, b)


def _of_best(a: Expr, b: Expr) -> Expr | None:
    """Of the rows of a matrix only those that have a weight, where they are few."""
    fits = a.op == "top_softmax" and len(b.shape) == 2 and is_thin(a.data[0], b.shape[0])
    return make("top_mix", a.args[0], b, data=a.data) if fits else None


def _scaled_circulant(node: Expr) -> Expr | None:
    scalar, inner = scaled(node)
    return make("circulant", make("mul", scalar, inner.args[0])) if scalar is not None and inner.op == "circulant" else None


# ---------------------------------------------------------------------------------------------------- norms


def _row_norm(node: Expr) -> Expr | None:
    inner = node.args[0]
    if len(inner.shape) != 2 or not _pays(inner):
        return None
    return make("root", row_dot(inner, inner))


def _col_norm(node: Expr) -> Expr | None:
    return make("row_norm", make("T", node.args[0])) if len(node.shape) == 1 and _pays(node.args[0]) else None


def _norm(node: Expr) -> Expr | None:
    inner = node.args[0]
    return make("root", make("total", row_dot(inner, inner))) if len(inner.shape) == 2 and _pays(inner) else None


def _pays(node: Expr) -> bool:
    """Whether a norm is cheaper in parts: something in it is low-rank or turned, and it is not a leaf already."""
    return any(factors(t) is not None or t.op == "matmul" for t in summands(node)) or (
        node.op == "mul" and scaled(node)[0] is not None and _pays(scaled(node)[1]))


def row_dot(a: Expr, b: Expr) -> Expr:
    """Σ a b over each row of two matrices, in parts: bilinear over sums, scalings, diagonals and low-rank factors."""
    for x, y in ((a, b), (b, a)):
        if (part := _row_dot_part(x, y)) is not None:
            return part
    return make("row_dot", a, b)


def _row_dot_part(a: Expr, b: Expr) -> Expr | None:
    scalar, rest = scaled(a)
    if scalar is not None:
        return make("mul", scalar, row_dot(rest, b))
    if a.op == "add":
        return _row_dot_sum(a, b)
    if a.op == "matmul" and a.args[0].op == "diag":
        return make("mul", a.args[0].args[0], row_dot(a.args[1], b))
    if a.op == b.op == "matmul" and a.args[1] is b.args[1] and is_orthogonal(a.args[1]):
        return row_dot(a.args[0], b.args[0])
    if (apart := spread(a)) is not None:
        return row_dot(apart, b)
    if (found := factors(a)) is not None:
        u, v = found
        return make("row_dot", u, simplify(make("matmul", b, make("T", v))))
    return None


def _row_dot_sum(a: Expr, b: Expr) -> Expr:
    """‖x + y‖² = ‖x‖² + 2 ⟨x, y⟩ + ‖y‖², and ⟨x + y, b⟩ = ⟨x, b⟩ + ⟨y, b⟩."""
    terms = list(summands(a))
    if a is not b:
        return total([row_dot(t, b) for t in terms], a.shape[:1])
    squares = [row_dot(t, t) for t in terms]
    crossed = [times(2, row_dot(s, t)) for i, s in enumerate(terms) for t in terms[i + 1:]]
    return total(squares + crossed, a.shape[:1])


def spread(a: Expr) -> Expr | None:
    """(I + L) x = x + L x, and x (I + L) = x + x L, for the identity plus a low-rank L."""
    if a.op != "matmul":
        return None
    for side, other in ((0, 1), (1, 0)):
        terms = list(summands(a.args[side]))
        if len(terms) > 1 and terms[0].op == "eye":
            x = a.args[other]
            pair = [make("matmul", t, x) if side == 0 else make("matmul", x, t) for t in terms[1:]]
            return total([x, *pair], a.shape)
    return None


# Before the cheap forms, which would take each factor for itself.
JOINED = (
    Rule("reflect(U)ᵀ = reflect(U reversed)", "T", _turned_mirrors, "reflect(P).T"),
    Rule("reflect(U) reflect(V) = reflect([U, V])", "matmul", _mirrors_in_a_row, "reflect(P) @ reflect(Q)"),
)
CHEAP = (
    Rule("cayley(U V) = I + U (I - V U / 2)⁻¹ V", "cayley", _by_core("resolvent"), "cayley(P @ Q.T - Q @ P.T)"),
    Rule("e^(U V) = I + U φ(V U) V, φ(x) = (e^x - I) x⁻¹", "expm", _by_core("phi"), "expm(P @ Q.T - Q @ P.T)"),
    Rule("reflect(U) = I - 2 U V, V the triangle of UᵀU solved for Uᵀ", "reflect", _reflect, "reflect(P)"),
    Rule("(x y) z = x (y z), whichever is cheaper", "matmul", _associate, "(P @ Q.T) @ P"),
    Rule("(I + U V) (I + P Q) = I + [U, P] [V + (V P) Q; Q]", "matmul", _turn_pair, "reflect(P) @ cayley(P @ Q.T - Q @ P.T)"),
    Rule("(U V) * (P Q) = face(U, P) face(Vᵀ, Qᵀ)ᵀ", "mul", _hadamard, "(p @ q.T) * (q @ p.T)"),
    Rule("top_softmax(x) y = the rows of y at the places of the largest, mixed", "matmul", _mixed_rows, "top_softmax(A, 2) @ B"),
    Rule("c circulant(x) = circulant(c x)", "mul", _scaled_circulant, "g * circulant(S)"),
    Rule("‖x + y‖² = ‖x‖² + 2 ⟨x, y⟩ + ‖y‖², by rows", "row_norm", _row_norm, "row_norm(A + P @ Q.T)"),
    Rule("the columns of x are the rows of xᵀ", "col_norm", _col_norm, "col_norm(A + P @ Q.T)"),
    Rule("‖x‖² = Σ of its rows' squares", "norm", _norm, "norm(P @ Q.T)"),
)
JOINING, LOWERING = table(*RULES, *JOINED), table(*RULES, *CHEAP)


def cheapest(expr: Expr) -> Expr:
    """The expression in the form that the lowering works on."""
    return rewrite(rewrite(simplify(expr), JOINING), LOWERING)


