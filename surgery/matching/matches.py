"""Matches: which sites a target's selectors take, and which of its patterns and their alternatives do.

Takes a model's survey and a target, gives `Matches`. Promises: nothing is decided here between targets; what is wrong
with a selector is reported, not raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from surgery.diagnostics import Collector, Span
from surgery.language.tree import Select, Target
from surgery.layers.kinds import NORM
from surgery.layers.survey import Refused, Site, Survey
from surgery.matching.patterns import Alternative, marked
from surgery.matching.selectors import Hits, Matcher, matchers
from surgery.matching.suggestions import Population


class Catalogue:
    """A model's survey with every name ready to be matched."""

    def __init__(self, model: nn.Module):
        self.survey = Survey(model)
        self.title = type(self.survey.model).__name__

    @cached_property
    def marked(self) -> dict[object, tuple[str, ...]]:
        """The marked names of sites, refused modules, and (by name) of every module."""
        counts = self.survey.counts
        names: dict[object, tuple[str, ...]] = {name: (marked(name, counts),) for name in self.survey.modules}
        # a module that stands at several names may be meant by any of them
        names |= {s: tuple(marked(n, counts) for n in (s.name, *s.aliases)) for s in self.survey.sites}
        return names | {r: names[r.name] for r in self.survey.refused}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the modules."""
        return tuple(dict.fromkeys(type(m).__name__ for m in self.survey.modules.values()))

    def candidates(self, target: Target) -> list[Site]:
        """The sites that the target's kind and ancestor allow. Norm layers are asked for by their word alone."""
        known = self.survey.norms if target.kind == NORM.word else self.survey.sites
        self._mark(known)
        return [s for s in known if fits(s, target)]

    def named(self, target: Target, selectors: Iterable[Matcher]) -> list[Site]:
        """The routers and the stacks of experts of a class of their own that patterns spell out to the end: `"**"`
        passes over them."""
        ends = [a for m in selectors for g in m.globs for a in g.alternatives if a.literal_end]
        refused = {r.name for r in self.survey.refused if r.matrix and any(a.matches(n) for a in ends
                                                                           for n in self.marked[r])}
        known = [s for s in self.survey.routers if s.name in refused] if refused else []  # each costs a call
        known += [s for s in self._stacks(ends) if isinstance(s, Site)]
        self._mark(known)
        return [s for s in known if fits(s, target)]

    def _stacks(self, ends: Iterable[Alternative]) -> list[Site | Refused]:
        """The parameters of refused modules that are named and could be stacks."""
        could = [(holder, own) for holder in self.survey.refused for own, p in
                 holder.module.named_parameters(recurse=False) if p.ndim == 3 and holder.matrix]
        named = [(holder, own) for holder, own in could
                 if any(a.matches(marked(f"{holder.name}.{own}", self.survey.counts)) for a in ends)]
        return [self.survey.stack(*each) for each in named]

    def refused(self, ends: Iterable[Alternative]) -> list[Refused]:
        """What cannot be operated on: modules, and parameters that could be stacks and are named."""
        unshown = [s for s in self._stacks(ends) if isinstance(s, Refused)]
        self.marked.update({r: (marked(r.name, self.survey.counts),) for r in unshown})
        return [*self.survey.refused, *unshown]

    def _mark(self, sites: Iterable[Site]) -> None:
        for site in sites:
            self.marked.setdefault(site, tuple(marked(n, self.survey.counts) for n in (site.name, *site.aliases)))

    def population(self, sites: Iterable[Site]) -> Population:
        return Population(self.marked[s] for s in sites)


def fits(item: Site | Refused, target: Target) -> bool:
    """Whether the kind and the ancestor that the target asks for are the item's."""
    of_kind = item.kind == target.kind or (target.kind == "any" and item.kind != "")
    return of_kind and (target.ancestor is None or target.ancestor in item.ancestors)


@dataclass(frozen=True, eq=False)
class Matches:
    """What one target takes: the `sites` with the matcher of each (None without selectors). `takes` and `drops` are the
    hits of its selectors and of its `except`, before one is taken from the other."""

    index: int
    target: Target
    takes: Mapping[Matcher, Hits[Site]]
    drops: Mapping[Matcher, Hits[Site]]
    sites: Mapping[Site, Matcher | None] = field(repr=False)

    def __str__(self) -> str:
        where = self.target.span
        return f"the target at {where.source.name}:{where.line}" if where else f"target {self.index + 1}"

    def place(self, site: Site) -> Span | None:
        """Where the spec takes the site: its selector, or the target."""
        matcher = self.sites.get(site)
        return (matcher.selector.span if matcher else None) or self.target.span

    def leaves_out(self, site: Site) -> str:
        """Why it leaves out a site that it would take otherwise; empty if that is not so."""
        dropped = next((m for m, hits in self.drops.items() if site in hits), None)
        if dropped:
            return f"the `except` of {self} leaves it out: {dropped}"
        if site.is_head and not self.target.selectors and fits(site, self.target):
            return f"it is the output head, which {self} leaves out since it has no pattern"
        return ""

    def why_not(self, site: Site) -> str:
        """Why it does not take a site."""
        if not fits(site, self.target):
            inside = f" in {self.target.ancestor}" if self.target.ancestor else ""
            return f"{self} is for `{self.target.kind}{inside}`, and this is `{site.kind}`"
        return self.leaves_out(site) or f"no pattern of {self} matches it: {', '.join(map(str, self.takes))}"


def matches_of(index: int, target: Target, catalogue: Catalogue, selects: Mapping[str, Select],
               report: Collector) -> Matches:
    """What a target takes, from its kind, its selectors and its `except`."""
    selectors = matchers(target.selectors, selects, report)
    candidates = [*catalogue.candidates(target), *catalogue.named(target, selectors)]
    takes = {m: m.hits(catalogue.marked, candidates) for m in selectors}
    first = {s: next((m for m, hits in takes.items() if s in hits), None) for s in candidates}
    taken = [s for s in candidates if first[s] or not target.selectors]
    drops = {m: m.hits(catalogue.marked, taken) for m in matchers(target.exclude, selects, report)}
    # A target without a pattern leaves the output head alone: few methods train it, and it is often tied to the
    # embedding. A pattern that matches it asks for it.
    kept = [s for s in taken if not any(s in hits for hits in drops.values()) and (target.selectors or not s.is_head)]
    return Matches(index, target, takes, drops, {s: first[s] for s in kept})
