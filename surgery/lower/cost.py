"""What a program costs: multiplications and memory traffic from shapes and the number of tokens, to choose by.

Takes the expressions of a program; gives a `Cost` of one training step. Promises: counted and not measured; `seconds` is
only meant for comparing programs of the same formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import log2, prod

from surgery.expr.dims import Dim
from surgery.expr.ir import Expr, walk
from surgery.lower.emit import without_gradient
from surgery.rewrite.terms import depends_on

TOKENS = 1024  # the number that a choice supposes where nothing is said
INTENSITY = 16.0  # multiplications and additions in the time of moving one number: CPUs have 10 to 40, GPUs more
# What is not computed: views, and what is there already.
MADE_ELSEWHERE = {"T", "split", "join", "detach", "param", "places", "weight", "bias", "x", "const", "eye", "drop", "reshape", "columns"}


@dataclass(frozen=True)
class Cost:
    """Of one step, forward and backward: `flops` that grow with the tokens and those of the set-up, numbers `moved`."""

    body_flops: float = 0.0
    setup_flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.body_flops + other.body_flops, self.setup_flops + other.setup_flops, self.moved + other.moved)

    @property
    def flops(self) -> float:
        return self.body_flops + self.setup_flops

    @property
    def seconds(self) -> float:
        """A time in arbitrary units."""
        return self.flops + INTENSITY * self.moved


def step_cost(outputs: Iterable[Expr], fixed: Iterable[Expr], tokens: int = TOKENS) -> Cost:
    """The cost of a training step of a program that gives `outputs`; what is `fixed` is computed once and costs nothing."""
    outputs = tuple(outputs)
    gradless = without_gradient(*outputs)
    on_input: dict[Expr, bool] = {}
    on_leaf: dict[Expr, bool] = {}
    seen = {node for root in fixed for node in walk(root)} - {node for root in fixed for node in root.args}
    total = Cost()
    for output in outputs:
        for node in walk(output):
            if node not in seen:
                seen.add(node)
                times = 1 if node in gradless else 1 + _gradients(node, on_input, on_leaf)
                total += _node_cost(node, tokens, times, depends_on(node, "x", on_input))
    return total


def _gradients(node: Expr, on_input: dict[Expr, bool], on_leaf: dict[Expr, bool]) -> int:
    """How many arguments take a gradient in the backward pass. An input does, unless it is token ids."""
    return sum(depends_on(a, "param", on_leaf) or depends_on(a, "x", on_input) and not _is_ids(a) for a in node.args)


def _node_cost(node: Expr, tokens: int, times: int, in_body: bool) -> Cost:
    """Of computing a node so many times, forward and backward."""
    if _is_ids(node):
        return Cost()
    if node.args and _is_ids(node.args[0]):  # rows are looked up
        return Cost(moved=2 * times * size(node, tokens))
    work = times * flops(node, tokens)
    moved = 0.0 if node.op in MADE_ELSEWHERE else times * (size(node, tokens) + sum(size(a, tokens) for a in node.args))
    return Cost(work if in_body else 0.0, 0.0 if in_body else work, moved)


def _is_ids(node: Expr) -> bool:
    return node.op == "x" and node.data == "ids" or node.op == "dropout" and _is_ids(node.args[0])


def size(node: Expr, tokens: int) -> float:
    """How many numbers a node's value has."""
    return float(prod(_known(s, tokens) for s in node.shape))


def _known(value: object, tokens: int) -> float:
    """A dimension with the number of tokens put in."""
    if not isinstance(value, Dim):
        return float(value)
    return float(sum((c * tokens ** sum(power for _, power in monomial) for monomial, c in value.terms), Fraction(0)))


def flops(node: Expr, tokens: int) -> float:
    """Multiplications and additions of computing a node once."""
    if node.op in MADE_ELSEWHERE:
        return 0.0
    rule = _RULES.get(node.op)
    return rule(node, lambda each: size(each, tokens)) if rule else size(node, tokens)


def _product(node: Expr, count: Callable[[Expr], float]) -> float:
    return 2 * count(node) * float(node.args[0].shape[-1])


def _frozen(node: Expr, count: Callable[[Expr], float]) -> float:
    return 2 * count(node) * float(node.args[0].shape[-1])


def _fourier(numbers: float) -> float:
    return 5 * numbers * log2(max(numbers, 2))


def _cubic(factor: float) -> Callable[[Expr, Callable[[Expr], float]], float]:
    return lambda node, count: factor * count(node) * float(node.shape[-1])


_RULES: dict[str, Callable[[Expr, Callable[[Expr], float]], float]] = {
    "matmul": _product,
    "frozen": _frozen,
    "frozen_back": _frozen,
    "run": lambda node, count: 2 * count(node) * float(node.args[1].shape[-1]),
    "blocks": lambda node, count: 2 * count(node) * float(node.args[1].shape[1]),
    "cayley": _cubic(3), "resolvent": _cubic(2), "mirrored": lambda node, count: 3 * count(node) * node.shape[0], "expm": _cubic(20), "phi": _cubic(160),
    "circulate": lambda node, count: _fourier(count(node.args[0])) + _fourier(count(node)) + 4 * count(node) * node.args[1].shape[1],
    "spectrum": lambda node, count: 2 * count(node) * node.args[1].shape[1],
    "waves": lambda node, count: 2 * count(node) * node.args[1].shape[0],
    "mixed": lambda node, count: 4 * count(node) * node.args[1].shape[2],
    "ifft2": lambda node, count: _fourier(count(node)),
    "reflect": lambda node, count: 4 * count(node) * float(node.args[0].shape[1]),
}
