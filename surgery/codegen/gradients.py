"""The gradients of a program's body, as expressions: reverse differentiation by the rows of the table.

Takes y over the leaves `x` and `value`, and the leaves that take a gradient; gives one expression for each over the
leaf `grad` (the gradient of y), the leaves, and `kept` values of the forward pass. Promises: what is kept is the least
that the gradients need; what one elementwise pass makes of something kept is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

from surgery.codegen.operation_counts import is_product
from surgery.codegen.setup_order import made_once
from surgery.ir.builders import is_zero, scaled, total
from surgery.ir.expression import Expr, Shape, rebuild, walk
from surgery.ir.operations import make, operation
from surgery.ir.sizes import TOKENS
from surgery.ir.table import Source
from surgery.rewrite.normal_form import simplify


@dataclass(frozen=True)
class Gradients:
    """An expression for each leaf asked for; `kept` are the forward values that leaves `kept` stand for by index."""

    of: tuple[Expr, ...]
    kept: tuple[Expr, ...]


def gradients(output: Expr, leaves: Sequence[Expr], second: Expr | None = None) -> Gradients | None:
    """The gradients of <output, grad>; None where an operation has no row in the table. Those of all leaves but the
    input are taken of `second`, an equal expression, if there is one."""
    is_one = second is None or second is output
    of_input = [leaf for leaf in leaves if is_one or operation(leaf).source is Source.INPUT]
    of_values = [leaf for leaf in leaves if leaf not in of_input]
    first, others = _derived(output, of_input), _derived(second or output, of_values)
    if first is None or others is None:
        return None
    # of tokens as matrices, a product may be there as it is and turned
    known = dict(zip((*of_input, *of_values), (*first, *others)))
    made = tuple(known[leaf] for leaf in leaves)
    return _keeping(made_once(made, lambda node: node.op == "matmul" and TOKENS in node.shape))


def _derived(output: Expr, leaves: Sequence[Expr]) -> tuple[Expr, ...] | None:
    """The gradients of <output, grad> over values `forward`."""
    order, leads = list(walk(output)), set(leaves)
    for node in order:  # arguments stand before what they are in
        if not operation(node).stops_gradient and any(a in leads for a in node.args):
            leads.add(node)
    # of each node between the output and the leaves, the terms of its gradient
    terms = {output: [Expr("grad", (), None, output.shape)]}
    for node in reversed(order):
        if node.args and node in leads:
            derivative = operation(node).derivative
            if derivative is None:
                return None
            gradient = _sum(terms.get(node, []), node.shape)
            for arg, term in zip(node.args, () if is_zero(gradient) else derivative(node, gradient)):
                if arg in leads:
                    terms.setdefault(arg, []).append(term)
    sums = [_sum(terms.get(leaf, []), leaf.shape) for leaf in leaves]
    # where terms cancel the gradient is zeros of the leaf's size, which with a number of tokens only the leaf knows
    return tuple(make("zeros", leaf) if is_zero(sum_) else sum_ for leaf, sum_ in zip(leaves, sums))


def _sum(terms: list[Expr], shape: Shape) -> Expr:
    """The sum of the terms, products last: those are accumulated into what stands before them."""
    def is_accumulated(term: Expr) -> bool:
        rest = scaled(term)[1]
        return is_product(rest.args[0] if rest.op == "masked" else rest)

    return simplify(total(sorted(map(simplify, _columns_joined(terms, shape[-1:])), key=is_accumulated), shape))


def _columns_joined(terms: list[Expr], width: Shape) -> list[Expr]:
    """The terms, those that together are all columns side by side and not as a sum of each among zeros."""
    parts = {term.args[1].data: term.args[0] for term in terms if term.op == "placed" and term.args[1].op == "range"}
    (first, _), *_ = ends = sorted(parts) or [(1, 1)]
    is_whole = len(parts) == len(terms) and first == 0 and all(one[1] == next_[0] for one, next_ in pairwise(ends))
    is_whole = is_whole and ends[-1][1:] == width
    return [reduce(partial(make, "side_by_side"), (parts[each] for each in ends))] if is_whole else terms


def _keeping(raw: Sequence[Expr]) -> Gradients:
    """The gradients with each value of the forward pass replaced by a leaf `kept`, or recomputed from what is kept
    where one pass does it."""
    wanted = {node.data for node in walk(*raw) if node.op == "forward"}
    kept: dict[Expr, Expr] = {}

    # What one pass makes of something that is kept anyway is made again: a pass over it costs less than holding more.
    def recall(node: Expr) -> Expr:
        return node if operation(node).is_leaf else again(node) if is_cheap(node, 1) else keep(node)

    def is_cheap(node: Expr, passes: int) -> bool:
        """True if `passes` passes over memory compute it from leaves and values that are kept anyway."""
        row = operation(node)
        needed = 0 if row.is_view else row.passes
        left = passes - needed if needed is not None else -1
        return left >= 0 and all(operation(a).is_leaf or a in wanted or is_cheap(a, left) for a in node.args)

    def again(node: Expr) -> Expr:
        arguments = (recall(a) if operation(a).is_leaf or a in wanted else again(a) for a in node.args)
        return node.with_args(tuple(arguments))

    def keep(node: Expr) -> Expr:
        return kept.setdefault(node, Expr("kept", (), len(kept), node.shape))

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        return recall(node.data) if node.op == "forward" else node.with_args(args)

    return Gradients(tuple(rebuild(expr, change) for expr in raw), tuple(kept))
