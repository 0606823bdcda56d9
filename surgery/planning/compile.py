"""The compiler, front to back: a spec and a model in, the programs of each operated weight out.

    text -> spec -> library -> values -> selection -> formulas -> normal form -> candidates -> programs

Takes a model (on any device, meta included) and a spec; gives a `Plan`: the formulas, each with the rest of its way
(`Placed.compiled`) still to go, since a report needs no code and a page no costs. Promises: the model is only read;
every mistake of the spec against this model is reported in one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from os import PathLike

import torch.nn as nn

from surgery.codegen.compiled import Compiled
from surgery.diagnostics import Collector, Diagnostic, fail
from surgery.given import takes
from surgery.ir.expression import Formula, Leaf
from surgery.ir.sizes import known
from surgery.language.library import Library, load
from surgery.language.tree import Spec, Target, every_step
from surgery.layers.survey import Site, Survey
from surgery.matching.conflicts import tied
from surgery.matching.selection import Selection, select
from surgery.planning.figures import Report
from surgery.planning.sharing import SharedTensor, held, shared_tensors
from surgery.semantics.lint import linted
from surgery.semantics.resolved_spec import PLACES, ResolvedSpec
from surgery.text import counted, listed


@dataclass(frozen=True)
class Placed:
    """One operated weight: where it is, which target took it, what W' is, and by the key of a leaf the tensors that it
    shares with more than its target."""

    site: Site
    target: Target
    formula: Formula
    shared: Mapping[str, SharedTensor] = field(default_factory=dict)

    def held(self, leaf: Leaf) -> SharedTensor:
        """The one tensor that is held of a leaf that is shared."""
        return held(self.site, leaf, self.shared)

    @cached_property
    def compiled(self) -> Compiled:
        """The formula on its way to programs for this layer: report, adapter, merge and spectra ask this object."""
        return Compiled(self.formula, self.site.layout.kind, self.site.has_bias)

    @property
    def parameters(self) -> int:
        """How many numbers this module's adapter trains (a shared tensor counted in each)."""
        return sum(self.count(leaf) for leaf in self.formula.leaves if not leaf.frozen)

    def count(self, leaf: Leaf) -> int:
        return known(prod(leaf.shape)) * (self.site.stack if self.site.stack and leaf.group is None else 1)


@dataclass(frozen=True, repr=False)
class Plan:
    """What a spec does to a model: the operated weights in module order, the unfrozen parameters, the modules left out.

    `total` is the number of the model's own parameters, tied ones counted once.
    """

    spec: Spec
    placed: tuple[Placed, ...]
    selection: Selection
    warnings: tuple[Diagnostic, ...]
    total: int

    def __repr__(self) -> str:
        model = type(self.selection.survey.model).__name__
        return (f"<Plan of {_title(self.spec)} for {model}: {counted(len(self.placed), 'weight')} operated on, "
                f"{counted(self.trainable, 'adapter parameter')} train>")

    def _repr_html_(self) -> str:
        return Report(self)._repr_html_()

    @property
    def train(self) -> tuple[str, ...]:
        """The names of the model's own parameters that are unfrozen."""
        return self.selection.train

    @cached_property
    def trainable(self) -> int:
        """The number of adapter parameters that are trained, shared tensors counted once."""
        return self._count(lambda leaf: not leaf.frozen)

    @cached_property
    def frozen(self) -> int:
        """The number of adapter parameters that are not trained (`frozen param`), shared tensors counted once."""
        return self._count(lambda leaf: leaf.frozen)

    @cached_property
    def whole(self) -> int:
        """How many of those are whole numbers, such as places, which are held in 64 bits."""
        return self._count(lambda leaf: leaf.whole)

    def _count(self, counts: Callable[[Leaf], bool]) -> int:
        found = [(p, leaf) for p in self.placed for leaf in p.formula.leaves if counts(leaf)]
        shared = {p.held(leaf).name: p.held(leaf).shape for p, leaf in found if leaf.group}
        own = sum(p.count(leaf) for p, leaf in found if not leaf.group)
        return own + sum(map(prod, shared.values()))


@takes(model="model", spec="spec")
def compile(model: nn.Module, spec: Spec | str | PathLike, strict: bool = False) -> Plan:
    """The plan of `spec` (a spec, a file's path or a shipped name) on `model`.

    Raises: SurgeryError with all that is wrong; under `strict`, warnings too.

    >>> import surgery
    >>> plan = surgery.plan(surgery.load_model("demo:llama"), surgery.load("lora", rank=4))
    >>> plan
    <Plan of `lora` for LlamaForCausalLM: 28 weights operated on, 16,384 adapter parameters train>
    >>> plan.placed[0].site.name, plan.placed[0].parameters
    ('model.layers.0.self_attn.q_proj', 512)
    """
    spec = spec if isinstance(spec, Spec) else load(spec)
    report = Collector()
    resolved = linted(spec, report)
    report.raise_errors()
    if not (spec.targets or spec.train):
        raise fail("no-match", f"{_title(spec)} has no target and no `train`, so there is nothing to do to a model",
                   helps=("write `target linear { ... }`, or `use` this file in a spec that has one",))
    selection = select(model, spec, resolved.library.selects)
    report.add(*selection.warnings)
    formulas = _Formulas(resolved)
    placed = [(site, target, formulas.of(site, target)) for site, _, target in selection.targets.values()]
    report.add(*formulas.faults())
    report.add(*_unbiased(spec, resolved.library, [row[:2] for row in selection.targets.values()]))
    report.add(*_tied_biases(selection.survey, [row[:2] for row in placed if row[2] and row[2].changes_bias]))
    shared = shared_tensors(((site, formula.leaves) for site, _, formula in placed if formula), report)
    report.raise_errors(strict)
    total = sum(p.numel() for p in model.parameters())
    operated = tuple(Placed(site, target, formula, shared.get(site.name, {})) for site, target, formula in placed
                     if formula is not None)  # what has no formula was an error
    return Plan(spec, operated, selection, tuple(report.warnings), total)


def _unbiased(spec: Spec, scope: Library, taken: list[tuple[Site, int]]) -> Iterator[Diagnostic]:
    """What is added to a bias where there is none: a warning, or an error where the target then does nothing at all."""
    for index, target in enumerate(spec.targets):
        sites = [site for site, owner in taken if owner == index]
        without = [site for site in sites if not site.has_bias]
        steps = [*every_step(target.steps)]
        shifts = [step for step in steps if scope.definitions[step.call.function].bias]
        # Some models have a bias in a few layers only, and one pattern may take them all: that is worth a warning. A
        # target of which nothing is left is a mistake.
        nothing_left = len(without) == len(sites) and len(shifts) == len(steps)
        for step in shifts if without else ():
            some = f"{len(without)} of the {len(sites)} modules have none ({without[0].name}, ...)"
            yield Diagnostic("no-bias", f"{step.call.function} is added to the bias, and {some}", step.span,
                             severity="error" if nothing_left else "warning",
                             helps=("name the modules that have a bias, or leave the step out",))


def _tied_biases(survey: Survey, changed: Sequence[tuple[Site, Target]]) -> Iterator[Diagnostic]:
    """An error for each bias that a formula changes and another layer has too: b' would stand there as well. (What a
    module above the layer calls by a name of its own, as the head of BERT does, is this layer's all the same.)"""
    shared, told = tied(survey) if changed else {}, set[str]()
    for site, target in changed:
        name = f"{site.name}.bias".lstrip(".")
        owners = {other: other.rpartition(".")[0] for other in shared.get(name, ())}
        others = [other for other, owner in owners.items() if not f"{site.name}.".startswith(f"{owner}." * bool(owner))]
        if others and name not in told:
            told |= {name, *others}
            yield Diagnostic("tied-weight", f"`{name}` is tied to {listed(others)}: they share one bias, and changing "
                             "it at one place would change it at the other", target.span,
                             helps=("give the layer a bias of its own first: `layer.bias = "
                                    "nn.Parameter(layer.bias.detach().clone())`",))


def _title(spec: Spec) -> str:
    return f"`{spec.name}`" if spec.name else spec.span.source.name if spec.span else "the spec"


class _Formulas:
    """The formula of each site, and what is wrong with any of them."""

    def __init__(self, resolved: ResolvedSpec):
        self.resolved = resolved
        self.faulty: dict[Diagnostic, list[Site]] = {}

    def of(self, site: Site, target: Target) -> Formula | None:
        report, place = Collector(), {name: getattr(site, name) for name in PLACES}
        formula = self.resolved.formula(target, report, site.out, site.in_, place, site.has_bias)
        for fault in report.found:
            self.faulty.setdefault(fault, []).append(site)
        return formula

    def faults(self) -> Iterator[Diagnostic]:
        """What is wrong, each with the modules that it is wrong for."""
        for fault, sites in self.faulty.items():
            # with their sizes, which are mostly why it is wrong for these and not for others
            modules = [f"{s.name} [{s.out}, {s.in_}] {s.layout.kind.note}".rstrip() for s in sites]
            yield replace(fault, notes=(*fault.notes, f"for {listed(modules)}"))
