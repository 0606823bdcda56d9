"""Unmatched names: what a spec names and the model does not have.

Takes a target's `Matches`, reports: a target that takes nothing (`no-match`), a selector or one alternative of it that
does (`dead-name`, a warning), and one that names what cannot be operated on (`unsupported-module`). Promises: every
report says what is near, or what the name does stand for, or what there is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from surgery.diagnostics import Collector, Diagnostic, Span, did_you_mean
from surgery.language.tree import Target
from surgery.layers.kinds import NOUNS
from surgery.layers.survey import Refused
from surgery.matching.matches import Catalogue, Matches, fits
from surgery.matching.patterns import Alternative, Glob
from surgery.matching.selectors import Matcher
from surgery.matching.suggestions import Population
from surgery.text import counted, listed, some

MOST_NAMES = 12
_NAMED_END = re.compile(r"([^.]*[^.\d][^.]*(?:\.\d+)*)?$")
_HEAD_ALONE = "it leaves the output head out, and there is no other", ('a pattern takes the head too: `"**"`',)


def report_unmatched(found: Matches, catalogue: Catalogue, report: Collector) -> None:
    """What matches nothing in a target. A pattern that could not be read is not looked at again."""
    if any(not m.globs for m in (*found.takes, *found.drops)):
        return
    target = found.target
    named = [_report_unsupported(m, hits, target, catalogue, report) for m, hits in found.takes.items()]
    if not (catalogue.candidates(target) or any(found.takes.values())):  # a name may take what no other pattern does
        if not any(named):  # which is why there is nothing, and has been reported
            report.add(_nothing_there(target, catalogue))
        return
    # A target that takes nothing is a mistake; one unmatched name among others may be meant for another model.
    takes_none = found.takes and not any(found.takes.values())
    for (matcher, hits), unsupported in zip(found.takes.items(), named):
        if not hits and not unsupported:
            _report_matcher(matcher, target, catalogue, report, "no-match" if takes_none else "dead-name")
        if hits and not matcher.portable:
            _report_choices(matcher, hits, target, catalogue, report)
    if not found.sites and not takes_none:
        why, helps = ("`except` leaves all of them out", ()) if any(found.drops.values()) else _HEAD_ALONE
        report.error("no-match", f"{found} takes no {wanted(target)} of {catalogue.title}: {why}", target.span,
                     helps=helps)
    for matcher, hits in found.drops.items():
        if not hits:
            _report_matcher(matcher, target, catalogue, report, "dead-name", "leaves out no")
        elif not matcher.portable:
            _report_choices(matcher, hits, target, catalogue, report)


def wanted(target: Target) -> str:
    """What the target asks for, in words."""
    return NOUNS[target.kind] + (f" in a {target.ancestor}" if target.ancestor else "")


_EVERY_LINEAR = ("all-linear", "all_linear", "Linear")  # as PEFT says, and as torch calls one


def suggestion(population: Population, glob: Glob, noun: str) -> tuple[str, ...]:
    """The help that offers the nearest pattern, if there is one."""
    suggested = population.suggest(glob)
    if suggested is None and glob.text in _EVERY_LINEAR:
        return ("every linear layer but the output head is taken by `target linear { ... }`, without a pattern",)
    return (f'did you mean "{suggested[0]}" ({counted(suggested[1], noun)})?',) if suggested else ()


# --------------------------------------------------------------------------------------------- a target as a whole


def _nothing_there(target: Target, catalogue: Catalogue) -> Diagnostic:
    """No site has the kind, or none the ancestor."""
    refused = [f"`{r.name}` cannot be taken: {r.reason}" for r in catalogue.survey.refused if fits(r, target)]
    near = did_you_mean(target.ancestor, catalogue.classes) if target.ancestor not in (None, *catalogue.classes) else ""
    message = f"{catalogue.title} has no {wanted(target)}" + (" that can be taken" if refused else "")
    place = target.span
    if place is not None and target.ancestor is not None:
        # the tree keeps no place for the ancestor's name, so it is looked for in the target's text
        text = place.source.text[place.start:place.end]
        if word := re.search(rf"\bin\s+({re.escape(target.ancestor)})\b", text):
            place = Span(place.source, place.start + word.start(1), place.start + word.end(1))
    notes = refused[:3] if refused or near else _instead(target, catalogue)
    return Diagnostic("no-match", message, place, notes=tuple(notes), helps=(near,) if near else ())


def _instead(target: Target, catalogue: Catalogue) -> list[str]:
    """What there is where no layer has the kind of a target: layers of other kinds, or what else holds numbers."""
    known = (*catalogue.survey.sites, *catalogue.survey.norms)
    kinds = Counter(s.kind for s in known if target.ancestor is None or target.ancestor in s.ancestors)
    where = f"in a {target.ancestor} " if target.ancestor else ""
    if kinds:
        return [f"{where}there {'is' if count == 1 else 'are'} {counted(count, NOUNS[kind])}: `target {kind}` takes "
                f"{'it' if count == 1 else 'them'}" for kind, count in kinds.items()]
    held = [(name, type(module).__name__) for name, module in catalogue.survey.modules.items()
            if any(p.ndim > 1 for p in module.parameters(recurse=False))]
    return [f"{f'`{name}`' if name else 'the model itself'}, of class {kind}, is no layer of a known kind; `train` "
            "unfreezes its parameters" for name, kind in held[:3]]


# ------------------------------------------------------------------------------- a selector, or a part of one


def _report_matcher(matcher: Matcher, target: Target, catalogue: Catalogue, report: Collector, code: str,
                    verb: str = "matches no") -> None:
    add = report.error if code == "no-match" else report.warn
    notes, helps = _advice(matcher.globs, target, catalogue, matcher)
    add(code, f"{matcher} {verb} {wanted(target)} of {catalogue.title}", matcher.selector.span, notes=notes,
        helps=helps)


def _report_choices(matcher: Matcher, hits: Mapping, target: Target, catalogue: Catalogue, report: Collector) -> None:
    live = {alternative for taken_by in hits.values() for alternative in taken_by}
    for glob in matcher.globs:
        for choice in glob.unmatched(live):
            notes, helps = _advice([glob.making(choice)], target, catalogue)
            report.warn("dead-name", f'{choice} in pattern "{glob.text}" matches no {wanted(target)} of '
                        f"{catalogue.title}", glob.place(choice), notes=notes, helps=helps)


def _advice(globs: Iterable[Glob], target: Target, catalogue: Catalogue,
            matcher: Matcher | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(notes, helps) for globs that take nothing: what they stand for, what is near, or what there is."""
    if matcher and matcher.defined:
        place = matcher.defined.span
        texts = f"defined at {place}" if place else ", ".join(g.text for g in matcher.globs)
        return (f"`{matcher.defined.name}` is {texts}", _named(target, catalogue)), ()
    stands = tuple(text for g in globs for text in _stands_for(g, target, catalogue) or _lists(g, catalogue))
    population = catalogue.population(catalogue.candidates(target))
    helps = tuple(h for g in globs for h in suggestion(population, g, NOUNS[target.kind].split()[-1]))
    return (stands if stands or helps else (_named(target, catalogue),)), helps


def _stands_for(glob: Glob, target: Target, catalogue: Catalogue) -> tuple[str, ...]:
    """What the glob does match: layers of another kind, norms, containers."""
    every = catalogue.survey.modules
    names = [n for n in every if n and any(glob.live(m) for m in catalogue.marked[n])]
    if not names:
        return ()
    other = next((s.kind for s in catalogue.survey.sites if s.name in names and s.kind != target.kind), "")
    kind = f": `target {other}` takes it" if other and target.kind != "any" else ""
    return (f"it matches {listed(names, 1)}, of class {type(every[names[0]]).__name__}{kind}",)


def _lists(glob: Glob, catalogue: Catalogue) -> tuple[str, ...]:
    """How long the model's lists of layers are, for a glob that counts layers."""
    lists = [(n, m) for n, m in catalogue.survey.modules.items() if isinstance(m, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    counts = any(t.kind == "range" or t.text.isdecimal() for a in glob.alternatives for s in a.segments for t in s)
    return tuple(f"`{n}` has {counted(len(m), 'layer')}" for n, m in outer[:3]) if counts else ()


def _named(target: Target, catalogue: Catalogue) -> str:
    """The names that the layers of the kind do have."""
    ends = (_NAMED_END.search(s.name) for s in catalogue.candidates(target))
    names = list(dict.fromkeys(end[0] for end in ends if end and end[0]))
    kind = f"{wanted(target)}s".replace("layer in a", "layers in a")
    return f"{catalogue.title} has {kind} named {some(names, MOST_NAMES)}"


# --------------------------------------------------------------------------------------- what cannot be operated on


def _report_unsupported(matcher: Matcher, hits: Mapping, target: Target, catalogue: Catalogue,
                        report: Collector) -> bool:
    """Reports what a pattern names (its last segment spelt out) and no spec can take; whether there is any."""
    if matcher.portable:
        return False
    live = {alternative for taken_by in hits.values() for alternative in taken_by}

    def means(alternative: Alternative, refused: Refused) -> bool:
        # A layer of the target's kind is always meant. A foreign module is meant only by a name that takes nothing
        # else: `**.attention` may pass over a container on its way.
        if not any(alternative.matches(name) for name in catalogue.marked[refused]):
            return False
        holds_sites = any(s.name.startswith(f"{refused.name}.") for s in catalogue.survey.sites)
        return fits(refused, target) or (refused.kind == "" and alternative not in live and not holds_sites)

    alternatives = [a for glob in matcher.globs for a in glob.alternatives if a.literal_end]
    named = [r for a in alternatives for r in catalogue.refused(alternatives) if means(a, r)]
    for reason in dict.fromkeys(r.reason for r in named):
        alike = [r for r in named if r.reason == reason]
        helps = () if any(r.matrix for r in alike) else (f'`train "{alike[0].name}.*"` unfreezes its parameters',)
        report.error("unsupported-module",
                     f"{matcher} names {listed(r.name for r in alike)}, which cannot be operated on: {reason}",
                     matcher.selector.span, helps=helps)
    return bool(named)
