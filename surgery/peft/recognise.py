"""Recognise which method of PEFT's a spec is, by its formula and whatever the spec is called.

Takes a plan; gives the configuration with which PEFT does the same to the same modules, or None. Promises: a match is a
proof: on every module the row's spec, given its parameters, has the very formula that the plan has, and the one
configuration says those parameters for every module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from surgery.diagnostics import Collector, SurgeryError
from surgery.ir.builders import every
from surgery.ir.expression import Formula, in_evaluation
from surgery.language.tree import Spec
from surgery.peft.recognise_parameters import proposals
from surgery.peft.table.method import Family, Method
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import names_there, resolved
from surgery.peft.tensor_mapping import Place
from surgery.planning.compile import Placed, Plan
from surgery.semantics.evaluate import nodes
from surgery.semantics.resolved_spec import ResolvedSpec


@dataclass(frozen=True)
class Match:
    """PEFT's `family` with the fields of its configuration, and the row for each name of PEFT's; `parameters`: those
    that it reaches by `target_parameters`, beside which it takes no dropout, each with what holds its tensors."""

    family: Family
    fields: Mapping[str, Any]
    methods: Mapping[str, Method]
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the family's configuration class."""
        others = {"target_parameters": [*self.parameters]} if self.parameters else {}
        return {**self.fields, "target_modules": [n for n in self.methods if n not in self.parameters], **others}

    @property
    def rewritten(self) -> list[str]:
        """The names of the weights that PEFT does not leave as they are."""
        return [f"{name}.weight" for name, method in self.methods.items() if method.rewrites]


def match(plan: Plan) -> Match | None:
    """The one configuration of PEFT's that is all that the plan does; None where there is none."""
    return None if plan.train or any(p.target.untie for p in plan.placed) else match_targets(plan)


def match_targets(plan: Plan) -> Match | None:
    """The one configuration of PEFT's that is all of the plan's targets, whatever it trains beside them."""
    names, parameters = names_there([p.site for p in plan.placed])
    known: dict[tuple, tuple[_Reading, ...]] = {}
    readings: list[tuple[_Reading, ...]] = []
    for number, placed in enumerate(plan.placed):
        place = Place.of(placed.site, number)
        # Modules of one formula and one kind are read once: a model has thousands, and a proof takes a compilation.
        key = id(placed.formula), replace(place, number=0)
        if key not in known:
            known[key] = tuple(_proven(plan.spec, placed, place, drops=not parameters))
        # a parameter takes what a stack of experts takes
        readings.append(tuple(replace(each, name=names[number], place=place) for each in known[key]
                              if names[number] not in parameters or "experts" in each.method.tensors))
    # One formula may be several methods: the kind that is taken must be among the readings of every module.
    kinds = dict.fromkeys(each.kind for each in readings[0]) if readings else ()
    alike = ([next((r for r in of_module if r.kind == kind), None) for of_module in readings] for kind in kinds)
    whole = (of_all for each in alike if (of_all := every(each)) is not None)
    combined = next(filter(None, map(_combined, whole)), None)
    return combined and replace(combined, parameters=parameters)


# --------------------------------------------------------------------------------------------------- one module


@dataclass(frozen=True)
class _Reading:
    """What one module's formula may be: a row, the values of its parameters, and PEFT's fields for them."""

    name: str
    place: Place
    method: Method
    parameters: Mapping[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        return self.method.config(self.parameters)

    @property
    def kind(self) -> tuple:
        """What all modules of one configuration have in common: its class and its switches."""
        family = self.method.family
        return family.peft_type, tuple(sorted((k, v) for k, v in self.method.settings.items() if k not in family.lists))


def _proven(spec: Spec, placed: Placed, place: Place, drops: bool) -> Iterator[_Reading]:
    """The rows, each with a choice of its parameters, that give the module's formula; its dropout apart, unless PEFT
    `drops`."""
    wanted = _meaning(placed.formula, drops)
    for method, row in _rows():
        for values in proposals(row, spec, placed) if place.layout in method.tensors else ():
            # evaluation is exact; a configuration holds no fractions
            parameters = {name: (int(v) if v.denominator == 1 else float(v)) if isinstance(v, Fraction) else v
                          for name, v in values.items()} | ({} if drops or "dropout" not in values else {"dropout": 0})
            reading = _Reading(placed.site.name, place, method, parameters)
            try:
                bound = method.of(parameters)
                is_it = method.is_on(reading.fields, place) and any(
                    _meaning(formula, drops) == wanted for formula in _formulas(bound, placed))
            except SurgeryError:  # the values that were proposed are of no use
                continue
            if is_it:
                yield reading


@lru_cache(maxsize=1)
def _rows() -> list[tuple[Method, Spec]]:
    """The rows with their specs, those whose steps say most first: what fits `alpha * sqrt(rank)` fits a bare `alpha`
    too."""
    rows = [(method, method.of({})) for method in METHODS]
    return sorted(rows, key=lambda row: -sum(1 for target in row[1].targets for _ in nodes(target)))


def _meaning(formula: Formula, drops: bool) -> tuple:
    """W' and b', and of each leaf what else they rest on: whether it is frozen and then where it starts, whether it is
    shared."""
    leaves = [(leaf.key, leaf.frozen, leaf.frozen and leaf.init, leaf.group is None) for leaf in formula.leaves]
    return formula.weight if drops else in_evaluation(formula.weight), formula.bias, leaves


def _formulas(spec: Spec, placed: Placed) -> Iterator[Formula]:
    """What each target of a spec makes of a module."""
    site, report = placed.site, Collector()
    resolved = ResolvedSpec(spec, report)
    for target in spec.targets:
        formula = resolved.formula(target, report, site.out, site.in_, {}, site.has_bias)
        if formula is not None:
            yield formula


# -------------------------------------------------------------------------------------------------- all modules


def _combined(readings: Sequence[_Reading]) -> Match | None:
    """The configuration that says of every module what it is, if there is one."""
    family = readings[0].method.family
    lists = {listing: [r.name for r in readings if r.fields.get(listing)] for listing in family.lists}
    special = {**_patterns(family, readings), **lists}
    own = {*family.patterns, *family.lists}
    # Fields that have no exceptions must suit all modules: each module's are tried, and proven on the others.
    for reading in readings:
        fields = {name: value for name, value in reading.fields.items() if name not in own} | special
        if all(_says(fields, each) for each in readings):
            return Match(family, fields, {each.name: each.method for each in readings})
    return None


def _patterns(family: Family, readings: Sequence[_Reading]) -> dict[str, Any]:
    """The fields that may differ between modules: the value that most have, and the others by the module's name."""
    fields: dict[str, Any] = {}
    for own, exceptions in family.patterns.items():
        given = {r.name: r.fields[own] for r in readings if own in r.fields}
        if given:
            fields[own] = Counter(given.values()).most_common(1)[0][0]
            others = {name: value for name, value in given.items() if value != fields[own]}
            # PEFT takes the first pattern that fits the end of a name: a longer name must come before its own end
            fields |= {exceptions: dict(sorted(others.items(), key=lambda row: -len(row[0])))} if others else {}
    return fields


def _says(fields: Mapping[str, Any], reading: _Reading) -> bool:
    """Whether a configuration says of a module what its formula tells."""
    here = resolved(fields, reading.method.family, reading.name)
    if any(here.get(name) != value for name, value in reading.method.settings.items()):
        return False
    if any(name not in here for name in reading.method.parameters.fields):  # those of another row, which reads fewer
        return False
    meant = reading.method.parameters.to_ours(here, reading.place)
    return all(reading.parameters.get(name) == value for name, value in meant.items())
