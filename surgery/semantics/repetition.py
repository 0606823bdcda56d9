"""`for` in a target: its steps written out, once for each number.

Takes the steps of a target with the compile-time values that they see; gives steps without `for`, in which numbers
stand in the place of the variables. Promises: a bound that no size decides yet gives the steps once, the variable being
unknown; nothing is repeated without bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from surgery.diagnostics import Collector, fail
from surgery.ir.sizes import Dim, is_real, symbol
from surgery.language.expressions import Argument, Expression, Name, as_expression
from surgery.language.formatter import expression_text, for_text
from surgery.language.tree import For, Repeat, Step
from surgery.semantics.arguments import guard
from surgery.semantics.evaluate import evaluate, here
from surgery.semantics.scope import TAKEN_IN_TARGETS, assert_is_free, describe

MOST_STEPS = 1000  # of a target, written out


@dataclass(frozen=True)
class WrittenOut:
    """A step as it stands for one number of each `for` around it. `unknown` are the variables whose bounds no size has
    decided, and `times` says so: `for i in 0..log2(in)`."""

    step: Step
    unknown: Mapping[str, Any] = field(default_factory=dict)
    times: str = ""

    def as_one_unknown(self, value: Any) -> Any:
        """A sum in which such a variable stands (`2 * i + 2`) as one unknown: then n / (2 * i + 2) times it is n."""
        is_sum = isinstance(value, Dim) and len(value.terms) > 1 and not value.symbols().isdisjoint(self.unknown)
        return symbol(f"({value})", is_real(value)) if is_sum else value


def written_out(steps: Iterable[Step | Repeat], values: Mapping[str, Any], report: Collector) -> list[WrittenOut]:
    """The steps where `values` are in scope. Reports a bound that is none, and more steps than there can be."""
    found: list[WrittenOut] = []
    with guard(report):
        for step in _steps(steps, values, WrittenOut(Step.model_construct())):
            found.append(step)
            if len(found) > MOST_STEPS:
                raise fail("too-large", f"this target has more than {MOST_STEPS:,} steps", step.step.span)
    return found


def _steps(steps: Iterable[Step | Repeat], values: Mapping[str, Any], around: WrittenOut) -> Iterator[WrittenOut]:
    for each in steps:
        if isinstance(each, Step):
            yield replace(around, step=each)
        else:
            yield from _repeated(each, values, around)


def _repeated(repeat: Repeat, values: Mapping[str, Any], around: WrittenOut) -> Iterator[WrittenOut]:
    name = repeat.name
    assert_is_new(repeat, TAKEN_IN_TARGETS, values)
    first, end = bounds(repeat, values)
    if isinstance(first, Dim) or isinstance(end, Dim):  # which of them there are is not known: once, for any of them
        unknown = {**around.unknown, name: symbol(name)}
        times = " ".join(filter(None, [around.times, for_text(repeat)]))
        yield from _steps(repeat.steps, {**values, name: symbol(name)}, replace(around, unknown=unknown, times=times))
        return
    for number in range(first, end):
        steps = (with_values(each, {name: as_expression(number)}) for each in repeat.steps)
        yield from _steps(steps, {**values, name: number}, around)


def assert_is_new(loop: For, taken: Iterable[str], values: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raises: SurgeryError (duplicate-name), if the variable is one of the names that mean something everywhere, or of
    those that have a value where the `for` stands."""
    place, report = loop.name_span or loop.span, Collector()
    assert_is_free(loop.name, taken, place, report)
    if not report.errors and loop.name in values:
        report.error("duplicate-name", f"`{loop.name}` has a value here already", place,
                     helps=("give the variable another name",))
    report.raise_errors()


def bounds(loop: For, values: Mapping[str, Any]) -> tuple[int | Dim, int | Dim]:
    """The first number of a `for` and the one behind its last. Raises: SurgeryError (wrong-type)."""
    return _bound(loop.first, values), _bound(loop.end, values)


def _bound(bound: Expression, values: Mapping[str, Any]) -> int | Dim:
    value = evaluate(bound, values)
    if isinstance(value, bool) or not isinstance(value, (int, Dim)) or is_real(value):
        raise fail("wrong-type", f"a bound of `for` must be a whole number, not {describe(value)}", bound.span,
                   notes=here(bound, values), helps=(f"write `floor({expression_text(bound)})`",)
                   if isinstance(value, float) else ())
    return value


def with_values(node: Any, values: Mapping[str, Expression]) -> Any:
    """A step, a repetition or an expression with values in the place of names."""
    if isinstance(node, Name):
        return replace(values[node.id], span=node.span) if node.id in values else node
    if isinstance(node, tuple):
        return tuple(with_values(each, values) for each in node)
    if isinstance(node, (Step, Repeat)):
        parts = ("call", "dropout") if isinstance(node, Step) else ("first", "end", "steps")
        return node.model_copy(update={part: with_values(getattr(node, part), values) for part in parts})
    if not isinstance(node, (Expression, Argument)):
        return node
    return replace(node, **{f.name: with_values(getattr(node, f.name), values) for f in fields(node) if f.compare})
