"""The table of operations: a row for each, of the language and of activations alike.

A row says all that is known about its operation (`table.Operation` says what that is), and every stage asks the row.
So a new operation is a new row: of the language in `primitives` or beside it, on activations in `activations`, of
backward passes in `gradient_operations`, of one pass over memory in `one_pass_operations`. A kernel that is faster than
the dense meaning is a function in one of codegen's modules of kernels, and the row names it. What has memory of its own
to be written over, or a text other than a call by its name, `codegen.validate` must be told too: it asks no row.
"""

from __future__ import annotations

from surgery.ir import (
    activations,
    contractions,
    gradient_operations,
    leaves,
    one_pass_operations,
    primitives,
    primitives_fourier,
    primitives_indexing,
    primitives_row_products,
)
from surgery.ir.activations import is_ids
from surgery.ir.shape_rules import ShapeError, shape_text
from surgery.ir.table import (
    OPERATIONS,
    Operation,
    constant,
    eye,
    is_undecided,
    is_whole,
    make,
    names,
    ones,
    operation,
    undecided,
)

__all__ = ["FUNCTIONS", "OPERATIONS", "OPERATORS", "PRIMITIVES", "Operation", "ShapeError", "constant", "eye", "is_ids",
           "is_undecided", "is_whole", "make", "names", "ones", "operation", "shape_text", "undecided"]

_ON_MATRICES = (*primitives.ROWS, *primitives_indexing.ROWS, *primitives_fourier.ROWS, *primitives_row_products.ROWS,
                *contractions.ROWS)
OPERATIONS.update(
    {row.name: row for row in (*leaves.ROWS, *_ON_MATRICES, *activations.ROWS, *gradient_operations.ROWS,
                                 *one_pass_operations.ROWS)})

# What a spec can say, and the cores that rules make of it.
PRIMITIVES: dict[str, Operation] = {row.name: row for row in _ON_MATRICES}
OPERATORS = {row.sign: row.name for row in _ON_MATRICES if row.sign and row.arity == 2}
FUNCTIONS = {row.name for row in _ON_MATRICES if row.public and not row.sign} | {"I", "ones", "indices"}
