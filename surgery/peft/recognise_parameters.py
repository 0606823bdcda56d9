"""Propose values of a known method's parameters that would make its spec equal to another; the caller proves them.

Takes the spec of a row of PEFT's table and a module as a plan has it; gives values to try. Promises: none but that
they come from the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.diagnostics import Collector, SurgeryError
from surgery.language.expressions import Expression, Name, Number
from surgery.language.library import Library, library
from surgery.language.tree import Call, Spec, Step, Target
from surgery.planning.compile import Placed
from surgery.semantics.evaluate import evaluate, names_in
from surgery.semantics.repetition import written_out
from surgery.semantics.resolved_spec import PLACES, spec_values

Pairs = Iterator[tuple[str, Expression]]
_NO_DROPOUT = Number(0)


def proposals(row: Spec, spec: Spec, placed: Placed) -> Iterator[dict[str, Any]]:
    """Values for the row's parameters: for each of its targets with the same steps, what stands in their places."""
    sizes = {"out": placed.site.out, "in": placed.site.in_}
    place = {name: value for name in PLACES if (value := getattr(placed.site, name)) is not None}
    values = {**sizes, **place, **spec_values(spec, Collector())}
    names, start = {p.name for p in row.params}, spec_values(row, Collector())
    mine, theirs, given = library(row), library(spec), _ordered(placed.target, values)
    for target in row.targets:
        steps = _ordered(target, {**start, **sizes})
        if _named(steps) != _named(given):
            continue
        proposed: dict[str, Any] = {}
        for name, expression in _pairs(steps, mine, given, theirs):
            if name in names:
                try:
                    proposed[name] = evaluate(expression, values)
                except SurgeryError:  # as where it depends on a side of the weight: the proof will fail
                    proposed[name] = None
        # A parameter that stands in the steps must have come from them; any other keeps its default.
        if proposed.keys() >= {name for step in steps for name in names_in(step) if name in names}:
            yield start | proposed


def _named(steps: Sequence[Step]) -> list[tuple[str, str]]:
    return [(step.placement, step.call.function) for step in steps]


def _ordered(target: Target, values: Mapping[str, Any]) -> list[Step]:
    """The steps in the order in which they act, each as often as it does."""
    steps = [each.step for each in written_out(target.steps, values, Collector())]
    return [step for placement in ("pre", "add", "post") for step in steps if step.placement == placement]


def _pairs(row: Sequence[Step], mine: Library, given: Sequence[Step], theirs: Library) -> Pairs:
    """The names of the row, each with what stands there in the target."""
    for ours, other in zip(row, given):
        said = _arguments(other.call, theirs)
        for formal, expression in _arguments(ours.call, mine).items():
            if formal in said:
                yield from _under(expression, said[formal])
        yield from _under(ours.dropout or _NO_DROPOUT, other.dropout or _NO_DROPOUT)


def _arguments(call: Call, scope: Library) -> dict[str, Expression]:
    """What a call gives to each formal parameter, or what that is by default."""
    formals = scope.definitions[call.function].params
    given = {p.name: p.default for p in formals if p.default is not None}
    names = [p.name for p in formals]
    return given | {a.name or names[i]: a.value for i, a in enumerate(call.arguments)}


def _under(pattern: Expression, given: Expression) -> Pairs:
    """A name takes all that stands in its place; what is not built alike gives nothing."""
    if isinstance(pattern, Name):
        yield pattern.id, given
    elif type(pattern) is type(given):
        for one, other in zip(_parts(pattern), _parts(given)):
            yield from _under(one, other)


def _parts(node: Expression) -> list[Expression]:
    held = [getattr(node, name) for name, f in node.__dataclass_fields__.items() if f.compare]
    flat = [each for value in held for each in (value if isinstance(value, tuple) else (value,))]
    return [getattr(each, "value", each) if not isinstance(each, Expression) else each for each in flat
            if isinstance(each, Expression) or hasattr(each, "value")]
