"""Selectors: the patterns and names of `select`s that a spec gives, compiled.

Takes selectors and the selects in scope, gives `Matcher`s. Promises: what is wrong with one (a pattern that is not well
formed, a name that no `select` has) is reported at its place, from the text alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from surgery.diagnostics import Collector, Diagnostic, SurgeryError, did_you_mean
from surgery.language.tree import Pattern, Reference, Select, Spec
from surgery.matching.patterns import Alternative, Glob, compile_pattern

_Item = TypeVar("_Item")
Hits = Mapping[_Item, tuple[Alternative, ...]]


@dataclass(frozen=True, eq=False)
class Matcher:
    """A selector of a spec with its globs: one for a pattern, those of the `select` for a reference."""

    selector: Pattern | Reference
    globs: tuple[Glob, ...]
    defined: Select | None = None

    def __str__(self) -> str:
        selector = self.selector
        return f'pattern "{selector.text}"' if isinstance(selector, Pattern) else f"selector `{selector.name}`"

    @property
    def portable(self) -> bool:
        """Whether its alternatives may be dead: those of a `select` are."""
        return isinstance(self.selector, Reference)

    def hits(self, marked_names: Mapping[Any, tuple[str, ...]], items: Iterable[_Item]) -> Hits[_Item]:
        """The items that it takes, each with the alternatives that do."""
        found = {i: tuple(a for g in self.globs for n in marked_names[i] for a in g.live(n)) for i in items}
        return {i: live for i, live in found.items() if live}


def matchers(selectors: Iterable[Pattern | Reference], selects: Mapping[str, Select],
             report: Collector) -> list[Matcher]:
    """The selectors compiled; what is wrong with one is reported."""
    return [Matcher(s, tuple(_globs(s, selects, report)), _definition(s, selects)) for s in selectors]


def _definition(selector: Pattern | Reference, selects: Mapping[str, Select]) -> Select | None:
    return selects.get(selector.name) if isinstance(selector, Reference) else None


def _globs(selector: Pattern | Reference, selects: Mapping[str, Select], report: Collector) -> list[Glob]:
    """The globs that a selector stands for, those of a `select` that is named twice once; what is wrong is reported."""
    found: list[Glob] = []
    read: set[str] = set()
    within: dict[str, None] = {}  # the selects that the next one is named in
    stack: list[Pattern | Reference | str] = [selector]  # a text: the end of a select of that name
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            del within[each]
        elif isinstance(each, Pattern):
            found += _compiled(each, report)
        elif each.name not in selects or each.name in within:
            report.add(*_unknown(each, selects, within).diagnostics)
        elif each.name not in read:
            read.add(each.name)
            within[each.name] = None
            stack += [each.name, *reversed(selects[each.name].patterns)]
    return found


def _compiled(pattern: Pattern, report: Collector) -> list[Glob]:
    try:
        return [compile_pattern(pattern)]
    except SurgeryError as error:
        report.add(*error.diagnostics)
        return []


def _unknown(selector: Reference, selects: Mapping[str, Select], within: Collection[str]) -> SurgeryError:
    report = Collector()
    if selector.name in within:
        report.error("unknown-selector", f"the selector `{selector.name}` is made of itself", selector.span)
    else:
        report.error("unknown-selector", f"no selector is called `{selector.name}`", selector.span,
                     notes=(f"known selectors: {', '.join(selects) or 'none'}",),
                     helps=(did_you_mean(selector.name, selects) or f'a pattern stands in quotes: "**.{selector.name}"',
                            ))
    return SurgeryError(report.found)


def selector_faults(spec: Spec, selects: Mapping[str, Select]) -> list[Diagnostic]:
    """What is wrong with the selectors of a spec, whatever the model."""
    report = Collector()
    in_targets = [s for target in spec.targets for s in (*target.selectors, *target.exclude)]
    listed = [s for each in (*spec.selects, *spec.train) for s in each.patterns]
    matchers([*in_targets, *listed], selects, report)
    return report.found
