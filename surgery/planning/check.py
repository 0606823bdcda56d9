"""Checking a spec without a model: names, types, shapes and patterns from its text, its start, and its claims.

Takes a spec; gives diagnostics. Promises: the programs that its targets run are proven to compute their formulas; no
torch while the text suffices; where it does not (a claim, a start that algebra cannot prove), `trial` tries it in
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from math import lcm, prod
from typing import Any

from surgery.codegen.candidates import by_tokens, candidates
from surgery.codegen.program_text import program_text, step_text
from surgery.codegen.validate import program_faults, step_faults
from surgery.diagnostics import Collector, Diagnostic, SurgeryError
from surgery.ir.expression import Formula
from surgery.language.expressions import Argument, Call, Number, as_expression
from surgery.language.library import Library, library
from surgery.language.tree import Definition, Parameter, Spec, Step, Target
from surgery.layers.kinds import supposed
from surgery.matching.selectors import selector_faults
from surgery.planning.cost_estimates import Estimate, fallback
from surgery.rewrite.prove_identity import starts_as_weight, surely_trains
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.evaluate import names_in, nodes
from surgery.semantics.lint import lint, spec_values

# Wide, tall and square weights to try a target on, the small ones first: block sizes must divide them.
_SIDES = ((96, 64), (192, 128), (120, 80), (768, 512), (840, 420), (1536, 1024), (2520, 1260), (4096, 1024))
_LONGEST = 4096
_MOST_NUMBERS = 2**26
# Where a module can stand: the first layer and the last one.
_PLACES = ({"layer": 0, "depth": 0.0}, {"layer": 11, "depth": 1.0})
_EXAMPLES = {"int": 2, "float": 0.5, "bool": True, "str": '"text"'}


@dataclass(frozen=True)
class Trial:
    """A target at concrete sizes."""

    target: Target
    out: int
    in_: int
    formula: Formula


def check(spec: Spec) -> list[Diagnostic]:
    """All that is wrong with a spec whatever the model, warnings too."""
    try:
        scope = library(spec)
    except SurgeryError as error:
        return list(error.diagnostics)
    report = Collector()
    values = spec_values(spec, report)
    report.add(*lint(spec, scope), *selector_faults(spec, scope.selects))
    if not report.errors:
        report.add(*_tried(spec, scope, values))
    return report.found


def _tried(spec: Spec, scope: Library, values: Mapping[str, Any]) -> list[Diagnostic]:
    report = Collector()
    targets = {t: list(_trials(t, scope, values, report)) for t in spec.targets}
    unproven = [t for trials in targets.values() for t in trials
                if not t.target.shifted and not starts_as_weight(t.formula)]
    unused = [t for target in _unplaced(spec) for t in _trials(target, scope, values, report)]
    claiming = [t for t in (*sum(targets.values(), []), *unused) if t.formula.claims]
    idle = [trials for trials in targets.values() if trials and not any(surely_trains(t.formula) for t in trials)]
    if unproven or claiming or idle:
        from surgery.planning.numeric_check import try_claims, try_gradients, try_starts

        report.add(*try_starts(unproven), *try_claims(claiming), *try_gradients(idle))
    for trials in targets.values():
        report.add(*islice(chain.from_iterable(map(_miscompiled, trials)), 1))
    report.add(*_dense(spec, scope, values))
    return report.found


def _miscompiled(trial: Trial) -> Iterator[Diagnostic]:
    """A program that can run for the target and is not proven to compute what the formula means: our mistake."""
    formula, kind = trial.formula, supposed(trial.target.kind)
    for training in (True, False):
        plans = candidates(formula, kind, training, formula.bias.op != "bias")
        for plan in dict.fromkeys((plans[0], *((plan for _, plan in by_tokens(plans)) if training else ()))):
            faults = program_faults(program_text(plan), plan.outputs)
            step = step_text(plan.written, plan.needs) if training and kind.is_product else None
            if step is not None:
                faults += step_faults(step.source, step.body, step.gradients, step.forwarded)
            if faults:
                yield Diagnostic("internal", "the program for this target is not proven to compute its formula",
                                 trial.target.span,
                                 notes=(f"{plan.strategy} at [{trial.out}, {trial.in_}]: {faults[0]}",),
                                 helps=("this is a mistake of surgery's, and not of the spec: please report it",))


def _dense(spec: Spec, scope: Library, values: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """A warning for each target without a cheap program on a large weight."""
    for target in spec.targets:
        shapes = sorted(chain(*_sizes(_numbers(target, scope, values))), key=lambda shape: shape[0] * shape[1],
                        reverse=True)
        found = [_first(target, Context(scope, {**values, **place}), shapes, Collector()) for place in _places(target)]
        yield from filter(None, [fallback(target, [Estimate(t.formula, supposed(target.kind)) for t in found if t])])


def _unplaced(spec: Spec) -> Iterator[Target]:
    """A target for each definition with a claim that no target of the spec uses."""
    placed = {step.call.function for target in spec.targets for step in target.steps}
    for definition in spec.definitions:
        if definition.claims and definition.name not in placed:
            yield Target(steps=(_example(definition),), span=definition.name_span)


def _example(definition: Definition) -> Step:
    call = Call(definition.name, tuple(_argument(p) for p in definition.params if p.default is None))
    return Step(placement="pre" if definition.kind == "transform" else "add", call=call)


def _argument(parameter: Parameter) -> Argument:
    return Argument(parameter.name, as_expression(_EXAMPLES[parameter.type]))


# -------------------------------------------------------------------------------------------------------- sizes


def _trials(target: Target, scope: Library, values: Mapping[str, Any], report: Collector) -> Iterator[Trial]:
    """The target at the first wide, tall and square sizes that fit, at each end of the model if it asks where it
    stands."""
    sizes = _sizes(_numbers(target, scope, values))
    for place in _places(target):
        context, faults = Context(scope, {**values, **place}), Collector()
        found = [_first(target, context, sides, faults) for sides in sizes]
        yield from filter(None, found)
        if not any(found):
            report.add(_untested(target, faults))


def _places(target: Target) -> Iterable[Mapping[str, Any]]:
    return _PLACES if names_in(target).keys() & {"layer", "depth"} else ({},)


def _first(target: Target, context: Context, sides: Iterable[tuple[int, int]], faults: Collector) -> Trial | None:
    for out, in_ in sides:
        local = Collector()
        formula = elaborate(target, context, out, in_, local)
        numbers = sum(prod(leaf.shape) for leaf in formula.leaves) if formula is not None else 0
        if formula is not None and numbers <= _MOST_NUMBERS:
            return Trial(target, out, in_, formula)
        if formula is not None:
            local.warn("untested",
                       f"its parameters hold {numbers:,} numbers at [{out}, {in_}], which are too many to try")
        faults.add(*local.found)
    return None


def _sizes(numbers: set[int]) -> list[list[tuple[int, int]]]:
    """Wide, tall and square sizes. Multiples of the spec's own numbers come after the usual ones."""
    units = sorted({*numbers, lcm(*numbers)})
    sides = [*_SIDES, *((3 * n, 2 * n) for n in units if 3 * n <= _LONGEST)]
    squares = [*(long for long, _ in sides), *(n for n in units if n <= _LONGEST)]
    return [[(short, long) for long, short in sides], sides, [(n, n) for n in squares]]


def _numbers(target: Target, scope: Library, values: Mapping[str, Any]) -> set[int]:
    """The whole numbers that can be a block's size: those of the spec's parameters, the target and its definitions."""
    named = [scope.definitions[step.call.function] for step in target.steps]
    literals = [n.value for part in (target, *named) for n in nodes(part) if isinstance(n, Number)]
    return {n for n in (*values.values(), *literals) if type(n) is int and n > 1}


def _untested(target: Target, faults: Collector) -> Diagnostic:
    return Diagnostic("untested",
                      "no size of weight that `check` tries fits this target, so its start and its claims are "
                      "not tested", target.span, severity="warning", notes=tuple(f.message for f in faults.found[:1]),
                      helps=("`surgery apply` tests the start on a model",))
