"""Join thin products of activations: those of one activation, and those that are added up.

    x A, x B      =  the columns of x [A B]
    s P + t Q     =  [s t] [P; Q]

Takes the expression of an output; gives an equal one. A wide activation is then read once in the place of once for each
product, and a sum of low-rank terms read and written once; and so in the gradients, which are taken of the joined form.
Promises: products with matrices that train, and those with others, whose gradients nobody asks for, stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate, chain, pairwise

from surgery.ir.builders import scaled, times, total, value_of
from surgery.ir.expression import Expr, rebuild, walk
from surgery.ir.graph import readers
from surgery.ir.operations import make
from surgery.ir.sizes import TOKENS, Size, known
from surgery.rewrite.normal_form import simplify

_NARROW = 8  # how much wider an activation, or a sum, is at least than all the columns that are joined


def joined(output: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """The output with its thin products joined (itself where there are none)."""
    return _added_up(_of_one_activation(output, is_trained), is_trained)


def _is_product(node: Expr) -> bool:
    """Whether it is a [tokens, n] times a matrix that does not depend on the input."""
    is_matrix = node.op == "matmul" and all(len(a.shape) == 2 for a in node.args)
    return is_matrix and TOKENS in node.args[0].shape and not node.args[1].has("x")


def _is_narrow(columns: Iterable[Size], width: Size) -> bool:
    return _NARROW * sum(map(known, columns)) <= known(width)


def _of_one_activation(output: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """Thin products of one activation as parts of one product."""
    groups: dict[tuple[Expr, bool], list[Expr]] = {}
    for node in walk(output):
        if _is_product(node) and _is_narrow([node.shape[1]], node.args[0].shape[1]):
            groups.setdefault((node.args[0], is_trained(node.args[1])), []).append(node)
    place: dict[Expr, tuple[Expr, tuple[int, int]]] = {}  # of a product, all the columns, and which of them are its own
    for (activation, _), products in groups.items():
        ends = list(accumulate((known(p.shape[1]) for p in products), initial=0))
        if len(products) > 1 and _is_narrow(ends[-1:], activation.shape[1]):
            columns = _side_by_side(p.args[1] for p in products)
            place |= {p: (columns, part) for p, part in zip(products, pairwise(ends))}

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node not in place:
            return node.with_args(args)
        columns, part = place[node]
        return make("between", make("matmul", args[0], columns), data=part)

    return rebuild(output, change) if place else output


def _added_up(output: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """Each sum with its low-rank terms as one product, which stands last: it is accumulated into the others."""
    reads = readers(output)
    made: dict[Expr, Expr] = {}

    def is_low_rank(term: Expr) -> bool:
        scalar, product = scaled(term)
        is_known = scalar is None or value_of(scalar) is not None
        return is_known and _is_product(product) and len(reads[term]) == len(reads[product]) == 1

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        terms = list(_terms(node, reads)) if node.op == "add" and TOKENS in node.shape else []
        low = [term for term in terms if is_low_rank(term)]
        groups = [[term for term in low if is_trained(_matrix(term)) is trains] for trains in (True, False)]
        joins = [group for group in groups if len(group) > 1
                 and _is_narrow([_matrix(term).shape[0] for term in group], node.shape[1])]
        others = [made[term] for term in terms if term not in chain(*joins)]
        made[node] = node.with_args(args) if not joins else total(
            [*others, *(_as_one([made[term] for term in group]) for group in joins)], node.shape)
        return made[node]

    return rebuild(output, change)


def _terms(node: Expr, reads: Mapping[Expr, Sequence[Expr]]) -> Iterator[Expr]:
    """The terms of a sum, and of a sum in it that nothing else reads."""
    stack = list(reversed(node.args))
    while stack:
        term = stack.pop()
        if term.op == "add" and len(reads[term]) == 1:
            stack += reversed(term.args)
        else:
            yield term


def _matrix(term: Expr) -> Expr:
    return scaled(term)[1].args[1]


def _as_one(terms: list[Expr]) -> Expr:
    """c s P + d t Q = [c s, d t] [P; Q]; a factor that all have stays in front."""
    scalars, products = zip(*map(scaled, terms))
    common = scalars[0] if len(set(scalars)) == 1 else None
    left = (p.args[0] if scalar is common or scalar is None else times(scalar, p.args[0])
            for scalar, p in zip(scalars, products))
    rows = _side_by_side(simplify(make("T", p.args[1])) for p in products)
    product = make("matmul", _side_by_side(left), make("T", rows))
    return product if common is None else times(common, product)


def _side_by_side(parts: Iterable[Expr]) -> Expr:
    """[a, b, ...]; neighbouring columns of one matrix are columns of that, or all of it."""
    return reduce(_joined_pair, parts)


def _joined_pair(a: Expr, b: Expr) -> Expr:
    if not (a.op == b.op == "between" and a.args == b.args and a.data[1] == b.data[0]):
        return make("side_by_side", a, b)
    first, end = a.data[0], b.data[1]
    return a.args[0] if (first, end) == (0, a.args[0].shape[-1]) else make("between", a.args[0], data=(first, end))
