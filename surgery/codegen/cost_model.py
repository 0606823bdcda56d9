"""Cost model: operations and memory traffic of a training step, from shapes and the number of tokens.

Takes the expressions of a program; gives a `Cost` of one training step. Promises: counted and not measured; the
seconds that a `Machine` takes are only meant for comparing programs of the same formula. Where the gradients of a body
are known as expressions they are counted as they are; elsewhere a backward pass costs as much as the forward one, for
each argument that takes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from surgery.codegen.gradients import Gradients, gradients
from surgery.codegen.operation_counts import flops, is_accumulated, is_taken_in, moved, size
from surgery.codegen.two_ways import ways
from surgery.ir.expression import Expr, walk
from surgery.ir.graph import readers, without_gradient
from surgery.ir.operations import is_ids, operation
from surgery.ir.table import Linear, When

TOKENS_SUPPOSED = 1024  # the number that a choice supposes where nothing is said


@dataclass(frozen=True)
class Machine:
    """What a device takes, in seconds: for one multiplication or addition, for moving one number between memory and
    processor, and for starting one operation from Python. `setup_flop`: for one in a set-up, which computes in float32
    at least (None: in the same dtype, and so as long as any)."""

    flop: float
    number: float
    launch: float
    setup_flop: float | None = None

    @property
    def rounds(self) -> bool:
        """Whether a set-up's values are rounded to a narrower dtype before a body reads them."""
        return self.setup_flop is not None

    @property
    def measured(self) -> dict[str, float]:
        """What is measured of a device in one dtype, by name: all but `setup_flop`, which is another dtype's."""
        return {"flop": self.flop, "number": self.number, "launch": self.launch}


# A core of a CPU, in float32. What it does in the time of moving a number differs little by dtype.
CPU = Machine(1 / 50e9, 30 / 50e9, 8e-6)
HELD = 100.0  # FLOP of such a core that it is worth not to hold a number from the forward to the backward pass
AGAIN = 10 * CPU.launch  # what making a set-up again costs beside making it


def frozen_last(device: str) -> bool:
    """Whether, on a type of device, a low-rank term is better made first and the frozen layer's product summed into it:
    the output is then written once, and read in that product's epilogue. A CPU has it in its cache, and reads it there
    for less than a product with an accumulator costs."""
    return device != "cpu"


def one_pass(device: str) -> bool:
    """Whether a type of device has kernels that do in one pass over activations what torch needs several for: CUDA,
    where torch brings Triton."""
    return device == "cuda"


@dataclass(frozen=True)
class Cost:
    """The cost of one step, forward and backward: `flops` that grow with the tokens and those of the set-up, numbers
    `moved`, and `calls` of an operation."""

    body_flops: float = 0.0
    setup_flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.body_flops + other.body_flops, self.setup_flops + other.setup_flops, self.moved + other.moved,
                    self.calls + other.calls)

    def times(self, n: float) -> Cost:
        return Cost(n * self.body_flops, n * self.setup_flops, n * self.moved, n * self.calls)

    @property
    def flops(self) -> float:
        return self.body_flops + self.setup_flops

    def seconds(self, machine: Machine = CPU) -> float:
        """The time on a machine, supposing that its parts do not overlap."""
        in_setup = machine.flop if machine.setup_flop is None else machine.setup_flop
        work = machine.flop * self.body_flops + in_setup * self.setup_flops
        return work + machine.number * self.moved + machine.launch * self.calls


@lru_cache(maxsize=4096)
def body_cost(body: Expr, needs: tuple[bool, ...], tokens: int = TOKENS_SUPPOSED) -> Cost:
    """The cost of a body over leaves `x` and `value`; `needs` says which of them take a gradient (x first)."""
    leaves, known = _leaves(body, needs), _gradients(body, needs)
    value, body = ways(body)
    if known is None:
        # autograd runs it backwards: as much again for each argument that a gradient goes through
        led = {node for node in walk(body) if not is_ids(node) and any(below in leaves for below in walk(node))}
        return _counted(walk(body), tokens, lambda node: 1 + sum(a in led for a in node.args))
    outputs = (value, *known.kept, *known.of)
    reads, nodes = readers(*outputs), list(walk(*outputs))
    total = _counted([node for node in nodes if not is_taken_in(node, reads)], tokens, lambda node: 1)
    return total + Cost(moved=-sum(size(node, tokens) for node in nodes if is_accumulated(node, reads)))


def _leaves(body: Expr, needs: tuple[bool, ...]) -> list[Expr]:
    """The leaves of a body that take a gradient."""
    inputs = (node for node in walk(*ways(body)) if operation(node).is_step_input)
    return [node for node in inputs if needs[node.data + 1 if isinstance(node.data, int) else 0]]


def has_gradients(body: Expr, needs: tuple[bool, ...]) -> bool:
    """True if every operation of the body has a gradient in the table."""
    return _gradients(body, needs) is not None


@lru_cache(maxsize=4096)
def _gradients(body: Expr, needs: tuple[bool, ...]) -> Gradients | None:
    first, second = ways(body)
    return gradients(first, _leaves(body, needs), second)


def _counted(nodes: Iterable[Expr], tokens: int, times: Callable[[Expr], int]) -> Cost:
    work = traffic = calls = 0.0
    for node in nodes:
        n = times(node)
        work += n * flops(node, tokens)
        traffic += n * moved(node, tokens)
        calls += 0.0 if operation(node).is_free else n
    return Cost(work, 0.0, traffic, calls)


def setup_cost(values: Sequence[Expr], fixed: Sequence[Expr]) -> Cost:
    """The cost of a set-up that computes `values`; what is `fixed` is computed once for many steps and costs
    nothing."""
    gradless = without_gradient(*values)
    total = Cost()
    for node in _made(values, fixed):
        takes = 0 if node in gradless else sum(a.has("param") for a in node.args)
        total += _once(node).times(1 + takes)
    return total + _not_moved(values, gradless)


def numbers_made(values: Sequence[Expr], fixed: Sequence[Expr]) -> float:
    """How many numbers a set-up computes, its values among them."""
    return sum(size(node, 0) for node in _made(values, fixed) if not operation(node).is_free)


def _made(values: Sequence[Expr], fixed: Sequence[Expr]) -> list[Expr]:
    """The nodes that a set-up computes at every step."""
    once = set(walk(*fixed)) - {node for root in fixed for node in root.args}
    return [node for node in walk(*values) if node not in once]


@lru_cache(maxsize=2**14)
def _once(node: Expr) -> Cost:
    """The cost of computing a node of a set-up."""
    return Cost(0.0, flops(node, 0), moved(node, 0), 0.0 if operation(node).is_free else 2.0)


def _not_moved(values: Sequence[Expr], gradless: Collection[Expr]) -> Cost:
    """What is saved where a sum that takes no gradient computes its term in one pass, as no value of its own."""
    terms, reads = set(), readers(*values)
    for node in (each for each in gradless if each.op == "add"):
        added = {a: operation(a).added for a in node.args}
        terms |= {a for a, way in added.items() if way is not None and way.when is When.WITHOUT_GRADIENT and way.fits(a)
                  and len(reads[a]) == 1 and a not in values}
    return Cost(moved=-sum(2 * size(term, 0) for term in terms), calls=-2.0 * len(terms))


def recompute_cost(values: Sequence[Expr], fixed: Sequence[Expr]) -> Cost | None:
    """The cost of recomputing a set-up in its backward pass; None if holding what it computed is cheaper: a choice of
    memory, and the same on all machines."""
    computed = _made(values, fixed)
    gradless = without_gradient(*values)
    # alive from the forward to the backward pass: the values, and what autograd needs for other gradients
    held = set(map(_viewed, values))
    for node in computed:
        row = operation(node)
        if node in gradless or row.linear is Linear.TOGETHER or row.stops_gradient:
            continue
        trains = [a.has("param") for a in node.args]
        if row.linear is Linear.EACH:  # the gradient of an argument needs the others
            held |= {_viewed(a) for i, a in enumerate(node.args) if any(trains[:i] + trains[i + 1:])}
        elif any(trains):
            held |= {_viewed(a) for a in (node, *node.args)}
    cost = sum(map(_once, computed), _not_moved(values, gradless))
    numbers = sum(size(node, 0) for node in set(computed) & held if not operation(node).is_free)
    return cost if cost.seconds() + AGAIN < HELD * CPU.flop * numbers else None


def _viewed(node: Expr) -> Expr:
    """The value whose memory this view shows."""
    return _viewed(node.args[0]) if operation(node).is_view else node
