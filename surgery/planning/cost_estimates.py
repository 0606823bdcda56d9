"""What an operated weight costs by the cost model: a step over the frozen layer's own, and what is built for it.

Takes a formula compiled for a kind of layer, and the number of tokens; gives an `Estimate`. Promises: counted from
shapes and not measured (`surgery bench` measures); no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from surgery.codegen.apply_to_activations import turned
from surgery.codegen.candidates import Candidate, frozen_alone, is_of_weight
from surgery.codegen.compiled import Compiled
from surgery.codegen.cost_model import CPU, TOKENS_SUPPOSED, Cost, Machine, body_cost
from surgery.codegen.operation_counts import flops
from surgery.diagnostics import Diagnostic
from surgery.ir.expression import Expr, walk
from surgery.ir.notation import brief
from surgery.ir.operations import operation, shape_text
from surgery.ir.sizes import known_shape
from surgery.language.tree import Target
from surgery.layers.kinds import LayerKind

FLOAT = 4  # bytes of a number in float32
_LONGEST = 60  # columns of an expression in a message


@dataclass(frozen=True)
class Estimate:
    """The costs of one weight's programs. `stack`: how many matrices the tokens are spread over; `builds`: W' of each
    is built, whichever tokens reach it, for a layer that only its own forward knows, which then runs with it."""

    compiled: Compiled
    tokens: int = TOKENS_SUPPOSED
    stack: int = 1
    builds: bool = False
    training: bool = True
    machine: Machine = CPU

    @property
    def kind(self) -> LayerKind:
        return self.compiled.kind

    @property
    def sides(self) -> tuple[int, int]:
        out, in_ = known_shape(self.compiled.formula.weight.shape)
        return out, in_

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The programs, the one that runs first."""
        return self.compiled.candidates(self.training, self._each, self.machine)

    @property
    def _each(self) -> int:
        """The tokens of one matrix."""
        return max(1, self.tokens // self.stack)

    @cached_property
    def frozen(self) -> Cost:
        """A step of the frozen layer, of one matrix of a stack: forward, and backward to its input."""
        return body_cost(frozen_alone(self.kind, *self.sides), (not self.kind.takes_ids,), self._each)

    def ratio(self, candidate: Candidate | None = None) -> float:
        """A step of a program (the one that runs, if none is given) as a multiple of the frozen layer's."""
        return self.seconds(candidate) / self.frozen_seconds

    def seconds(self, candidate: Candidate | None = None) -> float:
        """The time of a step on the machine."""
        runs = next(c for c in self.candidates if c.strategy == "built weight") if self.builds else self.candidates[0]
        return self.stack * (candidate or runs).cost(self._each).seconds(self.machine)

    @property
    def frozen_seconds(self) -> float:
        """The same of the frozen layer."""
        return self.stack * self.frozen.seconds(self.machine)

    @cached_property
    def built(self) -> tuple[Expr, ...]:
        """The matrices as large as a side of the weight that the most structured program makes at every step, the
        costliest first; none if the formula has a cheap program."""
        return min((large_matrices(c, self.kind, *self.sides) for c in self.candidates), key=len)

    @cached_property
    def again(self) -> tuple[Expr, ...]:
        """What the program that runs makes anew at every step though it follows from the frozen weight alone, where it
        is half the work of the frozen layer's step; the costliest first."""
        work = {node: flops(node, 0) for node in walk(*self.candidates[0].values) if is_of_weight(node)}
        costly = (node for node, each in work.items() if 2 * each > self.frozen.flops)
        return tuple(sorted(costly, key=lambda node: -work[node]))

    @property
    def cost_text(self) -> str:
        """`at [1024, 4096] and 1,024 tokens a step costs 2.1 x the frozen layer's: 43 GFLOP, 210 MB moved`."""
        cost = self.candidates[0].cost(self._each)
        return (f"at {shape_text(self.sides)} and {self._each:,} tokens a step costs {self.ratio():.2f} x the frozen "
                f"layer's: {amount(cost.flops, 'FLOP')}, {amount(FLOAT * cost.moved, 'B')} moved in float32")


def large_matrices(candidate: Candidate, kind: LayerKind, out: int, in_: int) -> tuple[Expr, ...]:
    """What the set-up makes anew at every step and is no thin matrix beside a weight [out, in]."""
    fixed = set(walk(*candidate.fixed))
    nodes = list(walk(*candidate.values))
    large = [n for n in nodes if n not in fixed and not operation(n).is_free and len(n.shape) > 1
             and kind.is_large(known_shape(n.shape[-2:]), out, in_)]
    return tuple(sorted(large, key=lambda node: -flops(node, 0)))


def fallback(target: Target, estimates: Iterable[Estimate]) -> Diagnostic | None:
    """The warning that a target runs dense, or makes anew at every step what stays the same, with its largest cost;
    None if nothing of it does."""
    estimates = list(estimates)
    if again := [e for e in estimates if e.again]:
        worst = max(again, key=Estimate.ratio)
        return _told(target, worst, worst.again[0], "every step makes anew what follows from the frozen weight alone",
                     "made once, it is a parameter: `frozen param U[out, 8] = left_singular(W, 8)`")
    if not (dense := [e for e in estimates if e.built]):
        return None
    worst = max(dense, key=Estimate.ratio)
    # A program may make the transpose of what the spec wrote, which can be much longer: the shorter one is shown.
    matrix = next((each for each in worst.built if each.has("param")), worst.built[0])
    return _told(target, worst, min((matrix, turned(matrix)), key=lambda each: len(brief(each))),
                 "this target has no cheap program and runs dense")


def _told(target: Target, estimate: Estimate, made: Expr, message: str, *helps: str) -> Diagnostic:
    text = brief(made)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST - 3]}..."
    return Diagnostic("fallback", message, target.span, severity="warning", helps=helps,
                      notes=(f"every step makes {text}, {shape_text(made.shape)}", estimate.cost_text))


def amount(number: float, unit: str) -> str:
    """A number with its unit: `43.1 GFLOP`."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while number >= 1000 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    return f"{number:.3g} {prefixes[0]}{unit}"
