"""Lay the values of a pass out in memory as a CPU reads them best: by columns where a product alone reads them.

    x M, few columns            =  (Mᵀ xᵀ)ᵀ        thin: x is read in order, and so is the result by the gradient of M
    x block_diag(s), then W     =  in columns       column_blocks: each block's product fills memory in order

Takes expressions of a body or of its gradients; gives equal ones. What is kept, given on or added up stays in rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.codegen.emit import readers
from surgery.codegen.join_products import is_narrow, is_product
from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import make

_LIES_BY_ITSELF = ("matmul", "frozen", "frozen_back", "blocks", "placed")  # in rows, whatever it reads


def in_order(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with each value in the order of its readers. The first is given on, and lies in rows, as what a layer
    of torch's gives: models `view` it."""
    reads, given_on = readers(*outputs), _given_on(outputs[:1])

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node not in given_on and is_product(node) and is_narrow([node.shape[1]], node.args[0].shape[1]):
            a, m = args
            return make("thin", a, m.args[0] if m.op == "T" else make("T", m))
        if node.op == "blocks" and len(node.shape) == 2 and node not in outputs and all(
                reader.op in ("frozen", "frozen_back") for reader in reads[node]):
            return make("column_blocks", *args)
        return node.with_args(args)

    return tuple(rebuild(output, change) for output in outputs)


def _given_on(outputs: Sequence[Expr]) -> set[Expr]:
    """What decides how outputs lie in memory: they, and what they are made of entry by entry."""
    found, stack = set[Expr](), [*outputs]
    while stack:
        node = stack.pop()
        found.add(node)
        stack += () if node.op in _LIES_BY_ITSELF else (a for a in node.args if a not in found)
    return found
