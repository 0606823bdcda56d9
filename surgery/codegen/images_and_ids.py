"""How W' meets a layer's input: rows of features, an image, or token ids, which the frozen layer's own map takes.

Takes an expression in the lowering's normal form and a layer's input; gives the activation expression. Promises: the
layer's map runs with one matrix at a time in its weight's place, and the rest acts on what comes out as in
`apply_to_activations`; what drops entries of the input does so before the map.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.codegen.apply_to_activations import apply, dropped, matrix, turned
from surgery.codegen.fuse_blocks import block_size
from surgery.ir.builders import scaled, times, total
from surgery.ir.expression import Expr, in_evaluation, walk
from surgery.ir.operations import is_ids, make, ones
from surgery.ir.sizes import known, known_shape
from surgery.layers.kinds import LayerKind
from surgery.rewrite.low_rank import factors, is_thin, low_rank_turn
from surgery.rewrite.normal_form import simplify


def spread(expr: Expr, x: Expr, kind: LayerKind) -> Expr:
    """x Eᵀ with E acting on the activations factor by factor."""
    return apply(expr, x) if kind.acts_by_rows else enter_in_parts(expr, x, kind.groups)


def built(expr: Expr, x: Expr, kind: LayerKind) -> Expr:
    """x Eᵀ with E built, acting as one matrix; what sees the input through dropout acts by itself."""
    kept, dropping = split_dropout(expr)
    parts = [spread(part, x, kind) for part in dropping]
    if kept is not None:
        parts.insert(0, make("matmul", x, make("T", matrix(kept))) if kind.acts_by_rows else run(kept, x))
    return total(parts, x.shape[:-1] + expr.shape[:1])


def enter_in_parts(expr: Expr, x: Expr, groups: int = 1) -> Expr:
    """`enter`, each update with dropout on its own: the entries of the layer's input are what it drops."""
    kept, dropping = split_dropout(expr)
    if not dropping:
        return enter(expr, x, groups)
    parts = [enter(kept, x, groups)] if kept is not None else []
    for part in dropping:
        drop = next(node for node in walk(part) if node.op == "drop")
        parts.append(enter(in_evaluation(part), dropped(drop, x), groups))
    return total(parts, parts[0].shape)


def enter(expr: Expr, x: Expr, groups: int = 1) -> Expr:
    """x Eᵀ where x is a layer's own kind of input (an image, token ids): the layer's map runs with the first factor in
    its weight's place, and the rest acts on what comes out. `groups`: each run of E's rows sees its part of x alone."""
    if _is_own(expr, x):
        return Expr("frozen", (x,), None, x.shape[:-1] + expr.shape[:1])
    if expr.is_large:
        return run(expr, x)
    if expr.op == "add":
        return make("add", *(enter(term, x, groups) for term in expr.args))
    if expr.op == "mul" and scaled(expr)[0] is not None:
        return times(scaled(expr)[0], enter(scaled(expr)[1], x, groups))
    if expr.op == "matmul":
        return _enter_product(expr, x) if groups == 1 else _enter_groups(expr, x, groups)
    return run(expr, x)


def is_weight(expr: Expr) -> bool:
    """W or Wᵀ."""
    return expr.op == "weight" or expr.op == "T" and expr.args[0].op == "weight"


def _is_own(expr: Expr, x: Expr) -> bool:
    """Whether the layer's own map is with this matrix: W, or Wᵀ for a layer that looks rows up."""
    return is_weight(expr) and is_ids(x) is (expr.op == "T")


def run(expr: Expr, x: Expr) -> Expr:
    """The layer's map with the matrix E, built, in place of its weight."""
    return make("run", x, matrix(expr))


def alone(output: Expr) -> Expr:
    """The same output, but where the layer's map with one matrix in W's place, and a bias, is all that makes it: then
    the layer takes both, as it takes its own, and its output is not turned to rows and back."""
    ran, bias = (output.args[0], output.args[1:]) if output.op == "add_bias" else (output, ())
    fits = ran.op == "run" and not is_ids(ran.args[0])
    return Expr("run_alone", (*ran.args, *bias), None, output.shape) if fits else output


def _enters(expr: Expr, x: Expr) -> bool:
    """True if the layer can run it without more work: the weight, a matrix with few rows, sums of those, a product that
    ends in one."""
    if expr.op == "add":
        return all(_enters(term, x) for term in expr.args)
    if expr.op == "mul" and scaled(expr)[0] is not None:
        return _enters(scaled(expr)[1], x)
    if expr.op == "matmul":
        return _enters(expr.args[1], x)
    return _is_own(expr, x) or known(expr.shape[0]) < known(expr.shape[1])


def _enter_product(expr: Expr, x: Expr) -> Expr:
    left, right = expr.args
    if right.op == "diag" and is_ids(x):
        # x (L diag(d))ᵀ for rows with a single 1: each row of x Lᵀ times the d of its id, which is looked up too
        ids = x.args[0] if x.op == "dropout" else x
        gains = make("reshape", right.args[0], data=(1, right.shape[0]))
        return make("face", enter(left, x), run(gains, ids))
    if right.op == "add" and not _enters(right, x):  # x (L (p + q))ᵀ = x (L p)ᵀ + x (L q)ᵀ
        return make("add", *(enter(simplify(make("matmul", left, term)), x) for term in right.args))
    if (pair := factors(right)) is not None and known(right.shape[0]) > known(left.shape[0]):
        return make("matmul", enter(pair[1], x), matrix(turned(make("matmul", left, pair[0]))))
    return apply(left, enter(right, x)) if _enters(right, x) else run(expr, x)


def _enter_groups(expr: Expr, x: Expr, groups: int) -> Expr:
    """A product L R where row i of R sees the part of x that its group has: what comes out of R is only what L needs if
    L, too, makes row i of rows of that group. A thin R has no rows of a group: it runs once for each."""
    left, right = expr.args
    if _keeps_to(left, known(expr.shape[0]) // groups):
        return apply(left, enter(right, x, groups))
    if (pair := factors(expr)) is not None:
        return _thin_in_groups(*pair, x, groups)
    turn = low_rank_turn(left)
    if turn is not None and is_thin(turn[0].shape[1], *expr.shape):  # (I + U V) R = R + U (V R)
        update = simplify(make("matmul", turn[1], right))
        return make("add", enter(right, x, groups), _thin_in_groups(turn[0], update, x, groups))
    return run(expr, x)


def _thin_in_groups(u: Expr, v: Expr, x: Expr, groups: int) -> Expr:
    """x (U V)ᵀ: what V [r, n] makes of each group's part of x, [tokens, groups · r], and each run of U's rows on its
    own r of those."""
    (out, rank), copies = known_shape(u.shape), make("kron", ones(groups, 1), matrix(v))
    runs = make("reshape", matrix(u), data=(groups, out // groups, rank))
    return make("blocks", make("run", x, copies), make("T", runs))


def _keeps_to(expr: Expr, size: int) -> bool:
    """True if a square matrix maps each run of `size` rows to the same run."""
    scalar, rest = scaled(expr)
    if scalar is not None:
        return _keeps_to(rest, size)
    if expr.op in ("add", "mul", "matmul", "T"):
        return all(_keeps_to(part, size) for part in expr.args)
    block = 1 if expr.op == "eye" else block_size(expr)
    return block is not None and size % known(block) == 0


def split_dropout(expr: Expr) -> tuple[Expr | None, list[Expr]]:
    """Split E into the part that sees the whole input (None for nothing) and the parts that see it through dropout; E
    is linear in them."""
    if expr.op == "drop":
        return None, [expr]
    if expr.op == "mul" and scaled(expr)[0] is not None:
        return _each(scaled(expr)[1], lambda part: times(scaled(expr)[0], part))
    if expr.op == "add":
        (left, first), (right, second) = map(split_dropout, expr.args)
        return make("add", left, right) if left and right else left or right, first + second
    if expr.op == "matmul":
        left, right = expr.args
        if right.has("drop"):
            return _each(right, lambda part: make("matmul", left, part))
        return _each(left, lambda part: make("matmul", part, right))
    return expr, []


def _each(expr: Expr, wrap: Callable[[Expr], Expr]) -> tuple[Expr | None, list[Expr]]:
    """The parts of `split_dropout`, each of them wrapped."""
    kept, dropping = split_dropout(expr)
    return kept and wrap(kept), [wrap(part) for part in dropping]
