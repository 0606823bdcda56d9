"""From a spec's tree to expressions: its names resolved, and the formula of each target for any weight.

Takes a spec; gives a `ResolvedSpec`. Promises: this is the one place where steps become expressions; whoever wants a
formula (a model, a trial, a page, a method of PEFT's) asks it, and it elaborates each once. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.diagnostics import Collector, Diagnostic, fail
from surgery.ir import sizes
from surgery.ir.expression import Formula
from surgery.ir.sizes import Size
from surgery.language.library import library
from surgery.language.tree import Spec, Target, every_step
from surgery.semantics.arguments import assert_checks, defaults, says_square
from surgery.semantics.definitions import with_called
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.evaluate import names_in
from surgery.semantics.scope import OF_A_MODULE, TAKEN_IN_TARGETS, assert_is_free

OUT, IN = sizes.symbol("out"), sizes.symbol("in")
# What a module of a model says of where it stands; whatever else a spec calls so means that.
PLACES = {name: sizes.symbol(name) for name in OF_A_MODULE}


def spec_values(spec: Spec, report: Collector) -> dict[str, Any]:
    """The values of a spec's parameters. Reports a missing value, a wrong type, a `check` that is not met."""
    for parameter in spec.params:
        assert_is_free(parameter.name, TAKEN_IN_TARGETS, parameter.name_span, report)
    values = defaults(spec.params, {}, report, lambda p: fail(
        "missing-argument", f"the spec's parameter `{p.name}` has no value", p.name_span,
        helps=(f"give it a default, or --set {p.name}=...",)))
    assert_checks(spec.checks, values, report)
    return values


class ResolvedSpec:
    """A spec with its `library` (the definitions and selects in scope) and the `values` of its parameters."""

    def __init__(self, spec: Spec, report: Collector):
        """Reports what is wrong with the values. Raises: SurgeryError, for files that it uses and cannot read."""
        self.spec, self.library, self.values = spec, library(spec), spec_values(spec, report)
        self._groups = {id(target): str(index) for index, target in enumerate(spec.targets)}
        self._known: dict[tuple, tuple[Formula | None, list[Diagnostic]]] = {}

    def formula(self, target: Target, report: Collector, out: Size = OUT, in_: Size = IN,
                place: Mapping[str, Any] = PLACES, has_bias: bool = True) -> Formula | None:
        """The formula of a target for a weight [out, in], which stands at a `place` (its `layer` and `depth`; what is
        None is not known there); None when a mistake was reported. Without more, of a weight of any size anywhere."""
        if out is OUT and in_ is IN:
            # Of any size, but for a definition that says `check out == in`: then of any square one.
            known = self.library.definitions
            placed = [known[step.call.function] for step in every_step(target.steps)
                      if step.call.function in known]
            called = (each for definition in placed for each in with_called(definition, known))
            in_ = OUT if any(says_square(definition.checks) for definition in called) else in_
        asked = {name: value for name, value in place.items() if value is not None}
        # a place that nothing reads makes no other formula; what may be read anywhere is said of an unknown name
        asked = asked if place is PLACES or names_in(target).keys() & PLACES.keys() else {}
        # A model has many layers of few sizes: each formula is made once, with its faults, which every caller is told.
        key = (id(target), out, in_, has_bias, *asked.items())
        if key not in self._known:
            faults = Collector()
            context = Context(self.library, {**asked, **self.values}, self._groups.get(id(target), "0"))
            self._known[key] = elaborate(target, context, out, in_, faults, has_bias), faults.found
        formula, diagnostics = self._known[key]
        report.add(*diagnostics)
        return formula

    def formulas(self, out: Size = OUT, in_: Size = IN,
                 place: Mapping[str, Any] = PLACES) -> list[tuple[Target, Formula]]:
        """Each target with its formula. Raises: SurgeryError with all that is wrong with any."""
        report = Collector()
        pairs = [(target, self.formula(target, report, out, in_, place)) for target in self.spec.targets]
        report.raise_errors()
        return [(target, formula) for target, formula in pairs if formula is not None]


def resolved(spec: Spec) -> ResolvedSpec:
    """The spec with its names resolved. Raises: SurgeryError for what is wrong with its values or the files it uses."""
    report = Collector()
    resolved_spec = ResolvedSpec(spec, report)
    report.raise_errors()
    return resolved_spec
