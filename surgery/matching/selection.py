"""Select: which sites of a model each target of a spec takes, and which parameters it unfreezes.

Takes a model (on the meta device too), a spec and the selectors in scope; gives a `Selection`. Promises: the model is
only looked at; every error of the spec against this model is found before one is raised; order of targets never counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from surgery.diagnostics import Collector, Diagnostic, Span, did_you_mean, fail
from surgery.language.library import library, load
from surgery.language.tree import Select, Spec, Target
from surgery.layers.survey import Site, Survey
from surgery.layers.wrappers import named_parameters
from surgery.matching.conflicts import owners, report_tied
from surgery.matching.matches import Catalogue, Reach, reach
from surgery.matching.name_ranges import alike, ranged
from surgery.matching.patterns import Glob, marked
from surgery.matching.selectors import Matcher, matchers
from surgery.matching.suggestions import Population
from surgery.matching.unmatched import report_dead, suggestion
from surgery.text import listed


class Taken(NamedTuple):
    """A site, and the target that takes it with its number in the spec, from 0."""

    site: Site
    number: int
    target: Target


class LeftOut(NamedTuple):
    """A module that no target takes, and why. `site` is None for one that no spec can take."""

    name: str
    reason: str
    site: Site | None


@dataclass(frozen=True, eq=False)
class Selection:
    """What a spec takes of a model: `targets` by site name in module order, `train`: the parameters to unfreeze."""

    targets: Mapping[str, Taken]
    train: tuple[str, ...]
    warnings: tuple[Diagnostic, ...]
    left_out: tuple[LeftOut, ...] = field(repr=False)
    reaches: tuple[Reach, ...] = field(repr=False)
    survey: Survey = field(repr=False)

    def explain(self, name: str) -> str:
        """Which line of the spec takes a module, or why none does. Raises:
        SurgeryError if the model has no such module."""
        site = next((s for s in self.survey.sites if name in (s.name, *s.aliases)), None)
        if site is None:
            return self._explain_other(name)
        kind = f"`{name}` ({site.kind}, {site.sides})"
        taken = self.targets.get(site.name)
        return "\n".join([kind, *(self._why(site, taken) if taken else self._why_not(site)), *self._trained(name)])

    def _why(self, site: Site, taken: Taken) -> list[str]:
        owner = self.reaches[taken.number]
        matcher = owner.sites[site]
        through = f"through {matcher}" if matcher else f"as every `{taken.target.kind}` (it has no pattern)"
        place = f" at {matcher.selector.span}" if matcher and matcher.selector.span else ""
        return [f"  is taken by {owner}, {through}{place}",
                *(f"  which overrides {r}" for r in self.reaches if site in r.sites and r is not owner)]

    def _why_not(self, site: Site) -> list[str]:
        return ["  is not taken", *(f"  {r.why_not(site)}" for r in self.reaches)]

    def _trained(self, name: str) -> list[str]:
        names = [p for p in self.train if p == name or p.startswith(f"{name}.")]
        return [f"  `train` unfreezes {listed(names)}"] if names else []

    def _explain_other(self, name: str) -> str:
        refused = next((r for r in self.survey.refused if r.name == name), None)
        if name in self.survey.modules:
            what = refused.reason if refused else f"{type(self.survey.modules[name]).__name__} only holds other modules"
            return "\n".join([f"`{name}`", f"  cannot be taken: {what}", *self._trained(name)])
        if name in dict(named_parameters(self.survey.model)):
            return "\n".join([f"`{name}` is a parameter", *(self._trained(name) or ["  no `train` unfreezes it"])])
        raise fail("no-match", f"{type(self.survey.model).__name__} has no module `{name}`",
                   helps=tuple(filter(None, [self._meant(name)])))

    def _meant(self, name: str) -> str:
        """Which module a name that is none may mean: one that ends so, or one that is spelt nearly so."""
        known = list(dict.fromkeys([*(s.name for s in self.survey.sites), *self.survey.modules]))
        endings = [other for other in known if other.endswith(f".{name}")]
        if endings:
            others = listed(map(ranged, alike(endings)))
            return f"did you mean `{endings[0]}`?" + (f" So end {others}" if len(endings) > 1 else "")
        return did_you_mean(name, known)


def explain(model: nn.Module, spec: Spec | str | Path, name: str) -> str:
    """Which line of a spec (or of a file, or of a shipped one by its name) takes the module `name` of a model, or why
    none does. The model may be on the meta device.

    Raises: SurgeryError, for a module that the model has not, and for a spec that is wrong for it.

    >>> import surgery
    >>> print(surgery.explain(surgery.load_model("demo:llama"), "lora", "lm_head"))  # doctest: +ELLIPSIS
    `lm_head` (linear, 256 x 64)
      is not taken
      it is the output head, which the target at ...lora.surg:4 leaves out since it has no pattern
    """
    spec = spec if isinstance(spec, Spec) else load(spec)
    return select(model, spec, library(spec).selects).explain(name)


def select(model: nn.Module, spec: Spec, selects: Mapping[str, Select]) -> Selection:
    """What the spec takes of the model. Raises: SurgeryError with all that is wrong with it for this model."""
    report, catalogue = Collector(), Catalogue(model)
    reaches = tuple(reach(i, t, catalogue, selects, report) for i, t in enumerate(spec.targets))
    for found in reaches:
        report_dead(found, catalogue, report)
    owned = owners(reaches, report)
    report_tied(owned, catalogue.survey, report)
    train = _train(spec, catalogue, selects, report)
    _report_trained_twice(owned, train, report)
    report.raise_errors()
    targets = {s.name: Taken(s, owned[s].index, owned[s].target) for s in catalogue.survey.sites if s in owned}
    return Selection(targets, tuple(train), tuple(report.warnings), tuple(_left_out(catalogue.survey, owned, reaches)),
                     reaches, catalogue.survey)


def _left_out(survey: Survey, owned: Mapping[Site, Reach], reaches: Iterable[Reach]) -> Iterable[LeftOut]:
    for site in survey.sites:
        if site not in owned:
            yield LeftOut(site.name, next(filter(None, (r.leaves_out(site) for r in reaches)), "no target asks for it"),
                          site)
    for refused in survey.refused:
        if refused.matrix:
            yield LeftOut(refused.name, refused.reason, None)


# ----------------------------------------------------------------------------------------------------------- train


def _train(spec: Spec, catalogue: Catalogue, selects: Mapping[str, Select],
           report: Collector) -> dict[str, nn.Parameter]:
    """The parameters that `train` names, each once, under its first name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named_parameters(catalogue.survey.model):
        names.setdefault(parameter, []).append(name)
    marks = {p: tuple(marked(n, catalogue.survey.counts) for n in names[p]) for p in names}
    chosen: set[nn.Parameter] = set()
    for matcher in (m for train in spec.train for m in matchers(train.patterns, selects, report)):
        hits = matcher.hits(marks, names)
        chosen |= hits.keys()
        _report_dead_train(matcher, hits, Population(marks.values()), catalogue, report)
    return {names[p][0]: p for p in names if p in chosen}


def _report_dead_train(matcher: Matcher, hits: Mapping, population: Population, catalogue: Catalogue,
                       report: Collector) -> None:
    def warn(what: str, glob: Glob, span: Span | None) -> None:
        report.warn("dead-name", f"{what} matches no parameter of {catalogue.title}", span,
                    helps=suggestion(population, glob, "parameter"))

    if not hits and matcher.globs:
        warn(str(matcher), matcher.globs[0], matcher.selector.span)
    live = {a for found in hits.values() for a in found}
    for choice in () if matcher.portable or not hits else matcher.globs[0].dead(live):
        warn(f"{choice} in {matcher}", matcher.globs[0].making(choice), matcher.globs[0].place(choice))


def _report_trained_twice(owned: Mapping[Site, Reach], train: Mapping[str, nn.Parameter], report: Collector) -> None:
    ids = {id(p) for p in train.values()}
    both = [s for s in owned if not ids.isdisjoint(map(id, s.held))]
    if both:
        report.error("overlap", f"`train` and a target take the same weight: {listed(s.weight_name for s in both)}",
                     owned[both[0]].place(both[0]),
                     helps=("a target keeps its weight frozen: leave it out of one of the two",))
