"""Quick fixes: the changes of a text that a diagnostic's `did you mean` is sure of.

Takes a text and a diagnostic; gives a `Fix`. Promises: sure is what was tried: with the change made, the diagnostic is
gone and there is no error that was not there before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from surgery.diagnostics import Diagnostic
from surgery.language.grammar import is_name

Check = Callable[[str], Iterable[Diagnostic]]


@dataclass(frozen=True)
class Fix:
    """Text [start, end) becomes `new`."""

    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


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
