"""Fuse runs of block-diagonal factors (rotations of neighbouring entries, and the shuffles between them) into one.

Takes a weight expression in the lowering's form; gives an equal one in which every run of factors that keep to blocks
of a common size, and every sum of such, is one `block_diag`, its small blocks made in the set-up: an activation then
passes once in the place of once for each factor and term.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import groupby
from math import lcm

from surgery.codegen.apply_to_activations import apply, permutation
from surgery.ir.builders import every, fill
from surgery.ir.expression import Expr
from surgery.ir.operations import eye, make
from surgery.ir.sizes import Dim, Size, known, known_shape
from surgery.rewrite.low_rank import is_thin


def blockwise(expr: Expr) -> Expr:
    """The expression with its runs of block-diagonal factors joined (itself where there is none)."""
    done: dict[Expr, Expr] = {}

    def joined(node: Expr) -> Expr:
        if node not in done:
            factors = list(_factors(node))
            runs = [list(run) for _, run in groupby(factors, key=lambda factor: block_size(factor) is None)]
            parts = [part for run in runs for part in _as_one(run)]
            # a product in which nothing was joined keeps its own brackets: its factors may be runs further down
            done[node] = node.with_args(tuple(map(joined, node.args))) if parts == factors else reduce(
                _product, (joined(part) if part in factors else part for part in parts))
        return done[node]

    return joined(expr)


def _product(a: Expr, b: Expr) -> Expr:
    return make("matmul", a, b)


def _factors(node: Expr) -> Iterator[Expr]:
    """The factors of a product of matrices, left to right."""
    if node.op == "matmul" and all(len(a.shape) == 2 for a in node.args):
        for part in node.args:
            yield from _factors(part)
    else:
        yield node


def block_size(factor: Expr) -> Size | None:
    """The size of the blocks that a square matrix keeps to; None for one that mixes all entries, or none."""
    if factor.op in ("add", "matmul"):
        sizes = every(map(block_size, factor.args))
        return None if sizes is None or any(isinstance(size, Dim) for size in sizes) else lcm(*known_shape(sizes))
    if factor.op == "block_diag" and factor.args[0].shape[1] == factor.args[0].shape[2]:
        return factor.args[0].shape[1]
    if factor.op == "kron" and factor.args[0].op == "eye" and permutation(factor) is None:
        return factor.args[1].shape[0] if factor.args[1].shape[0] == factor.args[1].shape[1] else None
    if (sizes := permutation(factor)) is not None:
        _, p, q, inner = sizes
        return p * q * inner
    return 1 if factor.op in ("diag", "eye") else None


def _as_one(run: list[Expr]) -> list[Expr]:
    """The run of factors as one block-diagonal matrix, if their blocks have a small common size; else the run as it
    is."""
    sizes = every(map(block_size, run))
    is_one = len(run) < 2 and run[0].op != "add"
    if sizes is None or is_one or any(isinstance(size, Dim) for size in sizes):
        return run
    size, width = lcm(*known_shape(sizes)), known(run[0].shape[0])
    if size == 1 or width % size or not is_thin(size, width):
        return run
    # what the run makes of a row of identities is its blocks side by side: no square matrix is made on the way
    rows = apply(reduce(_product, run), make("kron", fill(1, (1, width // size)), eye(size)))
    return [make("block_diag", make("T", make("block_stack", rows)))]
