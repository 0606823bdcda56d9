"""The work of one operation: multiplications and additions, and numbers moved between memory and processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import prod

from surgery.ir.builders import scaled, value_of
from surgery.ir.expression import Expr
from surgery.ir.operations import is_ids, operation
from surgery.ir.sizes import Dim, known


def is_taken_in(node: Expr, reads: Mapping[Expr, Sequence[Expr]]) -> bool:
    """True if this multiple by a number is fused into its only reader, and so costs no pass over memory."""
    return node.op == "mul" and value_of(node.args[0]) is not None and len(reads.get(node, ())) == 1


def is_accumulated(node: Expr, reads: Mapping[Expr, Sequence[Expr]]) -> bool:
    """True if this product is accumulated by the sum that reads it, into the sum's other term."""
    over = reads.get(node, ())
    over = reads.get(over[0], ()) if len(over) == 1 and is_taken_in(over[0], reads) else over
    return is_product(node) and len(over) == 1 and over[0].op == "add"


def is_product(node: Expr) -> bool:
    """True if a sum can accumulate this product into its other term."""
    added = operation(node).added
    return added is not None and added.is_product


def moved(node: Expr, tokens: int) -> float:
    """How many numbers are read and written; of a sum with a product in it, what else there is."""
    if operation(node).is_free or is_ids(node):
        return 0.0
    if node.args and is_ids(node.args[0]):  # rows are looked up
        return 2 * size(node, tokens)
    if node.op == "add" and any(is_product(scaled(a)[1]) for a in node.args):
        return size(node, tokens)
    # the layer's own map reads W too, which is none of the node's arguments
    weight = float(known(node.shape[-1]) * known(node.args[0].shape[-1])) if operation(node).of_layer else 0.0
    return size(node, tokens) + weight + sum(size(a, tokens) for a in node.args)


def size(node: Expr, tokens: int) -> float:
    """How many numbers a node's value has."""
    return float(prod(_known(s, tokens) if isinstance(s, Dim) else s for s in node.shape))


@lru_cache(maxsize=1024)
def _known(value: Dim, tokens: int) -> float:
    """A dimension with the number of tokens put in."""
    return float(sum((c * tokens ** sum(power for _, power in monomial) for monomial, c in value.terms), Fraction(0)))


def flops(node: Expr, tokens: int) -> float:
    """Multiplications and additions of computing a node once."""
    if operation(node).is_free or is_ids(node) or node.args and is_ids(node.args[0]):
        return 0.0
    rule = operation(node).flops
    return rule(node, lambda each: size(each, tokens)) if rule else size(node, tokens)
