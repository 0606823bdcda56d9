"""Lay the values of a pass out in memory as a CPU reads them best: by columns where a product alone reads them.

    x block_diag(s), then W     =  in columns       column_blocks: each block's product fills memory in order

Takes expressions of a body or of its gradients; gives equal ones. What is kept, given on or added up stays in rows. A
thin product stays in rows too: turned, `(Mᵀ xᵀ)ᵀ`, it is up to twice as fast on one thread, and no other thread takes a
part of it.
"""

from __future__ import annotations

from surgery.codegen.emit import readers
from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import make


def in_order(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with each value in the order of its readers."""
    reads = readers(*outputs)

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "blocks" and len(node.shape) == 2 and node not in outputs and all(
                reader.op in ("frozen", "frozen_back") for reader in reads[node]):
            return make("column_blocks", *args)
        return node.with_args(args)

    return tuple(rebuild(output, change) for output in outputs)
