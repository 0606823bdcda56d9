"""Cancel terms of a sum against detached copies of them: x - detach(x) is 0 in value, and x in gradient.

Takes what acts on activations; gives it with products in the place of such pairs, each with one factor that is 0 in
value. Promises: value and gradient stay; what is computed of tensors alone stays as it was written. Why: over
activations the two terms would be computed apart, each rounded to the dtype of those, and what is left of two large
ones is their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgery.ir.builders import fill, scaled, summands, times, total, value_of
from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import make, names, operation
from surgery.ir.table import Linear
from surgery.rewrite.normal_form import simplify

_APART = (*names(lambda row: row.of_layer), "drop")  # W may take a gradient, which is not known here
_ALIKE = ("T", "diag", "block_diag")  # of the differences of their arguments


def without_cancellation(expr: Expr) -> Expr:
    """`expr` with each pair c x - c detach(x), in the sums that act term by term, in a form that is 0 exactly."""
    if operation(expr).linear is Linear.NOT or not expr.has("detach") or expr.is_large:
        return expr
    if expr.op == "add" and (found := _without_pairs(expr)) is not None:
        return without_cancellation(simplify(found))
    return expr.with_args(tuple(map(without_cancellation, expr.args)))


def _without_pairs(node: Expr) -> Expr | None:
    left: list[tuple[float, Expr]] = []
    pairs: list[tuple[float, Expr]] = []
    for factor, term in _terms(node):
        value = None if term.has(*_APART) else _undetached(term)
        for i, (other, found) in enumerate(left):
            if other == -factor and _undetached(found) is value and _moves(term) is not _moves(found):
                del left[i]
                pairs.append((factor, term) if _moves(term) else (other, found))
                break
        else:
            left.append((factor, term))
    if not pairs:
        return None
    differences = [times(factor, change) for factor, term in pairs for change in _changes(term)]
    return total([*(times(factor, term) for factor, term in left), *differences], node.shape)


def _terms(node: Expr) -> Iterator[tuple[float, Expr]]:
    """The terms of a sum, each with the number in front; those within a `detach` and its like one by one."""
    for term in summands(node):
        scalar, rest = scaled(term)
        factor = 1.0 if scalar is None else value_of(scalar)
        if factor is None:
            yield 1.0, term
        elif rest.op == "detach" or rest.op in _ALIKE:
            for inner, part in _terms(rest.args[0]):
                yield factor * inner, make(rest.op, _spread(part, rest.args[0]))
        else:
            yield factor, rest


def _spread(part: Expr, whole: Expr) -> Expr:
    """A term in the shape of its sum, where it is a number that is added to each entry: T, say, has none of that."""
    return part if part.shape == whole.shape else make("mul", part, fill(1, whole.shape))


def _undetached(node: Expr) -> Expr:
    """The same value, with a gradient everywhere."""
    return simplify(rebuild(node, lambda each, args: args[0] if each.op == "detach" else each.with_args(args)))


def _moves(node: Expr) -> bool:
    """Whether a parameter is reached without passing a `detach`."""
    seen, stack = set(), [node]
    while stack:
        each = stack.pop()
        if each.op == "param":
            return True
        if each not in seen and not operation(each).stops_gradient:
            seen.add(each)
            stack += each.args
    return False


def _changes(node: Expr) -> Iterator[Expr]:
    """x - detach(x) as terms, by the product rule: x y - x' y' = (x - x') y + x' (y - y') for detached x' and y'."""
    if not _moves(node):
        return
    if node.op == "add":
        for part in node.args:
            yield from _changes(part)
    elif node.op in _ALIKE or operation(node).linear is Linear.EACH:
        for i, part in enumerate(node.args):
            before = [make("detach", each) for each in node.args[:i]]
            for change in _changes(part):
                yield node.with_args((*before, _spread(change, part), *node.args[i + 1:]))
    else:
        yield make("unmoved", node)
