"""W' in runs of its rows: a program that makes as many at a time as the memory is there for.

Takes the program of W' as a candidate; gives one of some rows, and one of what all of them have in common. Promises:
each row is computed by the operations, in their order, by which all of W' is; where a row rests on more of W than the
same row, there is no such program. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from surgery.codegen.candidates import Candidate, of_values, rests_on_layer
from surgery.ir.expression import Expr, walk
from surgery.ir.operations import operation
from surgery.ir.table import Source

Asked = dict[Expr, dict[int, None]]  # the axes along which rows of a node are asked for


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """`block` gives some rows of W' (and b'), for a layer of the same rows of W and b; `sliced` are the names of the
    leaves that it reads so many rows of, each with the adapter's key and the axis of them. `common` gives what it
    reads besides, under `names`; None where that is leaves alone."""

    block: Candidate
    sliced: Mapping[str, tuple[str, int]]
    common: Candidate | None
    names: tuple[str, ...]


@cache
def row_blocks(plan: Candidate) -> RowBlocks | None:
    """The programs of W' by rows; None if a row rests on other rows of W."""
    nodes = [*walk(*plan.values)]
    found = _asked(plan, nodes)
    if found is None:
        return None
    asked, needs = found
    common: dict[Expr, Expr] = {}
    sliced: dict[str, tuple[str, int]] = {}
    made: dict[Expr, Expr] = {}

    def whole(node: Expr) -> Expr:
        if operation(node).is_leaf:
            return node
        return common.setdefault(node, Expr("param", (), f"common.{len(common)}", node.shape))

    for node in (n for n in nodes if n in asked):
        if node.op == "param":
            (axis,) = asked[node]
            made[node] = Expr("param", (), f"rows of {node.data}", node.shape)
            sliced[made[node].data] = (node.data, axis)
        else:
            made[node] = node.with_args(tuple(whole(arg) if need is None else made[arg]
                                              for arg, need in zip(node.args, needs.get(node, ()))))
    return RowBlocks(of_values(tuple(made[value] for value in plan.values)), sliced,
                     of_values((*common,)) if common else None, tuple(leaf.data for leaf in common.values()))


def _asked(plan: Candidate, nodes: list[Expr]) -> tuple[Asked, dict[Expr, tuple[int | None, ...]]] | None:
    """Of which nodes rows are asked for, along which axis, and of which of its arguments each needs them; None where an
    operation does not work by rows, or two axes of one matrix would be cut."""
    asked: Asked = {value: {-len(value.shape): None} for value in plan.values}
    needs: dict[Expr, tuple[int | None, ...]] = {}
    for node in (n for n in reversed(nodes) if n in asked):  # after all that read it
        row = operation(node)
        if len(asked[node]) > 1:
            return None
        if row.source is Source.LAYER or node.op == "param":
            if node.op == "weight" and -2 not in asked[node]:
                return None
            continue
        (axis,) = asked[node]
        found = row.rows(node, axis) if row.rows is not None else None
        if found is None or any(need is None and rests_on_layer(arg) for arg, need in zip(node.args, found)):
            return None
        needs[node] = found
        for arg, need in zip(node.args, found):
            if need is not None:
                asked.setdefault(arg, {})[need] = None
    return asked, needs
