"""Second and third stage of emission: how long each value is needed, and then what is written over which of them.

Takes a schedule; gives the lifetimes of its values, and of those alone what each instruction writes over. Promises: a
value is written over only by the last instruction that reads its memory, and never if it is given, an output, or a view
of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.codegen.aliases import held_by, read_by
from surgery.codegen.schedule import Instruction, Region
from surgery.ir.expression import Expr


@dataclass(frozen=True)
class Lifetimes:
    """Of each value the places in the schedule that read its memory, by whatever name (`readers`), and the last that
    reads it by its own (`named`); the values that `stay` when the region ends."""

    readers: dict[Expr, frozenset[int]]
    named: dict[Expr, int]
    stay: set[Expr]


def lifetimes(region: Region, schedule: Sequence[Instruction]) -> Lifetimes:
    """The lifetimes of a schedule's values."""
    readers = read_by([(each.node, each.reads) for each in schedule], region.memory)
    named = {operand: i for i, each in enumerate(schedule) for operand in each.reads}
    return Lifetimes(readers, named, held_by(region.outputs, {e.node: e.reads for e in schedule}, region.memory))


def written_over(region: Region, schedule: Sequence[Instruction], alive: Lifetimes) -> list[Expr | None]:
    """For each instruction the value that it is written over, if there is one."""
    reads = {each.node: each.reads for each in schedule}

    def ends(base: Expr, at: int) -> bool:
        base = region.memory.shown(base)  # whoever reads a view of it reads it
        is_own = base in reads and base not in alive.stay and region.memory.may_end(base)
        places = alive.readers[base]
        # where autograd records, an earlier reader may need the value again, for a gradient: one reader alone ends it
        return is_own and (places == {at} if region.memory.recorded else max(places) == at)

    def is_read_by_another_operand(base: Expr, each: Instruction) -> bool:
        """Whether another operand of the instruction may show the same memory."""
        others = [operand for operand in each.reads if operand is not base]
        return each.reads.count(base) > 1 or region.memory.shown(base) in held_by(others, reads, region.memory)

    return [next((base for base in each.bases if ends(base, i) and not is_read_by_another_operand(base, each)), None)
            for i, each in enumerate(schedule)]
