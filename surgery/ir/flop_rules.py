"""What operations cost in multiplications and additions: the parts that rows of the table are made of.

A rule takes a node and `count`, which gives how many numbers a node's value has (for some number of tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2

from surgery.ir.expression import Expr
from surgery.ir.sizes import known, known_shape

Count = Callable[[Expr], float]
Flops = Callable[[Expr, Count], float]
FACTORISED = 5e5  # what a factorisation of a small matrix costs beside its arithmetic
# What it costs to go to another place in memory. Numbers that lie side by side share it, so that it counts for narrow
# blocks and transpositions alone. Measured on a core: 370 such operations a number that lies alone.
STRIDE = 400.0
SMALL_PRODUCTS = 3.0  # what a step of one of many small products costs, where a large one's is 2: by steps of a core


def product(node: Expr, count: Count) -> float:
    """Over the last axis of the first argument: `a m`, or the layer's own map."""
    return 2 * count(node) * known(node.args[0].shape[-1])


def each(factor: float, argument: int, axis: int) -> Flops:
    """So many, and a size of an argument, for each number of the result."""
    return lambda node, count: factor * count(node) * known(node.args[argument].shape[axis])


def each_read(factor: float, axis: int | None = None) -> Flops:
    """So many, and a size of the result, for each number of the first argument."""
    return lambda node, count: factor * count(node.args[0]) * (1.0 if axis is None else known(node.shape[axis]))


def blocks(node: Expr, count: Count) -> float:
    """Rows by blocks [b, k, m], which are read and written k and m numbers at a time."""
    a, (_, k, m) = node.args[0], known_shape(node.args[1].shape)
    return SMALL_PRODUCTS * count(node) * k + STRIDE * (count(a) / k + count(node) / m)


def block_dot(node: Expr, count: Count) -> float:
    """Sums over rows of products [b, k, m], the rows read in the same way."""
    (a, g, _), (_, k, m) = node.args, known_shape(node.shape)
    return SMALL_PRODUCTS * count(a) * m + STRIDE * (count(a) / k + count(g) / m)


def swap(node: Expr, count: Count) -> float:
    """A transposition of [p, q], `inner` numbers at a time."""
    _, p, q, inner = node.data
    return count(node) * (1 + STRIDE / inner if min(p, q) > 1 else 1)


def cubic(factor: float) -> Flops:
    """For each square matrix of a stack."""
    def flops(node: Expr, count: Count) -> float:
        side = known(node.shape[-1])
        return count(node) * factor * side + FACTORISED * count(node) / side**2

    return flops


def decomposed(node: Expr, count: Count) -> float:
    """The singular value decomposition of the argument."""
    return FACTORISED + 20 * count(node.args[0]) * min(known_shape(node.args[0].shape))


def mirrored(node: Expr, count: Count) -> float:
    return FACTORISED + 3 * count(node) * known(node.shape[0])


def mixed_rows(node: Expr, count: Count) -> float:
    """A softmax over each row, and the few rows that it weighs."""
    return count(node.args[0]) + 2 * count(node) * node.data[0]


def fourier(numbers: float) -> float:
    """A fast transform of so many numbers."""
    return 5 * numbers * log2(max(numbers, 2))


def transformed(node: Expr, count: Count) -> float:
    return fourier(count(node))


def circulate(node: Expr, count: Count) -> float:
    return fourier(count(node.args[0])) + fourier(count(node)) + 4 * count(node) * known(node.args[1].shape[1])


def circulate_dot(node: Expr, count: Count) -> float:
    a, g, c = node.args
    return fourier(count(a)) + fourier(count(g)) + 4 * count(a) * known(c.shape[0])
