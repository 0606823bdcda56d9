"""Lay the values of a pass out in memory as a CPU reads them best: by columns where a product alone reads them.

    x block_diag(s), then W     =  in columns       column_blocks: each block's product fills memory in order
    x m for a few columns m     =  x in_columns(m)  a column's numbers lie side by side, as those of a row of x do

Takes expressions of a body or of its gradients; gives equal ones. What is kept, given on or added up stays in rows. A
thin product stays in rows too: turned, `(Mᵀ xᵀ)ᵀ`, it is up to twice as fast on one thread, and no other thread takes a
part of it. (With m in columns each of two threads has half of what one had, a half to a fifth of that with m in rows.)
"""

from __future__ import annotations

from surgery.codegen.emit import readers
from surgery.ir.expression import Expr, rebuild
from surgery.ir.operations import make
from surgery.ir.sizes import TOKENS, known

_FEW = range(2, 12)  # columns; of more, and of one, a product is as fast either way


def _is_thin(a: Expr, m: Expr) -> bool:
    """Whether a m is one of activations with a few columns, which lie in rows."""
    is_one = TOKENS in a.shape and len(a.shape) == len(m.shape) == 2 and m.op != "T"
    return is_one and m.shape[1] in _FEW and known(m.shape[0]) > known(m.shape[1])


def in_order(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with each value in the order of its readers."""
    reads = readers(*outputs)

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "blocks" and len(node.shape) == 2 and node not in outputs and all(
                reader.op in ("frozen", "frozen_back") for reader in reads[node]):
            return make("column_blocks", *args)
        if node.op == "matmul" and _is_thin(*args):
            return make("matmul", args[0], make("in_columns", args[1]))
        return node.with_args(args)

    return tuple(rebuild(output, change) for output in outputs)
