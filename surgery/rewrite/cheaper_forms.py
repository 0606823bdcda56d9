"""Rules that put a cheap form in the place of a costly one: what makes a structured program possible.

Small cores replace large solves (Cayley, the exponential, reflections), low-rank factors replace Hadamard products, and
norms of W + U V are taken from ‖w‖², ⟨w, U V⟩ and ‖U V‖². A rule fires only where the sizes make it cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, reduce
from math import prod

from surgery.ir.builders import every, eye, fill, scaled, selection, summands, times, total, value_of
from surgery.ir.expression import Exhausted, Expr, Shape, at_most, walk
from surgery.ir.operations import make
from surgery.ir.sizes import Dim, known
from surgery.rewrite.engine import Rule, rewrite, table
from surgery.rewrite.low_rank import Factors, factors, is_thin, low_rank_turn, stacked_rows
from surgery.rewrite.normal_form import RULES, opposed, simplify
from surgery.rewrite.norms import NORMS


def _by_core(core: Callable[[Expr, Expr], Expr]) -> Callable[[Expr], Expr | None]:
    """f(U V) = I + U core(V, U) V. It is as exact as U V itself, however its columns lie and whatever their lengths."""
    def change(node: Expr) -> Expr | None:
        if (pair := _skew_pair(node.args[0]) or factors(node.args[0])) is None:
            return None
        u, v = _balanced(*pair)
        return make("add", eye(node.shape), make("matmul", u, make("matmul", core(v, u), v)))

    return change


def _balanced(u: Expr, v: Expr) -> Factors:
    """U T and T⁻¹ V, whose product is U V: V U may be small where U or V is large, and then its powers, of which an
    exponential is made, cancel; of an endless column beside one that is nearly nothing it has entries without end."""
    rows = make("T", v)
    return make("scale", u, make("balance", u, rows)), make("T", make("scale", rows, make("balance", rows, u)))


def _skew_pair(node: Expr) -> Factors | None:
    """(U, V) of a thin skew c (q pᵀ - p qᵀ), [p, q] the columns of `_thin_skew`."""
    if (found := _thin_skew(node)) is None:
        return None
    value, columns = found
    p, q = _halves(columns)
    return times(value, columns), make("T", make("side_by_side", times(-1, q), p))


def _thin_skew(node: Expr) -> tuple[float, Expr] | None:
    """(c, [p, q]) of c (q pᵀ - p qᵀ), made of a low-rank x yᵀ - y xᵀ as (y / t + x t) (y / t - x t)ᵀ / 2 and that
    turned. Where x = y it is exactly 0, and cancels less near it; t makes their columns alike in length, or p and q
    would be the longer one, rounded."""
    front, bare = scaled(node)
    terms = list(summands(bare))
    if len(terms) != 2 or factors(bare) is None or not opposed(*terms):
        return None
    scalar, product = scaled(terms[0])
    if (pair := factors(product)) is None:
        return None
    value = 1.0 if scalar is None else value_of(scalar)
    assert value is not None  # `opposed` compared it
    x, y = pair[0], simplify(make("T", pair[1]))
    columns = make("centred", x, y, make("balance", x, y))
    number = 1.0 if front is None else value_of(front)
    if number is not None:
        return 0.5 * value * number, columns
    p, q = _halves(columns)
    return 0.5 * value, make("side_by_side", p, times(front, q))


def _halves(columns: Expr) -> tuple[Expr, Expr]:
    r = known(columns.shape[1]) // 2
    return make("between", columns, data=(0, r)), make("between", columns, data=(r, 2 * r))


def _turn_of_thin_skew(node: Expr) -> Expr | None:
    """q pᵀ - p qᵀ is -U J Uᵀ for U = [p, q]: one matrix and not two."""
    if (found := _thin_skew(node.args[0])) is None:
        return None
    value, columns = found
    core = make("skew_core", columns, data=(-value,))
    return make("add", eye(node.shape), make("matmul", columns, make("matmul", core, make("T", columns))))


def _inverse(node: Expr) -> Expr | None:
    if (turn := low_rank_turn(node.args[0])) is None:
        return None
    u, v = _balanced(*turn)
    small = make("resolvent", times(-2, make("matmul", v, u)))  # the resolvent of m is (I - m / 2)⁻¹
    return make("add", eye(node.shape), times(-1, make("matmul", u, make("matmul", small, v))))


def _rotation(node: Expr) -> Expr | None:
    return make("rotation", node.args[0].args[0]) if node.args[0].op == "skew" else None


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
    # A gain between two thin factors goes to the one that acts last: it may be large where that is small, and what the
    # first gives would be without end in float16.
    if a.op == "matmul" and _is_gain_within(a.args[1], node):
        return None
    if b.op == "matmul" and _is_gain_within(b.args[0], node):
        return make("matmul", make("matmul", a, b.args[0]), b.args[1])
    ways = [make("matmul", a.args[0], make("matmul", a.args[1], b))] if a.op == "matmul" else []
    ways += [make("matmul", make("matmul", a, b.args[0]), b.args[1])] if b.op == "matmul" else []
    better = min(ways, key=_work, default=node)
    return better if _work(better) < _work(node) else None


def _is_gain_within(factor: Expr, product: Expr) -> bool:
    return factor.op == "diag" and is_thin(factor.shape[0], *product.shape)


@lru_cache(maxsize=4096)
def _work(node: Expr) -> float:
    """Count the multiplications of a product whose factors may be products (unknown sizes count as 0; a diagonal, or
    places, are cheap)."""
    if node.op != "matmul" or any(isinstance(size, Dim) for a in node.args for size in a.shape):
        return 0
    left, right = node.args
    is_light = "diag" in (left.op, right.op) or selection(left) or right.op == "T" and selection(right.args[0])
    inner = 1 if is_light else known(left.shape[1])
    return _work(left) + _work(right) + known(left.shape[0]) * inner * known(right.shape[1])


def _turn_pair(node: Expr) -> Expr | None:
    """Combine two low-rank updates into one: fewer passes over the activations."""
    turns = every(map(low_rank_turn, node.args))
    if turns is None:
        return None
    (u, v), (p, q) = turns
    if not is_thin(u.shape[1] + p.shape[1], node.shape[0]):
        return None
    upper = make("add", v, make("matmul", make("matmul", v, p), q))
    return make("add", eye(node.shape), make("matmul", make("side_by_side", u, p), stacked_rows(upper, q)))


def _skew(node: Expr) -> Expr | None:
    inner = node.args[0]
    if factors(inner) is None:
        return None
    # of rank 2 r, which `factors` sees in a sum and not through `skew`
    return make("add", inner, times(-1, simplify(make("T", inner))))


def _apart(node: Expr) -> Expr | None:
    """Distribute a thin factor over a sum in which a term has structure, or is the weight, which is then called and not
    read."""
    for i, x in enumerate(node.args):
        thin, terms = node.args[1 - i], list(summands(x))
        fits = len(thin.shape) == 2 and len(terms) > 1 and all(len(t.shape) == 2 for t in terms)
        if not fits or not is_thin(node.shape[1 - i], *x.shape) or not any(map(_is_cheap, terms)):
            continue
        # one that is as large as the weight in it, or low-rank itself, is no factor but an operand
        weights = (each for each in walk(thin) if each.op == "weight")
        is_operand = factors(thin) is not None or any(
            known(prod(thin.shape)) >= known(prod(each.shape)) for each in weights)
        if not is_operand:
            return total([make("matmul", *((thin, t) if i else (t, thin))) for t in terms], node.shape)
    return None


def _is_cheap(term: Expr) -> bool:
    """True if a product with this term is cheaper than one with a general matrix."""
    rest = scaled(term)[1]
    return rest.op in ("eye", "diag", "block_diag", "weight") or factors(rest) is not None


def _scaled_sum(node: Expr) -> Expr | None:
    """Distribute a scalar over terms with structure, which absorb it: c (I + U V) = c I + (c U) V."""
    scalar, inner = scaled(node)
    terms = list(summands(inner))
    if scalar is None or len(terms) < 2 or not any(scaled(t)[1].op in ("eye", "diag", "block_diag") for t in terms):
        return None
    return simplify(total([times(scalar, t) for t in terms], node.shape))


def _ones_in_a_row(node: Expr) -> Expr | None:
    """Write a constant matrix in a product as its two vectors."""
    for i, a in enumerate(node.args):
        if a.op == "fill" and len(node.args[1 - i].shape) == 2 and (pair := factors(a)) is not None:
            (u, v), (left, right) = pair, node.args
            return make("matmul", make("matmul", left, u), v) if i else make("matmul", u, make("matmul", v, right))
    return None


def _neighbours(node: Expr) -> Expr | None:
    # of tensors and constants alone, which have no factors of their own, there is nothing to join
    pair = None if all(a.op == "fill" or factors(a) is None for a in node.args) else factors(node)
    return pair and make("matmul", *pair)


def _detached(node: Expr) -> Expr | None:
    inner = node.args[0]
    if factors(inner) is None or inner.op not in ("matmul", "add", "mul"):
        return None
    return make(inner.op, *(make("detach", a) for a in inner.args))  # so that its factors are seen


def _gains(node: Expr) -> Expr | None:
    """W ∘ u vᵀ is a gain for each row and each column of W."""
    for x, y in (node.args, node.args[::-1]):
        pair = factors(y) if len(x.shape) == len(y.shape) == 2 else None
        is_called = x.op in ("weight", "circulant", "block_diag", "kron") or x.op == "T" and x.args[0].op == "weight"
        if pair is not None and pair[0].shape[1] == 1 and is_called:
            # what is not made to be multiplied by activations gains nothing: its entries are multiplied where they lie
            rows, columns = (make("diag", make("reshape", f, data=(size,))) for f, size in zip(pair, node.shape))
            return make("matmul", rows, make("matmul", x, columns))
    return None


def _thin_blocks(node: Expr) -> Expr | None:
    """Blocks that are thin products, or a sum of those and of diagonals: the products of all are one."""
    terms = list(map(scaled, summands(node.args[0])))
    flat = [(scalar, _unstacked(each, node.shape)) for scalar, each in terms]
    low = [each if scalar is None else times(scalar, each) for scalar, each in terms if each.op == "matmul"]
    pairs = every(_thin_stacks(term) for term in low)
    if not pairs or len(low) + sum(each is not None for _, each in flat) < len(terms):
        return None
    product = _product_of_blocks(pairs)
    rest = [each if scalar is None else times(scalar, each) for scalar, each in flat if each is not None]
    return product and total([*rest, product], node.shape)


def _thin_blocks_in_a_sum(node: Expr) -> Expr | None:
    """Thin products of blocks of one size as one."""
    terms = list(summands(node))
    alike: dict[Shape, list[Expr]] = {}
    for term in terms:
        _, rest = scaled(term)
        if rest.op == "matmul" and all(a.op == "block_diag" for a in rest.args):
            u, v = (a.args[0].shape for a in rest.args)
            if u[0] == v[0]:  # else the blocks of the one are not those of the other
                alike.setdefault((*u[:2], v[2]), []).append(term)
    for group in alike.values():
        stacks = (times(scaled(term)[0] or 1.0, make("matmul", *(a.args[0] for a in scaled(term)[1].args)))
                  for term in group)
        pairs = every(map(_thin_stacks, stacks)) if len(group) > 1 else None
        if pairs and (product := _product_of_blocks(pairs)) is not None:
            return total([*(term for term in terms if term not in group), product], node.shape)
    return None


def _product_of_blocks(pairs: list[Factors]) -> Expr | None:
    """Σ U V of stacks as block_diag([U, P, ...]) block_diag([V; Q; ...]), if that is thin."""
    u = reduce(partial(make, "side_by_side"), (u for u, _ in pairs))
    v = make("T", reduce(partial(make, "side_by_side"), (simplify(make("T", v)) for _, v in pairs)))
    is_thin_for_all = is_thin(u.shape[2], u.shape[1], v.shape[2])
    return make("matmul", make("block_diag", u), make("block_diag", simplify(v))) if is_thin_for_all else None


def _thin_stacks(term: Expr) -> Factors | None:
    """(U, V) of a stack of products c U V."""
    scalar, product = scaled(term)
    if any(len(a.shape) != 3 for a in product.args):
        return None
    u, v = product.args
    return (u if scalar is None else times(scalar, u)), v


def _unstacked(blocks: Expr, shape: Shape) -> Expr | None:
    """A stack of identities or of diagonal matrices as one diagonal matrix; None for any other."""
    if blocks.op == "eye":
        return eye(shape)
    return make("diag", make("reshape", blocks.args[0], data=shape[:1])) if blocks.op == "diag" else None


def _few_places(node: Expr) -> Expr | None:
    """In a product or a sum, a matrix of zeros but at no more places than it has rows and columns: it reads columns and
    adds to columns."""
    changed = tuple(_one_by_one(a) for a in node.args)
    return None if changed == node.args else make(node.op, *changed)


def _one_by_one(term: Expr) -> Expr:
    scalar, rest = scaled(term)
    sparse = rest.args[0] if rest.op == "T" else rest
    if sparse.op != "scatter" or not is_thin(sparse.args[0].shape[0], *(2 * side for side in sparse.shape)):
        return term
    values, places = sparse.args
    rows, columns = (make("columns", eye((side, side)), make(of, places, data=sparse.shape))
                     for of, side in zip(("row_of", "column_of"), sparse.shape))
    first, last = (columns, rows) if sparse is not rest else (rows, columns)
    return make("matmul", first, make("matmul", make("diag", values if scalar is None else times(scalar, values)),
                                      make("T", last)))


def _over_places(node: Expr) -> Expr | None:
    """Distribute a matrix over a sum whose terms all begin (or end) with a selection: each takes columns of it, and no
    product with a matrix of zeros and ones is made."""
    left, right = node.args
    if len(left.shape) != 2 or len(right.shape) != 2:
        return None
    first, last = (list(summands(each)) for each in (right, left))
    if len(first) > 1 and left.op != "weight" and all(map(_begins_with_places, first)):
        return total([make("matmul", left, term) for term in first], node.shape)
    if len(last) > 1 and right.op != "weight" and all(map(_ends_with_places, last)):
        return total([make("matmul", term, right) for term in last], node.shape)
    return None


def _begins_with_places(term: Expr) -> bool:
    while term.op == "matmul":
        term = term.args[0]
    return selection(term) is not None


def _ends_with_places(term: Expr) -> bool:
    while term.op == "matmul":
        term = term.args[1]
    return term.op == "T" and selection(term.args[0]) is not None


def _columns_of_kron(node: Expr) -> Expr | None:
    """Each is a column of the one factor times a column of the other."""
    inner = node.args[0]
    if inner.op != "kron" or len(inner.shape) != 2:
        return None
    places = node.args[1] if node.op == "columns" else make("range", data=node.data)
    sides = tuple(a.shape[1] for a in inner.args)
    return make("T", make("face", *(make("T", make("columns", a, make(of, places, data=sides)))
                                    for of, a in zip(("row_of", "column_of"), inner.args))))


def _at_places(node: Expr) -> Expr | None:
    for x, sparse in (node.args, node.args[::-1]):
        if sparse.op == "scatter" and x.shape == sparse.shape:
            values, places = sparse.args
            return make("scatter", make("mul", values, make("take", x, places)), places, data=sparse.data)
    return None


def _entries_of_a_product(node: Expr) -> Expr | None:
    inner, places = node.args
    if inner.op != "matmul" or any(len(a.shape) != 2 for a in inner.args) or isinstance(inner.args[1].shape[0], Dim):
        return None
    (x, y), (count,) = inner.args, node.shape
    entries = make("mul", make("columns", make("T", x), make("row_of", places, data=inner.shape)),
                   make("columns", y, make("column_of", places, data=inner.shape)))
    return make("reshape", make("matmul", fill(1, (1, y.shape[0])), entries), data=(count,))


def _hadamard(node: Expr) -> Expr | None:
    pair = factors(node) if len(node.shape) == 2 and all(len(a.shape) == 2 for a in node.args) else None
    return pair and make("matmul", *pair)


def _khatri_rao(node: Expr) -> Expr | None:
    """Multiply before anything is repeated."""
    for a, b in (node.args, node.args[::-1]):
        if a.op == b.op == "kron" and len(node.shape) == 2:
            (ones, x), (y, others) = a.args, b.args
            # x once for each column of y, and a column of y once for each of x
            fits = ones.shape == (1, y.shape[1]) and others.shape == (1, x.shape[1])
            if fits and value_of(ones) == value_of(others) == 1:
                return make("face", y, x)
    return None


def _khatri_rao_turned(node: Expr) -> Expr | None:
    kinds = {a.op for a in node.args}
    product = _khatri_rao(simplify(make("T", node))) if kinds == {"kron"} and len(node.shape) == 2 else None
    return product and make("T", product)


def _mixed_rows(node: Expr) -> Expr | None:
    a, b = node.args
    if b.op == "T" and len(a.shape) == 2:  # x yᵀ = (y xᵀ)ᵀ
        mixed = _of_best(b.args[0], make("T", a))
        return mixed and make("T", mixed)
    return _of_best(a, b)


def _of_best(a: Expr, b: Expr) -> Expr | None:
    """Read only the rows of a matrix that have a weight, where they are few."""
    fits = a.op == "top_softmax" and len(b.shape) == 2 and is_thin(a.data[0], b.shape[0])
    return make("top_mix", a.args[0], b, data=a.data) if fits else None


def _scaled_circulant(node: Expr) -> Expr | None:
    scalar, inner = scaled(node)
    if scalar is None or inner.op != "circulant":
        return None
    return make("circulant", make("mul", scalar, inner.args[0]))


# Before the cheap forms, which would take each factor for itself.
JOINED = (
    Rule("reflect(U)ᵀ = reflect(U reversed)", "T", _turned_mirrors, "reflect(P).T"),
    Rule("reflect(U) reflect(V) = reflect([U, V])", "matmul", _mirrors_in_a_row, "reflect(P) @ reflect(Q)"),
)
CHEAP = (
    Rule("cayley(c (x yᵀ - y xᵀ)) = I - U (J / c + Uᵀ U / 2)⁻¹ Uᵀ, J small and skew", "cayley", _turn_of_thin_skew,
         "cayley(3 * P @ Q.T - 3 * Q @ P.T)"),
    Rule("cayley(U V) = I + U (I - V U / 2)⁻¹ V", "cayley",
         _by_core(lambda v, u: make("resolvent", make("matmul", v, u))), "cayley(P @ Q.T)"),
    Rule("cayley(x - xᵀ) by one solve", "cayley", _rotation, "cayley(skew(A))"),
    Rule("e^(U V) = I + U φ(V U) V, φ(x) = (e^x - I) x⁻¹", "expm", _by_core(partial(make, "phi")),
         "expm(P @ Q.T - Q @ P.T)"),
    Rule("(I + U V)⁻¹ = I - U (I + V U)⁻¹ V", "inverse", _inverse, "inverse(I(n) + P @ Q.T)"),
    Rule("reflect(U) = I - 2 U V, V the triangle of UᵀU solved for Uᵀ", "reflect", _reflect, "reflect(P)"),
    Rule("(x y) z = x (y z), whichever is cheaper", "matmul", _associate, "(P @ Q.T) @ P"),
    Rule("(x + y) z = x z + y z for a thin z", "matmul", _apart, "(A + P @ Q.T) @ p"),
    Rule("c (x + I) = c x + c I", "mul", _scaled_sum, "g * (A + I(n))"),
    Rule("(1 1ᵀ) x = 1 (1ᵀ x)", "matmul", _ones_in_a_row, "ones(n, n) @ A"),
    Rule("skew(U V) = U V - Vᵀ Uᵀ", "skew", _skew, "skew(P @ Q.T)"),
    Rule("[U V, P Q] = [U, P] [V, 0; 0, Q]", "side_by_side", _neighbours, "side_by_side(P @ Q.T, p @ q.T)"),
    Rule("detach(x y) = detach(x) detach(y)", "detach", _detached, "detach(P @ Q.T)"),
    Rule("block_diag(x y + I) = block_diag(x) block_diag(y) + I", "block_diag", _thin_blocks,
         "block_diag(reshape(P, 2, 6, 2) @ reshape(Q.T, 2, 2, 6)) - 3 * I(n)"),
    Rule("block_diag(x) block_diag(y) + block_diag(u) block_diag(v), thin, as one product", "add",
         _thin_blocks_in_a_sum, "block_diag(reshape(P, 2, 6, 2)) @ block_diag(reshape(Q.T, 2, 2, 6)) + "
         "block_diag(reshape(p, 2, 6, 1)) @ block_diag(reshape(q, 2, 1, 6))"),
    Rule("(I + U V) (I + P Q) = I + [U, P] [V + (V P) Q; Q]", "matmul", _turn_pair,
         "reflect(P) @ cayley(P @ Q.T - Q @ P.T)"),
    *(Rule("scatter(v, places) = [e_i, ...] diag(v) [e_j, ...]ᵀ for few places, the rows i and the columns j", op,
           _few_places, f"2 * scatter(take(d, range(3, 5)), range(40, 42), n, n) {sign} A")
      for op, sign in (("matmul", "@"), ("add", "+"))),
    Rule("x ([e_i, ...] y + [e_j, ...] z) = [x_i, ...] y + [x_j, ...] z, the columns of x", "matmul", _over_places,
         "A @ (columns(I(n), range(0, 3)) @ rows(A, 3) + columns(I(n), range(4, 6)) @ rows(B, 2))"),
    Rule("the columns of x ⊗ y are columns of x times columns of y", "columns", _columns_of_kron,
         "columns(kron(K, L), at)"),
    Rule("the columns of x ⊗ y, side by side", "between", _columns_of_kron, "columns(kron(K, L), 2)"),
    Rule("x * scatter(v, places) = scatter(v take(x, places), places)", "mul", _at_places, "W * scatter(d, at, n, n)"),
    Rule("take(x y, places) = the sums of x_i y_j, the rows i of x and the columns j of y", "take",
         _entries_of_a_product, "take(P @ Q.T, at)"),
    Rule("(U V) * (P Q) = face(U, P) face(Vᵀ, Qᵀ)ᵀ", "mul", _hadamard, "(p @ q.T) * (q @ p.T)"),
    Rule("top_softmax(x) y = the rows of y at the places of the largest, mixed", "matmul", _mixed_rows,
         "top_softmax(A, 2) @ B"),
    Rule("x * u vᵀ = diag(u) x diag(v)", "mul", _gains, "W * (p @ q.T)"),
    Rule("(1 ⊗ x) * (y ⊗ 1) = face(y, x) for rows of ones", "mul", _khatri_rao,
         "kron(ones(1, 2), P) * kron(Q, ones(1, 2))"),
    Rule("(1 ⊗ x) * (y ⊗ 1) = face(yᵀ, xᵀ)ᵀ for columns of ones", "mul", _khatri_rao_turned,
         "kron(ones(2, 1), P.T) * kron(Q.T, ones(2, 1))"),
    Rule("c circulant(x) = circulant(c x)", "mul", _scaled_circulant, "g * circulant(S)"),
    *NORMS,
)
# The rules make 100 nodes of the longest spec that ships.
MOST_NODES = 20_000
JOINING, LOWERING = table(*RULES, *JOINED), table(*RULES, *CHEAP)


def cheapest(expr: Expr) -> Expr:
    """The expression in the form that lowering starts from; its normal form where the rules, which distribute sums and
    products, would make too many nodes."""
    plain = simplify(expr)
    if plain.is_large:
        return plain
    try:
        with at_most(MOST_NODES):
            # in two passes: while one still joins reflections, another would have taken each apart already
            return rewrite(rewrite(plain, JOINING), LOWERING)
    except Exhausted:
        return plain


