"""The algebra of matrices as rules: constants, identities, transposes, products and sums in one normal form.

The normal form has no `neg` and `sub` (they are scaled sums), transposes only at what cannot be taken apart, scalars in
front of products, and structured products joined (diag · diag, block_diag · block_diag).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from surgery.ir.builders import every, eye, fill, is_zero, scaled, selection, summands, times, total, value_of
from surgery.ir.expression import Expr
from surgery.ir.operations import constant, make, operation
from surgery.ir.table import Orthogonal, Transpose
from surgery.rewrite.contractions import CONTRACTIONS
from surgery.rewrite.diagonal_and_block import SHAPED
from surgery.rewrite.engine import Rule, rewrite, table


def _fold(node: Expr) -> Expr | None:
    values, number = every(map(value_of, node.args)), operation(node).number
    try:
        return None if values is None or number is None else fill(number(*values), node.shape)
    except (ArithmeticError, ValueError):  # the program computes it, and gives what floats give: inf or NaN
        return None


def _moved_zero(node: Expr) -> Expr | None:
    return fill(0, node.shape) if is_zero(node.args[0]) else None


def _moved_number(node: Expr) -> Expr | None:
    value = value_of(node.args[0])
    return None if value is None else fill(value, node.shape)


def _div_by_number(node: Expr) -> Expr | None:
    divisor = value_of(node.args[1])  # by 0 it stays a division, which the program gives inf or NaN for
    return times(1 / divisor, node.args[0]) if divisor and node.args[0].shape == node.shape else None


def _div_by_scalar(node: Expr) -> Expr | None:
    x, scalar = node.args
    # a scalar in front moves out of products and into thin factors, and a divisor is stuck
    return times(make("div", constant(1.0), scalar), x) if x.shape and not scalar.shape else None


def _add_zero(node: Expr) -> Expr | None:
    a, b = node.args
    kept = [x for x, other in ((a, b), (b, a)) if is_zero(other) and x.shape == node.shape]
    return kept[0] if kept else None


def _spread_scalar(node: Expr) -> Expr | None:
    if len(node.shape) != 2 or node.args[0].shape == node.args[1].shape:
        return None
    # c 1 1ᵀ has rank one, so that what follows can keep it in factors
    return make("add", *(a if a.shape else times(a, fill(1, node.shape)) for a in node.args))


def _collect(node: Expr) -> Expr | None:
    """Like terms of a sum: c x + k x = (c + k) x."""
    terms = list(summands(node))
    if any(t.shape != node.shape for t in terms):
        return None
    weights: dict[Expr, float] = {}
    for term in terms:
        scalar, rest = scaled(term)
        factor = 1.0 if scalar is None else value_of(scalar)
        rest, factor = (term, 1.0) if factor is None else (rest, factor)
        weights[rest] = weights.get(rest, 0.0) + factor
    if len(weights) == len(terms):
        return None
    return total([times(w, x) for x, w in weights.items() if w], node.shape)


def _mul_unit(node: Expr) -> Expr | None:
    if any(map(is_zero, node.args)):
        return fill(0, node.shape)
    a, b = node.args
    return next((x for x, other in ((a, b), (b, a)) if value_of(other) == 1 and x.shape == node.shape), None)


def _mul_number(node: Expr) -> Expr:
    a, b = node.args
    if (a.shape and not b.shape) or (a.shape == b.shape and value_of(a) is None and value_of(b) is not None):
        a, b = b, a
    return make("mul", a, b) if value_of(a) is None else times(value_of(a), b)


def _mul_sum(node: Expr) -> Expr | None:
    """Distribute x ∘ (y + c 1) as c x + x ∘ y, so that the constant part needs no entrywise product."""
    for x, other in (node.args, node.args[::-1]):
        terms = list(summands(other))
        numbers = [t for t in terms if value_of(scaled(t)[1]) is not None]
        if len(x.shape) == len(other.shape) == 2 and numbers and len(terms) > 1:
            rest = [t for t in terms if t not in numbers]
            kept = [make("mul", x, total(rest, x.shape))] if rest else []
            multiples = []
            for scalar, ones in map(scaled, numbers):  # c 1, a matrix of one number
                c = constant(value_of(ones)) if scalar is None else times(value_of(ones), scalar)
                multiples.append(times(c, x))
            return total([*multiples, *kept], x.shape)
    return None


def _product_of_identity(node: Expr) -> Expr | None:
    a, b = node.args
    if a.op == "eye" and b.shape[-2:] == node.shape[-2:] or (a.op == "eye" and len(b.shape) == 1):
        return b if b.shape == node.shape else None
    return a if b.op == "eye" and a.shape == node.shape else None


def _product_of_zero(node: Expr) -> Expr | None:
    return fill(0, node.shape) if any(map(is_zero, node.args)) else None


def _scalar_out_of_product(node: Expr) -> Expr | None:
    (p, a), (q, b) = map(scaled, node.args)
    if p is None and q is None:
        return None
    product = make(node.op, a, b)
    for scalar in (q, p):
        product = product if scalar is None else times(scalar, product)
    return product


def _orthogonal_pair(node: Expr) -> Expr | None:
    a, b = node.args
    return eye(node.shape) if is_orthogonal(a) and transposed(a) is b else None


def _as_columns(node: Expr) -> Expr:
    a, places = node.args
    return make("T", make("columns", make("T", a), places))


def _selected(node: Expr) -> Expr | None:
    """A product with columns of I selects those of the other factor."""
    a, b = node.args
    if (places := selection(b)) is not None and len(a.shape) > 1:
        return make("columns", a, places)
    if a.op == "T" and (places := selection(a.args[0])) is not None and len(b.shape) > 1:
        return make("T", make("columns", make("T", b), places))
    return None


def _as_neighbours(node: Expr) -> Expr:
    return make("T", make("side_by_side", *(make("T", a) for a in node.args)))


def _turned_back(node: Expr) -> Expr | None:
    return make("T", node.args[0]) if is_orthogonal(node.args[0]) else None


def _inside(node: Expr) -> Expr | None:
    """The inverse of a structured map is that of its parts, where each has one."""
    inner = node.args[0]
    if inner.op not in ("block_diag", "kron") or any(a.shape[-1] != a.shape[-2] for a in inner.args):
        return None
    return make(inner.op, *(make("inverse", a) for a in inner.args))


def _joined(inner: str, op: str) -> Callable[[Expr], Expr | None]:
    """f(a) f(b) = f(a op b) for a structured f."""
    def join(node: Expr) -> Expr | None:
        a, b = node.args
        fits = a.op == b.op == inner and a.args[0].shape == b.args[0].shape
        return make(inner, make(op, a.args[0], b.args[0])) if fits else None

    return join


def _kron_pair(node: Expr) -> Expr | None:
    a, b = node.args
    if not a.op == b.op == "kron" or any(x.shape[1] != y.shape[0] for x, y in zip(a.args, b.args)):
        return None
    return make("kron", make("matmul", a.args[0], b.args[0]), make("matmul", a.args[1], b.args[1]))


def _turn(node: Expr) -> Expr | None:
    """(f(x, y))ᵀ for the f that a transpose passes through."""
    inner = node.args[0]
    if inner.op in ("diag", "eye"):
        return inner
    if inner.op == "T":
        return inner.args[0]
    if inner.op == "shuffle":
        return make("shuffle", data=inner.data[::-1])
    if inner.op == "literal":
        return make("literal", data=tuple(zip(*inner.data)))
    if inner.op == "matmul":
        a, b = inner.args
        # of a stack times a vector there is no product the other way round
        return make("matmul", make("T", b), make("T", a)) if len(a.shape) > 1 and len(b.shape) > 1 else None
    if operation(inner).transpose is Transpose.INSIDE:
        return make(inner.op, *(make("T", a) if a.shape else a for a in inner.args))
    return Expr("drop", (make("T", inner.args[0]),), inner.data, node.shape) if inner.op == "drop" else None


def _of_zero(result: Callable[[Expr], Expr]) -> Callable[[Expr], Expr | None]:
    return lambda node: result(node) if value_of(node.args[0]) == 0 else None


def _skew_of_zero(node: Expr) -> Expr | None:
    return fill(0, node.shape) if node.args[0].op in ("fill", "eye", "diag") else None


def _turned_skew(node: Expr) -> Expr | None:
    """skew(x)ᵀ as skew(xᵀ), a view of x, instead of a pass over the result."""
    inner = node.args[0]
    if inner.op == "skew":
        return make("skew", make("T", inner.args[0]))
    return times(-1, inner) if is_skew(inner) else None


# For each operation they are tried in this order, so that numbers are computed before anything is moved.
RULES = (
    *(Rule("f(0, 0, ...) = 0 for what moves entries", op, _moved_zero, example, drops=True) for op, example in {
        "neg": "-(0 * A)", "scatter": "scatter(0 * d, at, n, n)",
        "take": "take(0 * A, at)", "circulant": "circulant(0 * S)", "ifft2": "ifft2(0 * A)"}.items()),
    *(Rule("the entries of c 1 are all c", op, _moved_number, example, drops=True) for op, example in {
        "reshape": "reshape(ones(n, n), n * n)", "T": "(0 * A).T"}.items()),
    Rule("x - 0 = x", "sub", lambda n: n.args[0] if is_zero(n.args[1]) and n.args[0].shape == n.shape else None,
         "A - 0 * B", drops=True),
    Rule("-x = -1 x", "neg", lambda n: times(-1, n.args[0]), "-A"),
    Rule("x - y = x + -1 y", "sub", lambda n: make("add", n.args[0], times(-1, n.args[1])), "A - B"),
    Rule("the rows of both = [xᵀ, yᵀ]ᵀ", "stacked", _as_neighbours, "stacked(A, B)"),
    Rule("the rows of x = the columns of xᵀ, turned", "rows", _as_columns, "rows(A, at)"),
    Rule("x [e_i, e_j, ...] = the columns i, j, ... of x", "matmul", _selected, "A @ columns(I(n), at)"),
    *(Rule("numbers are computed", op, _fold, example) for op, example in {
        "add": "2 + 0 * g", "mul": "2 * (3 + 0 * g)", "div": "(3 + 0 * g) / 4", "min": "min(2, 3 + 0 * g)",
        "max": "max(2, 3 + 0 * g)", "exp": "exp(3 + 0 * g)", "sqrt": "sqrt(3 + 0 * g)", "abs": "abs(-3 + 0 * g)",
        "cos": "cos(3 + 0 * g)", "sin": "sin(3 + 0 * g)",
        "tanh": "tanh(3 + 0 * g)", "sigmoid": "sigmoid(3 + 0 * g)", "relu": "relu(3 + 0 * g)",
        "sign": "sign(3 + 0 * g)", "clamp": "clamp(3 + 0 * g, 0, 1)", "detach": "detach(3 + 0 * g)"}.items()),
    Rule("x / c = 1/c x", "div", _div_by_number, "A / 3"),
    Rule("x / c = 1/c x for a scalar c that is computed", "div", _div_by_scalar, "A / norm(B)"),
    Rule("x + 0 = x", "add", _add_zero, "A + 0 * B", drops=True),
    Rule("x + c = x + c 1", "add", _spread_scalar, "A + norm(B)"),
    Rule("c x + k x = (c + k) x", "add", _collect, "2 * A + B - A", rounds=True),
    Rule("0 x = 0, 1 x = x", "mul", _mul_unit, "(0 * A) * B", drops=True),
    Rule("c (k x) = (c k) x, x c = c x", "mul", _mul_number, "2 * (3 * A)"),
    Rule("x (y + c 1) = c x + x y, entry by entry", "mul", _mul_sum, "A * (1 + B)"),
    Rule("I x = x = x I", "matmul", _product_of_identity, "I(n) @ A", drops=True),
    Rule("0 x = 0", "matmul", _product_of_zero, "(0 * A) @ B", drops=True),
    Rule("0 ⊗ x = 0", "kron", _product_of_zero, "kron(0 * K, L)", drops=True),
    Rule("(c x) y = c (x y)", "matmul", _scalar_out_of_product, "(2 * A) @ B"),
    Rule("R Rᵀ = I for an orthogonal R", "matmul", _orthogonal_pair, "expm(skew(A)).T @ expm(skew(A))", rounds=True),
    Rule("diag(d) diag(e) = diag(d e)", "matmul", _joined("diag", "mul"), "diag(d) @ diag(e)"),
    Rule("block_diag(s) block_diag(t) = block_diag(s t)", "matmul", _joined("block_diag", "matmul"),
         "block_diag(S) @ block_diag(Z)"),
    Rule("(a ⊗ b) (c ⊗ d) = a c ⊗ b d", "matmul", _kron_pair, "kron(K, L) @ kron(K, L)"),
    Rule("(c x) ⊗ y = c (x ⊗ y)", "kron", _scalar_out_of_product, "kron(2 * K, L)"),
    Rule("skew(x)ᵀ = skew(xᵀ), and kᵀ = -k for another skew k", "T", _turned_skew, "skew(A).T"),
    Rule("(x y)ᵀ = yᵀ xᵀ, f(x)ᵀ = f(xᵀ)", "T", _turn, "(A @ B).T"),
    Rule("skew(x) = 0 for a symmetric constant", "skew", _skew_of_zero, "skew(0 * A)", drops=True),
    Rule("shuffle(1, n) = shuffle(n, 1) = I", "shuffle", lambda n: eye(n.shape) if 1 in n.data else None,
         "shuffle(1, 3)"),
    Rule("cayley(0) = I", "cayley", _of_zero(lambda n: eye(n.shape)), "cayley(0 * A)", drops=True),
    Rule("nothing dropped of 0", "drop", _of_zero(lambda n: n.args[0]), "N", drops=True),
    Rule("e^0 = I", "expm", _of_zero(lambda n: eye(n.shape)), "expm(0 * A)", drops=True),
    Rule("R⁻¹ = Rᵀ for an orthogonal R", "inverse", _turned_back, "inverse(expm(skew(A)))", rounds=True),
    Rule("(x ⊗ y)⁻¹ = x⁻¹ ⊗ y⁻¹, and of blocks along a diagonal", "inverse", _inside, "inverse(block_diag(S))"),
    *SHAPED,
    *CONTRACTIONS,
)
ALGEBRA = table(*RULES)


@lru_cache(maxsize=4096)
def simplify(expr: Expr) -> Expr:
    """The normal form of an expression."""
    return rewrite(expr, ALGEBRA)


def is_skew(node: Expr) -> bool:
    """xᵀ = -x, for a matrix or each of a stack."""
    if node.op == "skew":
        return True
    scalar, rest = scaled(node)
    if scalar is not None:
        return is_skew(rest)
    if node.op == "block_diag":
        return is_skew(node.args[0])
    terms = list(summands(node))
    return len(node.shape) > 1 and len(terms) == 2 and all(t.shape == node.shape for t in terms) and opposed(*terms)


def opposed(a: Expr, b: Expr) -> bool:
    """a = -bᵀ."""
    (p, left), (q, right) = scaled(a), scaled(b)
    values = every(1.0 if s is None else value_of(s) for s in (p, q))
    return values is not None and values[0] == -values[1] and transposed(left) is right


def transposed(node: Expr) -> Expr:
    """xᵀ in normal form."""
    return simplify(make("T", node))


@lru_cache(maxsize=4096)
def is_orthogonal(node: Expr) -> bool:
    """x xᵀ = I, for a matrix or each of a stack."""
    known = operation(node).orthogonal
    if known is Orthogonal.OF_SKEW:
        return is_skew(node.args[0])
    return known is Orthogonal.ALWAYS or known is Orthogonal.OF_ORTHOGONAL and all(map(is_orthogonal, node.args))
