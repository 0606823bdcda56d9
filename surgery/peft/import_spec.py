"""One spec for modules that PEFT treats alike or not: a target for each kind of treatment.

Takes groups of modules, each with a row's spec that has its parameters set; gives one spec. Promises: it takes just
those modules; what most modules have stands in the spec's signature, and a target that differs says so in its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from surgery.language.expressions import Expression, Name, Number
from surgery.language.library import inlined
from surgery.language.tree import Argument, Call, Definition, Pattern, Spec, Step, Target, Train
from surgery.matching.patterns_from_names import patterns

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


def one_spec(groups: Sequence[Group], train: Iterable[str] = ()) -> Spec:
    """The spec that does to every group what its own spec says, and trains the parameters of these names."""
    lead, *others = sorted(groups, key=lambda group: -len(group.names))
    return inlined(lead.spec).model_copy(update={
        "selects": (), "definitions": _definitions(groups), "targets": tuple(_target(g, lead) for g in (lead, *others)),
        "train": _trains(train)})


def train_spec(name: str, train: Iterable[str]) -> Spec:
    """The spec that does nothing but train the parameters of these names."""
    return Spec(name, train=_trains(train))


def _trains(names: Iterable[str]) -> tuple[Train, ...]:
    found = patterns(names)
    return (Train(patterns=tuple(map(Pattern, found))),) if found else ()


def _definitions(groups: Sequence[Group]) -> tuple[Definition, ...]:
    return tuple(dict.fromkeys(d for group in groups for d in inlined(group.spec).definitions))


def _target(group: Group, lead: Group) -> Target:
    """The group's target: a parameter that has another value here than in the signature is written out."""
    here = {name: value for name, value in group.values.items() if lead.values.get(name) != value}
    steps = tuple(_written_out(step, here) for step in group.spec.targets[0].steps)
    kind = next(iter(group.kinds)) if len(group.kinds) == 1 else "any"
    return Target(*map(Pattern, patterns(group.names)), *steps, kind=kind, untie=group.untie)


def _written_out(step: Step, values: Values) -> Step:
    dropout = step.dropout and _put(step.dropout, values)
    none = isinstance(dropout, Number) and dropout.value == 0
    return step.model_copy(update={"call": _put(step.call, values), "dropout": None if none else dropout})


def _put(node: Any, values: Values) -> Any:
    """An expression with values in the place of names."""
    if isinstance(node, Name):
        return values.get(node.id, node)
    if isinstance(node, tuple):
        return tuple(_put(each, values) for each in node)
    if not isinstance(node, (Expression, Argument, Call)):
        return node
    return replace(node, **{f.name: _put(getattr(node, f.name), values) for f in fields(node) if f.compare})
