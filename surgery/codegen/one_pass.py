"""Say in one operation what a kernel computes in one pass over activations.

    d (y + c h m),  d y + c h m     a gain beside a low-rank term            gained
    d g  and  Σ g y                 a gain's backward pass, and its gradient    gained_back, of which both are a part
    masked(a) m,  masked(h m)       thin products under dropout              masked_times, times_masked
    masked(a)ᵀ g                    and the gradient of their matrix         masked_outer

Takes expressions of a body or of its gradients; gives equal ones. For devices that have such kernels (`cost_model`
says which), of bodies whose dropout is a number. Promises: what something else reads too stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.ir.builders import scaled, value_of
from surgery.ir.expression import Expr, substituted, walk
from surgery.ir.graph import readers
from surgery.ir.operations import make
from surgery.ir.sizes import Dim, known

MOST_RANK = 128  # of a low-rank term, whose thin factors a kernel holds beside a tile of the activation


@dataclass(frozen=True)
class _Outputs:
    """Expressions, and who reads each node of them."""

    of: tuple[Expr, ...]
    reads: Mapping[Expr, Sequence[Expr]]

    def is_once(self, *nodes: Expr) -> bool:
        """Whether each is read in one place alone."""
        return all(len(self.reads.get(node, ())) == 1 and node not in self.of for node in nodes)


_Table = dict[Expr, Expr]
_Rule = Callable[[_Outputs, Expr], _Table | None]


def gains_fused(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with gains and low-rank terms as one operation: of a body, before its gradients are taken."""
    return _changed(outputs, _gain)


def fused(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with all that one kernel computes as one operation: of a pass, all that it computes."""
    for rule in (_gain, _gain_back, _times_masked, _masked_product):
        outputs = _changed(outputs, rule)
    return outputs


def _changed(outputs: tuple[Expr, ...], rule: _Rule) -> tuple[Expr, ...]:
    """The outputs with the rule applied wherever it applies, one place after the other."""
    while True:
        now = _Outputs(outputs, readers(*outputs))
        table = next(filter(None, (rule(now, node) for node in walk(*outputs))), None)
        if table is None:
            return outputs
        outputs = tuple(substituted(output, table) for output in outputs)


# --------------------------------------------------------------------------------------------------------- rules


def _is_activation(node: Expr) -> bool:
    return len(node.shape) == 2 and isinstance(node.shape[0], Dim)


def _is_thin(node: Expr) -> bool:
    """Whether it is a thin activation [tokens, r]."""
    return _is_activation(node) and known(node.shape[1]) <= MOST_RANK


def _low_rank(now: _Outputs, term: Expr) -> tuple[float, Expr, Expr] | None:
    """(c, h, m) of a term c h m that is nothing else's, for a known number c."""
    scalar, product = scaled(term)
    factor = 1.0 if scalar is None else value_of(scalar)
    is_product = product.op == "matmul" and _is_thin(product.args[0]) and len(product.args[1].shape) == 2
    if factor is None or not is_product or not now.is_once(*{term, product}):
        return None
    h, m = product.args
    return factor, h, m


def _both(node: Expr) -> Iterator[tuple[Expr, Expr]]:
    yield from (node.args, node.args[::-1])  # pyright: ignore[reportReturnType]  # an `add` has two


def _gain(now: _Outputs, node: Expr) -> _Table | None:
    if not _is_activation(node):
        return None
    if node.op == "scale" and node.args[0].op == "add" and now.is_once(node.args[0]):
        total, d = node.args
        ways = ((y, d, term, True) for y, term in _both(total))
    elif node.op == "add":
        ways = ((*a.args, term, False) for a, term in _both(node) if a.op == "scale" and now.is_once(a))
    else:
        return None
    for y, d, term, inside in ways:
        if y.shape == node.shape and (low := _low_rank(now, term)) is not None:
            factor, h, m = low
            return {node: make("gained", y, d, h, m, data=(factor, inside))}
    return None


def _gain_back(now: _Outputs, node: Expr) -> _Table | None:
    """A sum Σ g y, together with d g for the same g."""
    if node.op not in ("column_dot", "gained_dot") or not _is_activation(node.args[0]):
        return None
    g, y, *low = node.args
    inside = node.op == "gained_dot"
    for other in now.reads[g]:
        is_plain = other.op == "scale" and other.args[0] is g
        is_sum = other.op == "gained" and other.args[0] is g and not other.data[1] and not inside
        if not is_plain and not is_sum:
            continue
        factor = node.data[0] if inside else other.data[0] if is_sum else 1.0
        operands = (g, other.args[1], y, *(low if inside else other.args[2:]))
        if any(each is node or each is other for each in walk(*operands)):  # one is there before the other
            continue
        pair = make("gained_back", *operands, data=(factor, inside))
        return {node: make("part", pair, data=(1,)), other: make("part", pair, data=(0,))}
    return None


def _times_masked(now: _Outputs, node: Expr) -> _Table | None:
    if node.op != "masked" or not _is_activation(node):
        return None
    product, number = node.args
    is_low_rank = product.op == "matmul" and _is_thin(product.args[0]) and now.is_once(product)
    return {node: make("times_masked", *product.args, number)} if is_low_rank else None


def _masked_product(now: _Outputs, node: Expr) -> _Table | None:
    if node.op not in ("matmul", "outer") or any(len(a.shape) != 2 for a in node.args):
        return None
    left, right = node.args
    if left.op == "masked" and now.is_once(left):
        if node.op == "matmul" and _is_thin(node):
            return {node: make("masked_times", *left.args, right)}
        if node.op == "outer" and _is_thin(right):
            return {node: make("masked_outer", *left.args, right, data=(False,))}
    if right.op == "masked" and node.op == "outer" and now.is_once(right) and _is_thin(left):
        return {node: make("masked_outer", *right.args, left, data=(True,))}
    return None
