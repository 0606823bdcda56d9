"""Alias analysis: which values may share memory, and which have memory of their own that may be written over.

Takes instructions; gives facts about memory that hold in whatever order they run. Promises: an operation that is not
known to allocate is taken to give a view of each of its operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from surgery.ir.expression import Expr
from surgery.ir.operations import operation
from surgery.ir.table import Memory


@dataclass(frozen=True)
class MemoryUse:
    """How a region may use memory. `recorded`: autograd records each line; `writes`: whether anything is written over
    at all; `is_called`: the layer is a module that is called."""

    recorded: bool = True
    writes: bool = False
    is_called: bool = False

    def is_own(self, node: Expr) -> bool:
        """True if computing this node allocates memory that no other value shares."""
        memory = operation(node).memory
        return memory is Memory.NEW or memory is Memory.OF_LAYER and not self.is_called

    def may_end(self, node: Expr) -> bool:
        """True if this value may be overwritten after its last read."""
        return self.writes and self.is_own(node) and (not self.recorded or operation(node).is_unkept)

    def shown(self, node: Expr) -> Expr:
        """The value whose memory is written over where this one is: itself, or what it is a view of, all of it. Where
        autograd records, no view is written over."""
        while (not self.recorded and operation(node).memory is Memory.VIEW
               and prod(node.shape) == prod(node.args[0].shape)):
            (node,) = node.args
        return node


def read_by(reads: Sequence[tuple[Expr, Sequence[Expr]]], memory: MemoryUse) -> dict[Expr, frozenset[int]]:
    """For each value, the numbers of the instructions that read its memory, directly or through a view. `reads` lists
    what each instruction computes and what it reads, operands before their readers."""
    readers: dict[Expr, frozenset[int]] = {}
    # from the last to the first, so that all who read a view are known when what it shows is met
    for i, (node, operands) in reversed(list(enumerate(reads))):
        through = frozenset() if memory.is_own(node) else readers.get(node, frozenset())
        for operand in operands:
            readers[operand] = readers.get(operand, frozenset()) | {i} | through
    return readers


def held_by(outputs: Iterable[Expr], operands: Mapping[Expr, Sequence[Expr]], memory: MemoryUse) -> set[Expr]:
    """The outputs, and every value that an output may be a view of."""
    held: set[Expr] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in held:
            held.add(node)
            stack += () if memory.is_own(node) else operands.get(node, ())
    return held
