"""Near misses: what a pattern that matches nothing was probably meant to say.

Takes a population of names and a `Glob`, gives a corrected pattern with how much it matches. Spelling is mended per
segment, against the segments that the names are made of; shape by a missing `**`, a `*` that should cross dots, or a
parameter's name where a module's is asked for. Promises: what it suggests matches something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product

from surgery.diagnostics import nearest
from surgery.matching.pattern_parser import Token
from surgery.matching.patterns import Alternative, Glob, compile_pattern

Names = tuple[str, ...]
_MOST_SEGMENTS = 20  # of a pattern whose shape is mended


class Population:
    """The names among which a pattern is looked for, each as `marked` (an item may have several)."""

    def __init__(self, items: Iterable[tuple[str, ...]]):
        self.items = list(items)

    @cached_property
    def segments(self) -> dict[str, None]:
        """Every segment of every name, in order."""
        found = dict.fromkeys(s.split("\0")[0] for names in self.items for name in names for s in name.split("."))
        return {s: None for s in found if re.fullmatch(r"[\w-]+", s)}

    @cached_property
    def words(self) -> dict[str, None]:
        """Every part of a segment between underscores."""
        return dict.fromkeys(w for s in self.segments for w in s.split("_") if w and not w.isdecimal())

    def count(self, glob: Glob) -> int:
        return sum(any(glob.live(name) for name in names) for names in self.items)

    def suggest(self, glob: Glob) -> tuple[str, int] | None:
        """(pattern, how many it matches) nearest to what was written, or None."""
        texts = dict.fromkeys([*_opened(glob), *(t for a in glob.alternatives() for t in self._mended(a))])
        counted = ((text, self.count(compile_pattern(text))) for text in texts if text)
        return next((found for found in counted if found[1]), None)

    def _mended(self, alternative: Alternative) -> Iterator[str]:
        bases = product((alternative.segments, _without_parameter(alternative.segments)), (_as_written, self._spelt))
        for names in dict.fromkeys(mend(segments) for segments, mend in bases):
            yield from map(".".join, _shapes(names))

    def _spelt(self, segments: tuple[tuple[Token, ...], ...]) -> Names:
        return tuple(map(self._spelt_segment, segments))

    def _spelt_segment(self, segment: tuple[Token, ...]) -> str:
        text = "".join(t.text for t in segment)
        one = Alternative((segment,), ())
        if any(t.kind in ("**", "range") for t in segment) or any(one.matches(s + ".") for s in self.segments):
            return text
        if one.literal_end:
            return (nearest(text, self.segments) or [text])[0]
        return re.sub(r"[A-Za-z]+", lambda m: (nearest(m[0], self.words) or [m[0]])[0], text)


def _opened(glob: Glob) -> tuple[str, ...]:
    """A pattern with braces, kept whole: at any depth, or everything below it."""
    return (f"**.{glob.text}", f"{glob.text}.*", f"{glob.text}.**") if len(glob.alternatives()) > 1 else ()


def _as_written(segments: tuple[tuple[Token, ...], ...]) -> Names:
    return Alternative(segments, ()).names


def _without_parameter(segments: tuple[tuple[Token, ...], ...]) -> tuple[tuple[Token, ...], ...]:
    return segments[:-1] if segments[-1][0].text in ("weight", "bias") else segments


def _shapes(names: Names) -> Iterator[Names]:
    """The names as they are, with `**` for every `*`, and with one more segment left open at each place."""
    yield names
    if len(names) > _MOST_SEGMENTS:
        return
    yield tuple("**" if n == "*" else n for n in names)
    yield ("**", *names)
    for at in range(len(names) - 1, 0, -1):
        yield (*names[:at], "**", *names[at:])
    yield (*names, "*")
    yield (*names, "**")
    yield ("**", *names, "*")
    yield ("**", *names, "**")
