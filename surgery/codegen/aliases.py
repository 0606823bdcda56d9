"""Which values may lie in the same memory, and which have memory of their own: what may ever be written over.

Takes instructions; gives facts about memory that hold in whatever order they run. Promises: an operation that is not
known to allocate is taken to give a view of each of its operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.ir.expression import Expr

# What a layer gives: memory of its own, unless it is a module of someone else's, which may give a view of its input.
_OF_LAYER = {"frozen", "frozen_back", "run"}
_ALLOCATES = _OF_LAYER | {
    "add", "add_bias", "mul", "scale", "matmul", "outer", "blocks", "masked", "mix", "side_by_side", "spectrum",
    "waves", "mixed", "mixed_back", "mixed_dot", "circulate", "circulate_back", "circulate_dot", "column_dot",
    "column_sum", "block_dot", "zeros"}
# Of those, what autograd keeps for no gradient, neither when it is made nor when a sum reads it.
_UNKEPT = _OF_LAYER | {"matmul", "blocks", "add", "scale", "masked"}


@dataclass(frozen=True)
class Memory:
    """How a region may use memory. `looked_on`: autograd sees each line; `writes`: whether anything is written over at
    all; `is_called`: the layer is a module that is called."""

    looked_on: bool = True
    writes: bool = False
    is_called: bool = False

    def is_own(self, node: Expr) -> bool:
        """Whether a value that is computed has memory that nothing else had before."""
        return node.op in _ALLOCATES and not (self.is_called and node.op in _OF_LAYER)

    def may_end(self, node: Expr) -> bool:
        """Whether a computed value may be written over when it has been read for the last time."""
        return self.writes and self.is_own(node) and (not self.looked_on or node.op in _UNKEPT)


def read_by(reads: Sequence[tuple[Expr, Sequence[Expr]]], memory: Memory) -> dict[Expr, frozenset[int]]:
    """For each value the instructions that read its memory, be it through views, by number; `reads` has what each gives
    and reads, operands before what reads them."""
    found: dict[Expr, frozenset[int]] = {}
    for i, (node, operands) in reversed(list(enumerate(reads))):
        through = frozenset() if memory.is_own(node) else found.get(node, frozenset())
        for operand in operands:
            found[operand] = found.get(operand, frozenset()) | {i} | through
    return found


def held_by(outputs: Iterable[Expr], operands: Mapping[Expr, Sequence[Expr]], memory: Memory) -> set[Expr]:
    """The values that outputs are, or may be views of."""
    held: set[Expr] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in held:
            held.add(node)
            stack += () if memory.is_own(node) else operands.get(node, ())
    return held
