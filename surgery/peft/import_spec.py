"""One spec for modules that PEFT treats alike or not: a target for each kind of treatment.

Takes groups of modules, each with a row's spec that has its parameters set; gives one spec. Promises: it takes just
those modules; what most modules have stands in the spec's signature, and a target that differs says so in its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.language.expressions import Expression, Number
from surgery.language.library import inlined
from surgery.language.tree import Pattern, Repeat, Spec, Step, Target, Train
from surgery.matching.patterns_from_names import patterns
from surgery.semantics.repetition import with_values

Values = Mapping[str, Expression]


@dataclass(frozen=True)
class Group:
    """Modules with the same formula: their names and kinds, the spec of one target that says it, and whether their
    weights are tied to others."""

    spec: Spec
    names: Sequence[str]
    kinds: frozenset[str]
    untie: bool = False

    @property
    def values(self) -> Values:
        return {p.name: p.default for p in self.spec.params if p.default is not None}


def one_spec(groups: Sequence[Group], train: Iterable[str]) -> Spec:
    """The spec that does to every group what its own spec says, and trains the parameters of these names."""
    # The signature is that of the largest group, so that the spec reads as what most modules have.
    lead, *others = sorted(groups, key=lambda group: -len(group.names))
    definitions = tuple(dict.fromkeys(d for group in groups for d in inlined(group.spec).definitions))
    return inlined(lead.spec).model_copy(update={
        "selects": (), "definitions": definitions, "targets": tuple(_target(g, lead) for g in (lead, *others)),
        "train": _trains(train)})


def train_spec(name: str, train: Iterable[str]) -> Spec:
    """The spec that does nothing but train the parameters of these names."""
    return Spec(name, train=_trains(train))


def _trains(names: Iterable[str]) -> tuple[Train, ...]:
    globs = patterns(names)
    return (Train(patterns=tuple(map(Pattern, globs))),) if globs else ()


def _target(group: Group, lead: Group) -> Target:
    """The group's target: a parameter that has another value here than in the signature is written out."""
    here = {name: value for name, value in group.values.items() if lead.values.get(name) != value}
    # `dropout(0)` says nothing, and would stand in every imported spec
    steps = tuple(_without_no_dropout(step) for step in with_values(group.spec.targets[0].steps, here))
    kind = next(iter(group.kinds)) if len(group.kinds) == 1 else "any"
    return Target(*map(Pattern, patterns(group.names)), *steps, kind=kind, untie=group.untie)


def _without_no_dropout(step: Step | Repeat) -> Step | Repeat:
    """The step without a dropout of 0."""
    none = isinstance(step, Step) and isinstance(step.dropout, Number) and step.dropout.value == 0
    return step.model_copy(update={"dropout": None}) if none else step
