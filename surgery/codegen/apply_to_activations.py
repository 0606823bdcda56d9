"""How a weight expression acts on activations: x Eᵀ without building E.

Takes an expression in the lowering's normal form and an activation (an `Expr` whose last axis is the operand's); gives
the activation expression. Each row of the table is one identity. Where an expression has no structure it is built in
the set-up and multiplied: the dense fallback.

Activations are expressions over the leaf `x`; `frozen(a)` is the frozen layer's map of `a`, which is called, not read.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from surgery.ir.builders import scaled, selection, summands, times, total
from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import eye, make, operation
from surgery.ir.primitives_fourier import BY_PRODUCTS
from surgery.ir.sizes import Size, known, known_shape
from surgery.rewrite.low_rank import factors, is_thin, low_rank_turn
from surgery.rewrite.normal_form import simplify

_FEW = 8  # of the columns of a structured matrix less than an eighth
_THIN = 16  # columns of blocks in all, beside which zeros cost nothing: the activation is what is read


def turned(expr: Expr) -> Expr:
    """Eᵀ in normal form."""
    return simplify(make("T", expr))


def apply(expr: Expr, a: Expr) -> Expr:
    """a Eᵀ: [..., n] to [..., m] for E [m, n]."""
    if expr.is_large and not expr.has("drop"):  # factor by factor, a shared one would act once for each of its places
        return _dense(expr, a)
    return _APPLY.get(expr.op, _dense)(expr, a)


def _dense(expr: Expr, a: Expr) -> Expr:
    return make("matmul", a, matrix(turned(expr)))


def _frozen(expr: Expr, a: Expr) -> Expr:
    return Expr("frozen", (a,), None, a.shape[:-1] + expr.shape[:1])


def _sum(expr: Expr, a: Expr) -> Expr:
    return make("add", *(apply(term, a) for term in expr.args))


def _product(expr: Expr, a: Expr) -> Expr:
    """a (L R)ᵀ = (a Rᵀ) Lᵀ, unless the product is better made, or a turn of a sum taken in."""
    left, right = expr.args
    shape, sizes = known_shape(expr.shape), [known(prod(factor.shape)) for factor in expr.args]
    is_small = is_thin(min(shape), max(shape)) and prod(shape) <= max(sizes) and min(sizes) <= max(shape)
    if is_small and not expr.has("weight", "drop") and not any(map(_selects, expr.args)):
        # a thin matrix, no larger than a factor, and little work: made once in the set-up, not for every token
        return _dense(expr, a)
    if right.op == "add" and (turn := low_rank_turn(left)) is not None:
        # (I + U V) (p + q) = p + q + U (V p + V q): V meets each term where it is thin, and the sum, an activation as
        # wide as the output, is not kept for V's gradient
        u, v = turn
        inner = [_led_by(v, term, a) for term in summands(right)]
        return make("add", apply(right, a), apply(u, total(inner, inner[0].shape)))
    return apply(left, apply(right, a))


def _selects(expr: Expr) -> bool:
    """Whether it is columns of an identity matrix, or those turned: acting with it moves what is there."""
    return selection(expr.args[0] if expr.op == "T" else expr) is not None


def _moves(expr: Expr) -> bool:
    return _selects(expr) or permutation(expr) is not None


def _led_by(v: Expr, term: Expr, a: Expr) -> Expr:
    """a (V x)ᵀ, V multiplied into the first factor of x; what the other factors give is shared with a xᵀ."""
    scalar, rest = scaled(term)
    if scalar is not None:
        return times(scalar, _led_by(v, rest, a))
    if term.op == "drop":
        return _led_by(v, term.args[0], dropped(term, a))
    if term.op == "matmul":
        return _led_by(v, term.args[0], apply(term.args[1], a))
    return apply(v, apply(term, a)) if term.op == "weight" else _dense(simplify(make("matmul", v, term)), a)


def _scaled(expr: Expr, a: Expr) -> Expr:
    scalar, rest = scaled(expr)
    return _dense(expr, a) if scalar is None else times(scalar, apply(rest, a))


def _turned(expr: Expr, a: Expr) -> Expr:
    inner = expr.args[0]
    if inner.op == "weight":
        return Expr("frozen_back", (a,), None, a.shape[:-1] + expr.shape[:1])
    if (places := selection(inner)) is not None:
        return make("columns", a, places)
    if is_structured(expr):  # rows of a structured matrix: it acts, and what they give is kept
        return make(inner.op, apply(turned(inner.args[0]), a), *inner.args[1:], data=inner.data)
    return make("matmul", a, matrix(inner))  # a transpose is left only at what has no structure


def _drop(expr: Expr, a: Expr) -> Expr:
    return apply(expr.args[0], dropped(expr, a))


def dropped(drop: Expr, a: Expr) -> Expr:
    """a without the entries that a `drop` takes from what it sees."""
    return make("dropout", a, data=drop.data)


def permutation(expr: Expr) -> tuple[Size, int, int, Size] | None:
    """(g, p, q, r) of I[g] ⊗ shuffle(p, q) ⊗ I[r]."""
    if expr.op == "shuffle":
        return (1, *expr.data, 1)
    if expr.op != "kron" or len(expr.shape) != 2:
        return None
    left, right = expr.args
    if left.op == "eye" and (inner := permutation(right)) is not None:
        return left.shape[0] * inner[0], *inner[1:]
    if right.op == "eye" and (inner := permutation(left)) is not None:
        return *inner[:3], inner[3] * right.shape[0]
    return None


def _permuted(expr: Expr, a: Expr) -> Expr:
    return make("swap", a, data=permutation(expr))


def _kron(expr: Expr, a: Expr) -> Expr:
    """x (A ⊗ B)ᵀ: the last axis as a matrix [n, q], B on its rows and A on its columns."""
    if permutation(expr) is not None:
        return _permuted(expr, a)
    left, right = expr.args
    h = make("split", a, data=(left.shape[1], right.shape[1]))  # A ⊗ B itself, [m p, n q], is never made
    before, after = _around(left, right)
    for factor in before:
        h = apply(factor, h)
    if left.op == "literal":
        h = make("mix", h, data=left.data)
    elif left.op != "eye":
        h = make("T", apply(left, make("T", h)))
    for factor in after:
        h = apply(factor, h)
    return make("join", h)


def _around(left: Expr, right: Expr) -> tuple[list[Expr], list[Expr]]:
    """The factors of B that act before A, and those after: A ⊗ U V = (I ⊗ U) (A ⊗ V), and A acts where that is the
    least work, which for a low-rank B is between its factors."""
    pair = factors(right)
    chain = [right] if pair is None else [pair[1], pair[0]]
    (m, n), sizes = known_shape(left.shape), [known_shape(factor.shape) for factor in chain]
    widths = [sizes[0][1], *(rows for rows, _ in sizes)]

    def work(place: int) -> int:
        return widths[place] * n * m + sum((n if i < place else m) * rows * columns
                                           for i, (rows, columns) in enumerate(sizes))

    place = min(range(len(chain), -1, -1), key=work)
    return chain[:place], chain[place:]


def _circulant(expr: Expr, a: Expr) -> Expr:
    """A diagonal matrix between two Fourier transforms: products with their basis or, for large blocks, fast ones."""
    rows = expr.args[0]
    if known(rows.shape[-1]) > BY_PRODUCTS:
        return make("circulate", a, rows)
    basis = make("fourier", data=rows.shape[-1:])
    return make("waves", make("mixed", make("spectrum", a, basis), make("kernel", rows, basis)), basis)


def _blocks(expr: Expr, a: Expr) -> Expr:
    """x block_diag(s)ᵀ block by block; of blocks that are few and narrow as one thin product, zeros and all: it reads x
    once and in order, and is summed into what it is added to."""
    few, many = sorted(known_shape(expr.shape))
    if few <= _THIN and few * _FEW <= many:
        return _dense(expr, a)
    return make("blocks", a, simplify(make("T", expr.args[0])))


def _columns(expr: Expr, a: Expr) -> Expr:
    """x [s_i, s_j, ...]ᵀ for columns of a structured S: the entries of x at their places, and S."""
    if selection(expr) is None and not is_structured(expr):
        return _dense(expr, a)
    places = make("range", data=expr.data) if expr.op == "between" else expr.args[1]
    return apply(expr.args[0], make("placed", a, places, data=expr.args[0].shape[1:]))


def _fill(expr: Expr, a: Expr) -> Expr:
    """x (c 1 1ᵀ)ᵀ, by way of the sum of each row of x."""
    pair = factors(expr)
    return _dense(expr, a) if pair is None else make("matmul", make("matmul", a, turned(pair[1])), turned(pair[0]))


_APPLY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "weight": _frozen,
    "eye": lambda expr, a: a,
    "add": _sum,
    "matmul": _product,
    "mul": _scaled,
    "T": _turned,
    "drop": _drop,
    "kron": _kron,
    "diag": lambda expr, a: make("scale", a, expr.args[0]),
    "block_diag": _blocks,
    "shuffle": _permuted,
    "circulant": _circulant,
    "columns": _columns,
    "between": _columns,
    "fill": _fill,
}


# --------------------------------------------------------------------------------------------------- matrices


def is_structured(expr: Expr) -> bool:
    """Whether acting with it is cheaper than building it."""
    if expr.op == "mul":
        return scaled(expr)[0] is not None and is_structured(scaled(expr)[1])
    if expr.op == "matmul":
        return factors(expr) is not None or all(map(is_structured, expr.args))
    if expr.op == "add":
        return all(map(is_structured, summands(expr)))
    return operation(expr).is_structured or _selects(expr) or _is_cut(expr)


def _is_cut(expr: Expr) -> bool:
    """Some columns or rows of a structured matrix; of few, which are less work than to act with all, it is none."""
    part = expr.args[0] if expr.op == "T" else expr
    if part.op not in ("columns", "between") or known(prod(expr.shape)) * _FEW < known(prod(part.args[0].shape)):
        return False
    return is_structured(turned(part.args[0]) if expr.op == "T" else part.args[0])


def matrix(expr: Expr) -> Expr:
    """E itself, built the cheapest way: a structured factor acts on the rows or columns of the other."""
    if expr.is_large:  # taken apart, a shared part would be made once for each of its places
        return rebuild(expr, lambda node, args: args[0] if operation(node).is_transparent else node.with_args(args))
    if (places := selection(expr)) is not None:  # not from an identity matrix of its rows
        return make("T", make("placed", eye(places.shape[0]), places, data=expr.shape[:1]))
    if expr.op == "matmul" and len(expr.args[0].shape) == len(expr.args[1].shape) == 2:
        left, right = expr.args
        # what only moves entries is never built, whichever the other one is
        if _moves(left) or not _moves(right) and is_structured(left) and factors(expr) is None:
            return make("T", apply(left, make("T", matrix(right))))
        if _moves(right) or is_structured(right) and factors(expr) is None:
            return apply(turned(right), matrix(left))
    if operation(expr).is_transparent:
        return matrix(expr.args[0])
    if expr.op == "T":
        built = matrix(expr.args[0])
        return built.args[0] if built.op == "T" else make("T", built)
    if expr.op in ("add", "mul", "matmul"):
        return expr.with_args(tuple(matrix(a) if len(a.shape) == 2 else a for a in expr.args))
    return expr
