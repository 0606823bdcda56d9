"""Selectors: the patterns and names of `select`s that a spec gives, compiled.

Takes selectors and the selects in scope, gives `Matcher`s. Promises: what is wrong with one (a pattern that is not well
formed, a name that no `select` has) is reported at its place, from the text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from surgery.diagnostics import Collector, Diagnostic, SurgeryError, did_you_mean
from surgery.language.tree import Pattern, Reference, Select, Spec, every_selector
from surgery.layers.kinds import NOUNS
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
        """Whether its alternatives may match nothing: those of a `select` are."""
        return isinstance(self.selector, Reference)

    def hits(self, marked_names: Mapping[Any, tuple[str, ...]], items: Iterable[_Item]) -> Hits[_Item]:
        """The items that it takes, each with the alternatives that do."""
        taken_by = {i: tuple(a for g in self.globs for n in marked_names[i] for a in g.live(n)) for i in items}
        return {i: live for i, live in taken_by.items() if live}


def matchers(selectors: Iterable[Pattern | Reference], selects: Mapping[str, Select],
             report: Collector) -> list[Matcher]:
    """The selectors compiled; what is wrong with one is reported."""
    return [Matcher(s, tuple(_globs(s, selects, report)), selects.get(s.name) if isinstance(s, Reference) else None)
            for s in selectors]


def _globs(selector: Pattern | Reference, selects: Mapping[str, Select], report: Collector) -> list[Glob]:
    """The globs that a selector stands for, those of a `select` that is named twice once; what is wrong is reported."""
    globs: list[Glob] = []
    read: set[str] = set()
    within: dict[str, None] = {}  # the selects that the next one is named in
    # A stack and no recursion, as a file may hold a chain of selects that is longer than Python's own stack.
    stack: list[Pattern | Reference | str] = [selector]  # a text: the end of a select of that name
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            del within[each]
        elif isinstance(each, Pattern):
            # one wrong pattern is reported and the others are still read, so that a run finds all mistakes
            try:
                globs.append(compile_pattern(each))
            except SurgeryError as error:
                report.add(*error.diagnostics)
        elif each.name in within:
            report.error("unknown-selector", f"the selector `{each.name}` is made of itself", each.span)
        elif each.name not in selects:
            report.error("unknown-selector", f"no selector is called `{each.name}`", each.span,
                         notes=(f"known selectors: {', '.join(selects) or 'none'}",),
                         helps=(did_you_mean(each.name, [*selects, *NOUNS])
                                or f'a pattern stands in quotes: "**.{each.name}"',))
        elif each.name not in read:
            read.add(each.name)
            within[each.name] = None
            stack += [each.name, *reversed(selects[each.name].patterns)]
    return globs


def selector_faults(spec: Spec, selects: Mapping[str, Select]) -> list[Diagnostic]:
    """What is wrong with the selectors of a spec, whatever the model."""
    report = Collector()
    matchers(every_selector(spec), selects, report)
    return report.found
