"""Fixes: the changes of a text that a diagnostic's `did you mean` is sure of.

Takes a text and its diagnostics; gives a `Fix`, or the text with all of them made. Promises: sure is what was tried:
with the change made, the diagnostic is gone and there is no error that was not there before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from surgery.diagnostics import Diagnostic, SurgeryError
from surgery.language.grammar import is_name
from surgery.language.parser import parse_text
from surgery.planning.check import check as checked_spec

Check = Callable[[str], Iterable[Diagnostic]]
_MOST = 100  # names that are changed in one text


@dataclass(frozen=True)
class Fix:
    """Text [start, end) becomes `new`."""

    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


@dataclass(frozen=True)
class Change:
    """What was changed, and where it stood in the text before (`mine.surg:3:7`)."""

    place: str
    old: str
    new: str


def fix(text: str, diagnostic: Diagnostic, check: Check) -> Fix | None:
    """The change that a diagnostic of this text suggests; None where it suggests none, or one that leaves something
    wrong. `check` says what is wrong with a text."""
    suggested = _suggested(text, diagnostic)
    if suggested is None:
        return None
    # Places move with the change, so that findings are told apart by what they say. A warning may come to light: some
    # are looked for only where there is no error.
    told = (diagnostic.code, diagnostic.message)
    before, after = [Counter((d.code, d.message) for d in check(each) if d.severity == "error" or told ==
                             (d.code, d.message)) for each in (text, suggested.apply(text))]
    return suggested if after <= before - Counter([told]) else None


def fixed(text: str, name: str = "<text>") -> tuple[str, list[Change]]:
    """The text of a spec with every name that was surely meant otherwise, and what was changed. Of patterns and files
    none is: what a name in a model or on a disk should be, only who wrote it knows.

    >>> from surgery.planning.fixes import fixed
    >>> fixed('target "**.q_proj" { add low_rnk(8) }')[0]
    'target "**.q_proj" { add low_rank(8) }'
    """
    mark = text[: text.startswith("\ufeff")]  # of Windows' editors, which the parser leaves out
    text = text[len(mark):]

    def findings(text: str) -> list[Diagnostic]:
        try:
            return checked_spec(parse_text(text, name), tried=False)
        except SurgeryError as error:
            return list(error.diagnostics)

    # A misspelt name may hide others, its arguments: all are changed, one after the other. Where that leaves an error
    # that was not there before, only those are that leave none by themselves.
    together, changes = _changed(text, findings, _suggested)
    if _errors(findings(together)) <= _errors(findings(text)):
        return mark + together, changes
    alone, changes = _changed(text, findings, lambda text, each: fix(text, each, findings))
    return mark + alone, changes


def _changed(text: str, check: Check, change: Callable[[str, Diagnostic], Fix | None]) -> tuple[str, list[Change]]:
    """The text with the changes of names, and what they were; what is looked for again after each."""
    changes: list[Change] = []
    while len(changes) < _MOST:
        for each in (d for d in check(text) if not d.meant.startswith('"')):
            made = change(text, each)
            if made and is_name(text[made.start : made.end]):
                changes.append(Change(str(each.span), text[made.start : made.end], made.new))
                text = made.apply(text)
                break
        else:
            return text, changes
    return text, changes


def _errors(found: Iterable[Diagnostic]) -> Counter[tuple[str, str]]:
    return Counter((d.code, d.message) for d in found if d.severity == "error")


def _suggested(text: str, diagnostic: Diagnostic) -> Fix | None:
    meant, span = diagnostic.meant, diagnostic.span
    if not meant or span is None or span.source.text != text:
        return None
    wrong = text[span.start : span.end]
    if is_name(wrong) and not meant.startswith('"'):
        return Fix(span.start, span.end, meant)
    quoted = list(re.finditer(r'"[^"\r\n]*"', wrong))
    if len(quoted) == 1:  # a pattern, or the file of a `use`
        start, end = (span.start + place for place in quoted[0].span())
        return Fix(start, end, f'"{meant.strip(chr(34))}"')
    return None
