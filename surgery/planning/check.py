"""Checking a spec without a model: names, types, shapes and patterns from its text, its start, and its claims.

Takes a spec; gives diagnostics. Promises: the programs that its targets run are proven to compute their formulas; no
torch while the text suffices; where it does not (a claim, a start that algebra cannot prove), `numeric_check` tries it
in numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from math import prod
from os import PathLike
from typing import TYPE_CHECKING

from surgery.codegen.compiled import Compiled
from surgery.codegen.program_text import program_text, step_text
from surgery.codegen.validate import program_faults, step_faults
from surgery.diagnostics import Collector, Diagnostic, SurgeryError, internal, unknown_allowed
from surgery.given import takes
from surgery.language.library import load
from surgery.language.tree import Spec, Target, every_step
from surgery.matching.selectors import selector_faults
from surgery.planning.cost_estimates import Estimate, fallback
from surgery.planning.trial_sizes import Trial, first_that_fits, places_of, sizes_to_try, trials_of
from surgery.rewrite.prove_identity import starts_as_weight, surely_trains
from surgery.semantics.arguments import example_step
from surgery.semantics.lint import lint
from surgery.semantics.resolved_spec import ResolvedSpec

if TYPE_CHECKING:
    from torch import nn


@takes(spec="spec")
def check(spec: Spec | str | PathLike, model: nn.Module | None = None, tried: bool = True,
          prove: bool = False) -> list[Diagnostic]:
    """List all errors and warnings of a spec (or a file, or a shipped spec by its name) that hold for any model; if
    there is no error and a `model` is given (on the meta device too), also those on that model. Nothing is raised.

    `tried=False`: check names, types, shapes and patterns alone, but no start and no claim. `prove`: always compute
    that every program gives the values and gradients of its formula (this loads torch); without it this is computed
    only if something else, such as a claim, needs numbers.

    >>> import surgery
    >>> surgery.check("lora")
    []
    >>> spec = surgery.parse('spec mine target "**.q_proj" { add low_rnk(8) }')
    >>> [(found.code, found.message) for found in surgery.check(spec)]
    [('unknown-definition', 'unknown update `low_rnk`')]
    """
    report = Collector()
    try:
        read = spec if isinstance(spec, Spec) else load(spec)
        resolved = ResolvedSpec(read, report)
        report.add(*lint(resolved), *selector_faults(read, resolved.library.selects))
        report.add(*(unknown_allowed(read.span.source) if read.span else ()))
        if tried and not report.errors:
            report.add(*_tried(resolved, prove))
    except SurgeryError as error:
        report.add(*error.diagnostics)
        return report.found
    if model is None or report.errors:
        return report.found
    # what runs dense is told once: on the sizes of the model
    both = Collector()
    both.add(*(d for d in report.found if d.code != "fallback"), *_on(model, read))
    return both.found


def _on(model: nn.Module, spec: Spec) -> Sequence[Diagnostic]:
    """What is wrong with a spec on this model, and what runs dense there."""
    # Imported here: these need torch, which a check of the text alone does without.
    from surgery.planning.compile import compile
    from surgery.planning.figures import Report

    try:
        plan = compile(model, spec)
    except SurgeryError as error:
        return error.diagnostics
    return (*plan.warnings, *Report(plan).fallbacks)


def _tried(resolved: ResolvedSpec, prove: bool) -> list[Diagnostic]:
    """What shows at concrete sizes alone. Algebra goes first: only what it cannot prove is computed in numbers."""
    report = Collector()
    targets = {t: _shareable(trials_of(t, resolved, report), report) for t in resolved.spec.targets}
    unproven = [t for trials in targets.values() for t in trials
                if not t.target.shifted and not starts_as_weight(t.formula)]
    on_manifolds = [t for trials in targets.values() for t in trials if any(leaf.manifold for leaf in t.formula.leaves)]
    unused = [t for target in _unplaced(resolved.spec)
              for t in _shareable(trials_of(target, resolved, report), Collector())]
    claiming = [t for t in (*sum(targets.values(), []), *unused) if t.formula.claims]
    idle = [trials for trials in targets.values() if trials and not any(surely_trains(t.formula) for t in trials)]
    if unproven or claiming or idle or on_manifolds or prove:
        from surgery.planning.numeric_check import try_claims, try_gradients, try_manifolds, try_starts
        from surgery.planning.prove_programs import try_programs

        report.add(*(faults := try_manifolds(on_manifolds)))
        if faults:  # what does not start where it says starts nowhere in particular
            return report.found
        report.add(*try_starts(unproven), *try_claims(claiming), *try_gradients(idle))
        report.add(*try_programs(chain(*targets.values())))
    for trials in targets.values():
        report.add(*islice(chain.from_iterable(map(_miscompiled, trials)), 1))  # our mistake: one a target is enough
    for target in resolved.spec.targets:
        # A cheap program pays on large weights: whether a target runs dense is asked of the largest that fits, wide,
        # tall and square, since what is cheap on one need not be so on another.
        shapes = [sorted(sizes, key=prod, reverse=True) for sizes in sizes_to_try(target, resolved)]
        largest = [first_that_fits(target, resolved, place, sizes, Collector()) for place in places_of(target)
                   for sizes in shapes]
        estimates = [Estimate(Compiled.supposed(trial.formula, target.kind)) for trial in largest if trial]
        report.add(*filter(None, [fallback(target, estimates)]))
    return report.found


def _shareable(trials: Iterable[Trial], report: Collector) -> list[Trial]:
    """Those at whose sizes each tensor that steps of the target share can be one; reports why none has such sizes."""
    trials = [*trials]
    if not any(leaf.group for trial in trials for leaf in trial.formula.leaves):
        return trials
    from surgery.planning.numeric_check import unshared

    faults = [unshared(trial) for trial in trials]
    if all(faults):
        report.add(*dict.fromkeys(chain.from_iterable(faults)))
    return [trial for trial, fault in zip(trials, faults) if not fault]


def _miscompiled(trial: Trial) -> Iterator[Diagnostic]:
    """A program that can run for the target and is not proven to compute what the formula means: our mistake."""
    compiled = Compiled.supposed(trial.formula, trial.target.kind)
    for training in (True, False):
        best = compiled.candidates(training)[0]
        for plan in dict.fromkeys((best, *(plan for _, plan in compiled.by_tokens(training)))):
            faults = program_faults(program_text(plan), plan.outputs)
            has_step = training and compiled.kind.is_product
            steps = [step_text(plan.written, plan.needs, last) for last in (False, True)] if has_step else []
            for step in filter(None, steps):  # of a CPU, and of other devices
                faults += step_faults(step.source, step.body, step.gradients, step.forwarded)
            if faults:
                yield internal("the program for this target is not proven to compute its formula", trial.target.span,
                               f"{plan.strategy} at [{trial.out}, {trial.in_}]: {faults[0]}")


def _unplaced(spec: Spec) -> Iterator[Target]:
    """A target for each definition with a claim that no target of the spec uses, so that the claim is tried as well."""
    placed = {step.call.function for target in spec.targets for step in every_step(target.steps)}
    for definition in spec.definitions:
        if definition.claims and definition.name not in placed:
            # a claim must hold for every value of a parameter, and so for that of the example
            yield Target(steps=(example_step(definition),), span=definition.name_span)
