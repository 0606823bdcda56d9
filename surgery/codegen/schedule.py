"""First stage of emission: which instructions there are, with what is fused into each, and their order.

Takes the expressions of a region; gives instructions, operands first. Promises: an instruction that could write over a
value comes after everything else that reads that value, where that is possible without a circle; whether it does write
is decided later, of the order alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.codegen.aliases import MemoryUse, held_by, read_by
from surgery.ir.builders import scaled, value_of
from surgery.ir.expression import Expr
from surgery.ir.operations import operation
from surgery.ir.table import ADD, ADDCMUL, Form, When


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line: the value `node`, of the values `reads`, by an instruction `form` (None: the node's own). It may write
    over one of `bases`, the best first. `factor` is the number in front of what a sum adds."""

    node: Expr
    reads: tuple[Expr, ...]
    form: Form | None = None
    factor: float = 1.0
    bases: tuple[Expr, ...] = ()


@dataclass(frozen=True)
class Region:
    """What is to be computed: `outputs`, of values that are `given`, the `gradless` ones without a gradient.
    `frozen_last`: the frozen layer's product is summed into a thin one's, and not that into the layer's output."""

    outputs: tuple[Expr, ...]
    given: Collection[Expr]
    memory: MemoryUse = MemoryUse()
    gradless: frozenset[Expr] = frozenset()
    frozen_last: bool = False
    uses: Counter[Expr] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.uses.update(self.outputs)
        for node in self.nodes():
            self.uses.update(node.args)

    def nodes(self) -> Iterator[Expr]:
        """What is not given, arguments first."""
        return _ordered(self.outputs, lambda node: () if node in self.given else node.args)

    def is_once(self, *nodes: Expr) -> bool:
        """Whether each is read in one place alone."""
        return all(self.uses[node] == 1 and node not in self.given for node in nodes)


def scheduled(region: Region) -> list[Instruction]:
    """The instructions of a region in their order."""
    instructions = {node: _instruction(region, node) for node in region.nodes()
            if node not in region.given and not operation(node).is_inline}
    operands = {node: instruction.reads for node, instruction in instructions.items()}
    # what is computed in another instruction is read by that one alone, and so is not met
    first = list(_ordered(region.outputs, lambda node: operands.get(node, ())))
    late = {**_late(region, [instructions[node] for node in first if node in operands], operands), **_in_pairs(first)}
    order = _ordered(region.outputs, lambda node: (*operands.get(node, ()), *late.get(node, ())))
    return [instructions[node] for node in order if node in operands]


def _ordered(roots: Sequence[Expr], below: Callable[[Expr], Sequence[Expr]]) -> Iterator[Expr]:
    """Every node under the roots once, what is below it first."""
    done: set[Expr] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done.add(node)
            yield node
        else:
            stack += [(node, True), *((each, False) for each in reversed(below(node)))]


def _in_pairs(nodes: Sequence[Expr]) -> dict[Expr, list[Expr]]:
    """For the first of two values that are computed together the second, which is then named at once: as long as the
    pair is there it holds both."""
    second = {node.args[0]: node for node in nodes if node.op == "part" and node.data == (1,)}
    return {node: [second[node.args[0]]] for node in nodes
            if node.op == "part" and node.data == (0,) and node.args[0] in second}


def _late(region: Region, instructions: Sequence[Instruction],
          operands: Mapping[Expr, Sequence[Expr]]) -> dict[Expr, list[Expr]]:
    """For an instruction's value the values that are to be there before, so that it is the last to read its base."""
    if region.memory.recorded:  # there nothing is written over that has a second reader
        return {}
    late: dict[Expr, list[Expr]] = {}
    seen = read_by([(each.node, each.reads) for each in instructions], region.memory)
    held = held_by(region.outputs, operands, region.memory)
    for i, instruction in enumerate(instructions):
        for base in instruction.bases:
            shown = region.memory.shown(base)
            others = [instructions[j].node for j in sorted(seen.get(shown, frozenset()) - {i})]
            fits = shown in operands and shown not in held and region.memory.may_end(shown)
            if not fits or instruction.reads.count(base) > 1:
                continue
            if not others:
                break
            if instruction.node not in _ordered(others, lambda n: (*operands.get(n, ()), *late.get(n, ()))):
                late[instruction.node] = others
                break
    return late


# ----------------------------------------------------------------------------------------------------------- fusion


def _instruction(region: Region, node: Expr) -> Instruction:
    """The node's own operation, or one in which a part of what it reads is computed too."""
    own = not region.memory.recorded
    if node.op == "add" and node.shape and all(a.shape == node.shape for a in node.args):
        both = (node.args, node.args[::-1])
        tried = (_summed_onto, _term_added) if region.frozen_last else (_term_added, _summed_onto)
        ways = (way(region, node, y, z) for way in (*tried, _multiple_added) for y, z in both)
        return next(filter(None, ways), None) or Instruction(node, node.args, ADD, bases=node.args if own else ())
    if node.op == "add_bias":
        y, b = node.args
        if y.op == "scale" and region.is_once(y):  # y diag(d) + b in one pass
            return Instruction(node, (b, *y.args), ADDCMUL)
        return Instruction(node, node.args, ADD, bases=(y,))
    if node.op == "mul" and (times := _product_times(region, node)) is not None:
        return times
    if own and (over := operation(node).in_place) is not None:
        return Instruction(node, node.args, over.form, bases=over.bases(node))
    return Instruction(node, node.args)


def _term_added(region: Region, node: Expr, y: Expr, term: Expr) -> Instruction | None:
    """y + c z for a z that is then no value of its own: a product, of matrices or entries, or a sparse matrix."""
    factor, z = _multiple(term)
    way = operation(z).added
    if factor is None or way is None or not way.fits(z) or not way.scales and factor != 1.0:
        return None
    # autograd does not see through a kernel of ours
    unseen = way.when is When.IN_STEP or z not in region.gradless
    if way.when is not When.ALWAYS and region.memory.recorded and unseen:
        return None
    inside = way.takes(z)
    if not region.is_once(*{term, z}, *inside):
        return None
    reads = [each for a in z.args for each in (a.args if a in inside else (a,))]
    return Instruction(node, (y, *reads), way.form, factor, (y,) if way.form.writes else ())


def _summed_onto(region: Region, node: Expr, y: Expr, term: Expr) -> Instruction | None:
    """c y + z for the frozen layer's product z, which is summed into y: no pass over z."""
    (factor, y), form = _multiple(base := y), operation(term).onto
    is_fresh = not operation(y).is_inline and region.memory.is_own(region.memory.shown(y)) and region.is_once(
        *{base, y}, term)
    if form is None or factor is None or term.data is not None or region.memory.recorded or not is_fresh:
        return None
    return Instruction(node, (y, *term.args), form, factor, (y,))


def _multiple_added(region: Region, node: Expr, y: Expr, term: Expr) -> Instruction | None:
    """y + c z. Not of a product, detached or not, where a compiler may look on: torch 2.13's forgets the factor."""
    factor, z = _multiple(term)
    own, seen = not region.memory.recorded, z.args[0] if z.op == "detach" else z
    if factor in (None, 1.0) or not region.is_once(term) or not own and operation(seen).is_matmul:
        return None
    return Instruction(node, (y, z), ADD, factor, (y,) if own else ())


def _product_times(region: Region, node: Expr) -> Instruction | None:
    """c z for a product z that is computed with the number in front."""
    factor, z = _multiple(node)
    form = operation(z).times
    if factor in (None, 1.0) or form is None or not region.is_once(z):
        return None
    return Instruction(node, z.args, form, factor)


def _multiple(term: Expr) -> tuple[float | None, Expr]:
    """(c, z) of c z for a known number c, which is 1 for what has no scalar in front; (None, z) for an unknown one."""
    scalar, rest = scaled(term)
    return 1.0 if scalar is None else value_of(scalar), rest
