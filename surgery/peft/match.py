"""Which method of PEFT's a spec is: told by its formula, whatever the spec is called.

Takes a plan; gives the configuration with which PEFT does the same to the same modules, or None. Promises: a match is a
proof: on every module the row's spec, given the spec's own parameters, has the very formula that the plan has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from surgery.compile import Placed, Plan
from surgery.diagnostics import Collector, SurgeryError
from surgery.expr.elaborate import Context, elaborate
from surgery.expr.ir import Formula
from surgery.expr.lint import spec_values
from surgery.peft.method import Family, Method
from surgery.peft.methods import METHODS
from surgery.peft.tensors import Place
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
        lists = {f: [name for name, m in self.methods.items() if m.settings.get(f)] for f in self.family.lists}
        return {**self.fields, **lists, "target_modules": list(self.methods)}

    @property
    def rewritten(self) -> list[str]:
        """The names of the weights that PEFT does not leave as they are."""
        return [f"{name}.weight" for name, method in self.methods.items() if method.rewrites]


def match(plan: Plan) -> Match | None:
    """The one configuration of PEFT's that is all of the plan's targets; None where there is none."""
    if plan.train or any(p.site.stack is not None or p.target.untie for p in plan.placed):
        return None
    known = list(_candidates(spec_values(plan.spec, Collector())))
    found = {p.site.name: _of_module(known, p, number) for number, p in enumerate(plan.placed)}
    if not found or None in found.values() or any(row[1:] != next(iter(found.values()))[1:] for row in found.values()):
        return None
    _, family, fields = next(iter(found.values()))
    return Match(family, fields, {name: row[0] for name, row in found.items()})


@dataclass(frozen=True)
class _Candidate:
    """A row, its spec with the parameters that the plan's spec has, and what PEFT's configuration then says."""

    method: Method
    spec: Spec
    config: Mapping[str, Any]

    @property
    def common(self) -> dict[str, Any]:
        """What the configurations of all modules must have in common."""
        return {name: value for name, value in self.config.items() if name not in self.method.family.lists}


def _candidates(values: Mapping[str, Any]) -> Iterator[_Candidate]:
    """The rows whose spec has parameters of just these names and types."""
    for method in METHODS:
        with suppress(SurgeryError):
            bound = method.of(values)
            if {p.name for p in bound.params} == set(values):
                yield _Candidate(method, bound, method.config(values))


def _of_module(known: list[_Candidate], placed: Placed, number: int) -> tuple[Method, Family, dict[str, Any]] | None:
    place = Place.of(placed.site, number)
    for row in known:
        said = map(_meaning, _formulas(row.spec, placed)) if row.method.is_on(row.config, place) else ()
        if _meaning(placed.formula) in said:
            return row.method, row.method.family, row.common
    return None


def _meaning(formula: Formula) -> tuple:
    """W' and b', and of each leaf what else they rest on: whether it is frozen and then where it starts, whether it is
    shared.
    """
    leaves = [(leaf.key, leaf.frozen, leaf.frozen and leaf.init, leaf.group is None) for leaf in formula.leaves]
    return formula.weight, formula.bias, leaves


def _formulas(spec: Spec, placed: Placed) -> Iterator[Formula]:
    """What each target of a spec makes of a module."""
    report = Collector()
    context = Context(library(spec), spec_values(spec, report))
    for target in spec.targets:
        formula = elaborate(target, context, placed.site.out, placed.site.in_, report, placed.site.has_bias)
        if formula is not None:
            yield formula
