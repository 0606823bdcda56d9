"""Put what a CPU is best at in the place of products of activations: the order of memory, and parts of thin ones.

    x block_diag(s), then W     =  in columns       column_blocks: each block's product fills memory in order
    x m for a few columns m     =  thin(x, m)       (mᵀ xᵀ)ᵀ, a batch of products with parts of the rows of x

Takes expressions of a body or of its gradients; gives equal ones. What is kept, given on or added up stays in rows.
"""

from __future__ import annotations

from surgery.ir.expression import Expr, rebuild
from surgery.ir.graph import readers
from surgery.ir.operations import make
from surgery.ir.sizes import TOKENS, known

_FEW = range(2, 25)  # columns of m; with more, and with one, a product is as fast either way
WIDER = 8  # times as many has the other side, or there is little to share out


def _is_thin(a: Expr, m: Expr) -> bool:
    """Whether a m is a product of activations with a few columns."""
    is_one = TOKENS in a.shape and len(a.shape) == len(m.shape) == 2
    return is_one and m.shape[1] in _FEW and known(m.shape[0]) >= WIDER * known(m.shape[1])


def in_order(*outputs: Expr) -> tuple[Expr, ...]:
    """The outputs with each value in the order of its readers."""
    reads = readers(*outputs)

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "blocks" and len(node.shape) == 2 and node not in outputs and all(
                reader.op in ("frozen", "frozen_back") for reader in reads[node]):
            return make("column_blocks", *args)
        if node.op == "matmul" and _is_thin(*args):
            return make("thin", *args)
        return node.with_args(args)

    return tuple(rebuild(output, change) for output in outputs)
