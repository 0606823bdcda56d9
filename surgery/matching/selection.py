"""Select: which sites of a model each target of a spec takes, and which parameters it unfreezes.

Takes a model (on the meta device too), a spec and the selectors in scope; gives a `Selection`. Promises: the model is
only looked at; every error of the spec against this model is found before one is raised; order of targets never counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from surgery.diagnostics import Collector, Diagnostic, Span, did_you_mean, fail
from surgery.given import takes
from surgery.language.library import library, load
from surgery.language.tree import Select, Spec, Target
from surgery.layers.survey import Site, Survey
from surgery.layers.wrappers import named_parameters
from surgery.matching.conflicts import owners, report_tied
from surgery.matching.matches import Catalogue, Matches, matches_of
from surgery.matching.name_ranges import alike, ranged
from surgery.matching.patterns import Glob, marked
from surgery.matching.selectors import matchers
from surgery.matching.suggestions import Population
from surgery.matching.unmatched import report_unmatched, suggestion
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
    matches: tuple[Matches, ...] = field(repr=False)
    survey: Survey = field(repr=False)

    def explain(self, name: str) -> str:
        """Which line of the spec takes a module, or why none does. Raises:
        SurgeryError if the model has no such module."""
        # norm layers and routers are sites where a target asks for them
        known = (*self.survey.sites, *(taken.site for taken in self.targets.values()))
        site = next((s for s in known if name in (s.name, *s.aliases)), None)
        if site is None:
            return self._explain_other(name)
        lines = [f"`{name}` ({site.kind}, {site.sides})"]
        if taken := self.targets.get(site.name):
            owner = self.matches[taken.number]
            matcher = owner.sites[site]
            through = f"through {matcher}" if matcher else f"as every `{taken.target.kind}` (it has no pattern)"
            place = f" at {matcher.selector.span}" if matcher and matcher.selector.span else ""
            lines.append(f"  is taken by {owner}, {through}{place}")
            # the site has one owner: whatever else takes it has been overridden, or there would be an error
            lines += [f"  which overrides {r}" for r in self.matches if site in r.sites and r is not owner]
        else:
            lines += ["  is not taken", *(f"  {r.why_not(site)}" for r in self.matches)]
        return "\n".join([*lines, *self._trained(name)])

    def _trained(self, name: str) -> list[str]:
        names = [p for p in self.train if p == name or p.startswith(f"{name}.")]
        return [f"  `train` unfreezes {listed(names)}"] if names else []

    def _explain_other(self, name: str) -> str:
        """The same for what is no site: a module without a weight of its own, or a parameter."""
        refused = next((r for r in self.survey.refused if r.name == name), None)
        if name in self.survey.modules:
            what = refused.reason if refused else f"{type(self.survey.modules[name]).__name__} only holds other modules"
            return "\n".join([f"`{name}`", f"  cannot be taken: {what}", *self._trained(name)])
        if name in dict(named_parameters(self.survey.model)):
            return "\n".join([f"`{name}` is a parameter", *(self._trained(name) or ["  no `train` unfreezes it"])])
        # People write `q_proj` for a full name: a name that ends so is a better guess than one that is spelt nearly so.
        known = list(dict.fromkeys([*(s.name for s in self.survey.sites), *self.survey.modules]))
        endings = [other for other in known if other.endswith(f".{name}")]
        meant = did_you_mean(name, known)
        if endings:
            others = f" So end {listed(map(ranged, alike(endings)))}" if len(endings) > 1 else ""
            meant = f"did you mean `{endings[0]}`?{others}"
        raise fail("no-match", f"{type(self.survey.model).__name__} has no module `{name}`",
                   helps=(meant,) if meant else ())


@takes(model="model", spec="spec")
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
    sites = catalogue.survey.sites
    # First what each target takes by itself, then which one owns a site: no target's meaning hangs on another's.
    matches = tuple(matches_of(i, t, catalogue, selects, report) for i, t in enumerate(spec.targets))
    for each in matches:
        report_unmatched(each, catalogue, report)
    owned = owners(matches, report)
    report_tied(owned, catalogue.survey, report)
    # A target promises that its weight stays frozen, so `train` may not unfreeze it. Parameters are compared by
    # identity: a tied one has several names.
    train = _train(spec, catalogue, selects, report)
    trained = set(map(id, train.values()))
    both = [s for s in owned if not trained.isdisjoint(map(id, s.held))]
    if both:
        report.error("overlap", f"`train` and a target take the same weight: {listed(s.weight_name for s in both)}",
                     owned[both[0]].place(both[0]),
                     helps=("a target keeps its weight frozen: leave it out of one of the two",))
    report.raise_errors()
    order = {id(module): i for i, module in reversed([*enumerate(catalogue.survey.modules.values())])}
    place = {s: i for i, s in enumerate(sites)}  # of a module's own sites
    targets = {s.name: Taken(s, owned[s].index, owned[s].target)
               for s in sorted(owned, key=lambda s: (order[id(s.module)], place.get(s, 0)))}
    no_reason = "no target asks for it"
    left_out = [LeftOut(s.name, next(filter(None, (r.leaves_out(s) for r in matches)), no_reason), s)
                for s in sites if s not in owned]
    # a stack goes by its parameter's name
    taken = {n.rpartition(".")[0] if each.site.stack is not None else n for n, each in targets.items()}
    left_out += [LeftOut(r.name, r.reason, None) for r in catalogue.survey.refused if r.matrix and r.name not in taken]
    return Selection(targets, tuple(train), tuple(report.warnings), tuple(left_out), matches, catalogue.survey)


# ----------------------------------------------------------------------------------------------------------- train


def _train(spec: Spec, catalogue: Catalogue, selects: Mapping[str, Select],
           report: Collector) -> dict[str, nn.Parameter]:
    """The parameters that `train` names, each once, under its first name. A pattern, or one choice in its braces, that
    matches none is a warning."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named_parameters(catalogue.survey.model):
        names.setdefault(parameter, []).append(name)
    marks = {p: tuple(marked(n, catalogue.survey.counts) for n in names[p]) for p in names}
    population = Population(marks.values())

    def warn(what: str, glob: Glob, span: Span | None) -> None:
        report.warn("dead-name", f"{what} matches no parameter of {catalogue.title}", span,
                    helps=suggestion(population, glob, "parameter"))

    chosen: set[nn.Parameter] = set()
    for matcher in (m for train in spec.train for m in matchers(train.patterns, selects, report)):
        hits = matcher.hits(marks, names)
        chosen |= hits.keys()
        if not hits and matcher.globs:  # without globs the pattern could not be read, which is reported already
            warn(str(matcher), matcher.globs[0], matcher.selector.span)
        live = {alternative for taken_by in hits.values() for alternative in taken_by}
        for choice in () if matcher.portable or not hits else matcher.globs[0].unmatched(live):
            warn(f"{choice} in {matcher}", matcher.globs[0].making(choice), matcher.globs[0].place(choice))
    return {names[p][0]: p for p in names if p in chosen}
