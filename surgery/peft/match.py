"""Which method of PEFT's a spec is: told by its formula, whatever the spec is called.

Takes a plan; gives the configuration with which PEFT does the same to the same modules, or None. Promises: a match is a
proof: on every module the row's spec, given the spec's own parameters, has the very formula that the plan has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.compile import Placed, Plan
from surgery.diagnostics import Collector, SurgeryError
from surgery.expr.elaborate import Context, elaborate
from surgery.expr.ir import Formula
from surgery.expr.lint import spec_values
from surgery.peft.method import Family, Method, Place
from surgery.peft.methods import METHODS
from surgery.spec import library
from surgery.syntax.tree import Spec


@dataclass(frozen=True)
class Match:
    """PEFT's `family` with the fields of its configuration, and the row for each module's name."""

    family: Family
    fields: Mapping[str, Any]
    methods: Mapping[str, Method]

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the family's configuration class."""
        return {**self.fields, "target_modules": list(self.methods)}


def match(plan: Plan) -> Match | None:
    """The one configuration of PEFT's that is all of the plan's targets; None where there is none."""
    if plan.train or any(p.site.stack is not None or p.target.untie for p in plan.placed):
        return None
    found = [_of_module(plan.spec, placed) for placed in plan.placed]
    if not found or None in found or any((m.family, c) != (found[0][0].family, found[0][1]) for m, c in found):
        return None
    return Match(found[0][0].family, found[0][1], {p.site.name: m for p, (m, _) in zip(plan.placed, found)})


def _of_module(spec: Spec, placed: Placed) -> tuple[Method, dict[str, Any]] | None:
    values = spec_values(spec, Collector())
    for method in METHODS:
        ours = _named_alike(method, values)
        if method.is_on(Place.of(placed.site)) and ours is not None and _same(ours, placed):
            return method, method.config(values)
    return None


def _named_alike(method: Method, values: Mapping[str, Any]) -> Spec | None:
    """The row's spec with these parameters, if it has parameters of just these names and types."""
    try:
        bound = method.of(values)
    except SurgeryError:
        return None
    return bound if {p.name for p in bound.params} == set(values) else None


def _same(spec: Spec, placed: Placed) -> bool:
    return any(formula == (placed.formula.weight, placed.formula.bias) for formula in _formulas(spec, placed))


def _formulas(spec: Spec, placed: Placed) -> Iterator[tuple]:
    """W' and b' as each target of a spec has them at a module's sizes."""
    report = Collector()
    context = Context(library(spec), spec_values(spec, report))
    for target in spec.targets:
        formula: Formula | None = elaborate(target, context, placed.site.out, placed.site.in_, report)
        if formula is not None:
            yield formula.weight, formula.bias
