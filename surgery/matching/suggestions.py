"""Suggestions: what a pattern that matches nothing was probably meant to say.

Takes a population of names and a `Glob`, gives a corrected pattern with how much it matches. Spelling is mended per
segment, against the segments that the names are made of; shape by a missing `**`, a `*` that should cross dots, or a
parameter's name where a module's is asked for. Promises: what it suggests matches something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

from surgery.diagnostics import nearest
from surgery.matching.pattern_parser import Token
from surgery.matching.patterns import Alternative, Glob, compile_pattern

_MOST_SEGMENTS = 20  # of a pattern whose shape is mended


class Population:
    """The names among which a pattern is looked for, each as `marked` (an item may have several)."""

    def __init__(self, items: Iterable[tuple[str, ...]]):
        self.items = list(items)

    @cached_property
    def segments(self) -> dict[str, None]:
        """Every segment of every name, in order."""
        every = dict.fromkeys(s.split("\0")[0] for names in self.items for name in names for s in name.split("."))
        return {s: None for s in every if re.fullmatch(r"[\w-]+", s)}

    @cached_property
    def words(self) -> dict[str, None]:
        """Every part of a segment between underscores."""
        return dict.fromkeys(w for s in self.segments for w in s.split("_") if w and not w.isdecimal())

    def count(self, glob: Glob) -> int:
        return sum(any(glob.live(name) for name in names) for names in self.items)

    def suggest(self, glob: Glob) -> tuple[str, int] | None:
        """(pattern, how many it matches) nearest to what was written, or None."""
        texts = [text for alternative in glob.alternatives for text in self._mended(alternative)]
        if len(glob.alternatives) > 1:
            # a pattern with braces may be right as a whole: tried first at any depth, and as all that is below it
            texts = [f"**.{glob.text}", f"{glob.text}.*", f"{glob.text}.**", *texts]
        counted = ((text, self.count(compile_pattern(text))) for text in dict.fromkeys(texts) if text)
        return next((suggested for suggested in counted if suggested[1]), None)

    def _mended(self, alternative: Alternative) -> Iterator[str]:
        """Patterns near an alternative: as it is written, then with its spelling mended, each in several shapes."""
        # Who asks for `q_proj.weight` means the module: the name of the parameter is tried left out.
        segments = alternative.segments
        modules = segments[:-1] if segments[-1][0].text in ("weight", "bias") else segments
        bases = [names for each in (segments, modules)
                 for names in (Alternative(each, ()).names, tuple(map(self._spelt_segment, each)))]
        for names in dict.fromkeys(bases):
            shapes = [names]
            if len(names) <= _MOST_SEGMENTS:  # a long pattern would have too many shapes to try
                # `**` for every `*`, then one more segment left open at each place, then at both ends
                shapes += [tuple("**" if n == "*" else n for n in names), ("**", *names)]
                shapes += [(*names[:at], "**", *names[at:]) for at in range(len(names) - 1, 0, -1)]
                shapes += [(*names, "*"), (*names, "**"), ("**", *names, "*"), ("**", *names, "**")]
            yield from map(".".join, shapes)

    def _spelt_segment(self, segment: tuple[Token, ...]) -> str:
        """A segment with the spelling of the nearest one that the names have."""
        text = "".join(t.text for t in segment)
        one = Alternative((segment,), ())
        if any(t.kind in ("**", "range") for t in segment) or any(one.matches(s + ".") for s in self.segments):
            return text
        if one.literal_end:
            return (nearest(text, self.segments) or [text])[0]
        # with a `*` in it the whole segment is near nothing: the words between the signs are mended instead
        return re.sub(r"[A-Za-z]+", lambda m: (nearest(m[0], self.words) or [m[0]])[0], text)
