"""From a target's steps to the formula of one module: W' and b' as expressions over the adapter's leaves.

Takes a target, the library in scope, the compile-time values and the module's sizes (symbolic or known); gives a
`Formula`. Promises: shapes are checked here and nowhere later; all the mistakes of the steps are reported at once,
each at its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from surgery.diagnostics import Collector, fail
from surgery.ir.expression import DEEPEST_FORMULA, Claim, Expr, Formula, Leaf, Part
from surgery.ir.operations import make
from surgery.ir.sizes import Size
from surgery.language.library import Library, instead_of_step
from surgery.language.tree import Definition, Step, Target
from surgery.semantics.arguments import bind_call, guard
from surgery.semantics.definitions import Instance, not_too_deep, with_article
from surgery.semantics.evaluate import evaluate
from surgery.semantics.repetition import WrittenOut, written_out
from surgery.semantics.scope import describe, unknown

_KINDS = {"pre": "transform", "post": "transform", "add": "update"}


@dataclass(frozen=True)
class Context:
    """What the steps of a target see: the library, the compile-time values (the spec's parameters, `layer`, `depth`),
    and the name under which the target's shared parameters are kept."""

    library: Library
    values: Mapping[str, Any]
    group: str = "0"


def elaborate(target: Target, context: Context, out: Size, in_: Size, report: Collector,
              has_bias: bool = True) -> Formula | None:
    """The formula of a target for a weight [out, in]; None when a mistake was reported. Without a bias, what is added
    to it is left out."""
    before = len(report.errors)
    builder = _Builder(context, out, in_, report, has_bias)
    steps = written_out(target.steps, builder.values, report)
    if not steps and len(report.errors) == before:
        report.error("bad-value", "nothing is left of this target: each `for` of it repeats its steps no time",
                     target.span)
    names = step_names(each.step for each in steps)
    # W' = post(pre(W) + updates), in whatever order the steps stand; of one placement, in their own order
    for placement in ("pre", "add", "post"):
        for each, name in zip(steps, names):
            if each.step.placement == placement and not builder.is_too_deep:  # which is told once
                builder.place(each, name)
    return builder.formula() if len(report.errors) == before else None


def step_names(steps: Iterable[Step]) -> list[str]:
    """A name for each step, its adapter's own: `add_low_rank`, and `add_low_rank_2` for a second one."""
    seen: dict[str, int] = {}
    names = []
    for step in steps:
        base = f"{step.placement}_{step.call.function}"
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base}_{seen[base]}")
    return names


class _Builder:
    """Builds W' step by step. `plain` is the operand that transforms name `W`: the same sum without dropout, which acts
    on an update's input and not on the weight."""

    def __init__(self, context: Context, out: Size, in_: Size, report: Collector, has_bias: bool):
        self.context, self.report, self.has_bias = context, report, has_bias
        self.sizes = {"out": out, "in": in_}
        self.values: Mapping[str, Any] = {**context.values, **self.sizes}
        self.weight = self.x = self.plain = Expr("weight", (), None, (out, in_))
        self.bias = self.frozen_bias = Expr("bias", (), None, (out,))
        self.leaves: list[Leaf] = []
        self.common: list[Leaf] = []
        self.claims: list[Claim] = []
        self.parts: list[Part] = []

    @property
    def is_too_deep(self) -> bool:
        return max(self.x.depth, self.bias.depth) > DEEPEST_FORMULA

    def formula(self) -> Formula:
        return Formula(self.x, self.bias, tuple(self.leaves), tuple(self.claims), tuple(self.parts))

    def place(self, each: WrittenOut, name: str) -> None:
        """Put a step on top of what stands; what is wrong with it is reported."""
        step, rate = each.step, 0.0
        with guard(self.report):  # one of its own, so that a wrong rate hides no mistake in the call
            if step.dropout is not None:
                p = evaluate(step.dropout, {**self.values, **each.unknown})
                if isinstance(p, bool) or not isinstance(p, (int, float, Fraction)):
                    raise fail("wrong-type", f"dropout must be a number, not {describe(p)}", step.dropout.span)
                if not 0 <= p < 1:
                    raise fail("bad-value", f"dropout must be at least 0 and less than 1, not {float(p):g}",
                               step.dropout.span, helps=("write 5% or 0.05",))
                rate = float(p)
        with guard(self.report):
            definition = self._definition(step)
            if definition.bias and not self.has_bias:
                return
            # An update sees the frozen weight, wherever it stands; a transform sees what stands before it.
            operand = self.weight if step.placement == "add" else self.plain
            plain = self._instance(each, name, definition, operand)
            if plain is not None:
                part = plain
                if rate and step.placement == "add" and not definition.bias:
                    part = Expr("drop", (plain,), (rate, name), plain.shape)
                self.parts.append(Part(step, part, operand, each.times))
                self._put(step, definition, part, plain)
                not_too_deep(self.x, step.span)
                not_too_deep(self.bias, step.span)

    def _instance(self, each: WrittenOut, name: str, definition: Definition, operand: Expr) -> Expr | None:
        before, step = len(self.report.errors), each.step
        values = bind_call(step.call, definition, {**self.values, **each.unknown}, self.report)
        values = {name: each.as_one_unknown(value) for name, value in values.items()}
        if len(self.report.errors) > before:
            return None
        side = {definition.dim: self.sizes[step.side]} if definition.dim else {}
        side |= {"b": self.frozen_bias} if definition.bias else {}
        # the mistakes of the body are gathered apart, since each is told with the step that places the definition
        within = Collector()
        instance = Instance(definition, name, {**values, **self.sizes, **side, "W": operand}, within,
                            self.context.library.definitions, self.context.group, common=self.common,
                            before=self.leaves)
        result = instance.run()
        for diagnostic in within.found:
            placed = ((step.call.span, "placed here"),) if step.call.span else ()
            self.report.add(replace(diagnostic, related=(*diagnostic.related, *placed)))
        self.leaves += instance.leaves
        self.claims += instance.claims
        return result

    def _definition(self, step: Step) -> Definition:
        known, call = self.context.library.definitions, step.call
        kind, place = _KINDS[step.placement], call.name_span or call.span or step.span
        if call.function not in known:
            fitting = [n for n, d in known.items() if d.kind == kind]
            raise unknown("unknown-definition", kind, call.function, fitting, place, instead_of_step(call.function))
        if known[call.function].kind != kind:
            other = "add" if kind == "transform" else "pre` or `post"
            raise fail("wrong-kind", f"`{step.placement}` needs {with_article(kind)}, and {call.function} is "
                       f"{with_article(known[call.function].kind)}", place, helps=(f"place it with `{other}`",))
        return known[call.function]

    def _put(self, step: Step, definition: Definition, part: Expr, plain: Expr) -> None:
        """What a step says is done to W' and b'; `plain`: the part without dropout."""
        if step.placement == "add" and definition.bias:
            if step.dropout is not None:
                raise fail("wrong-kind",
                           f"dropout acts on an update's input, and {step.call.function} is added to the bias",
                           step.dropout.span)
            self.bias = make("add", self.bias, part)
        elif step.placement == "add":
            self.x, self.plain = make("add", self.x, part), make("add", self.plain, plain)
        elif step.side == "out":
            self.x, self.plain = make("matmul", part, self.x), make("matmul", part, self.plain)
            if step.bias:
                self.bias = make("matmul", part, self.bias)
        else:
            self.x, self.plain = make("matmul", self.x, part), make("matmul", self.plain, part)
            if step.bias:
                raise fail("wrong-kind", "`with bias` needs a transform `on out`: the bias is a column of the output",
                           step.span)
