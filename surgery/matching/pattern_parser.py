"""From a pattern's text to the tokens of its segments, a choice made in each of its braces.

Takes the text of a pattern; gives each way of choosing, in order. Promises: a pattern that is not well formed is a
`bad-pattern` whose place lies inside the string.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.diagnostics import Span, SurgeryError, fail
from surgery.language.tree import Pattern

MOST_ALTERNATIVES = 4096
MOST_BRACES = 64
LONGEST_RANGE = 1000

_PIECE = re.compile(r"\*+|[?.{},]|[^*?.{},]+")
_RANGE = re.compile(r"(?:(-?\d{1,9})\.\.(-?\d{1,9})|(-\d{1,9}))(?=[,}])")
_DOTS = re.compile(r"[^.,{}]*\.\.[^.,{}]*(?=[,}])")
_FOREIGN = re.compile(r"[\\^$()|\[\]\s]+")
_GLOB_HELP = "a pattern is a glob: `*` is any text within a segment, `**` any segments, `{a,b}` one of several"


@dataclass(frozen=True)
class Token:
    """A piece of a pattern at offset `at`: `kind` is `text`, `*`, `?`, `.`, `**` or `range`."""

    kind: str
    at: int
    text: str
    low: int = 0
    high: int = 0

    @property
    def end(self) -> int:
        return self.at + len(self.text.strip("{}"))

    @property
    def from_end(self) -> bool:
        return self.high < 0


@dataclass(frozen=True)
class Choice:
    """One item of a brace: `kk` of `{q,kk}_proj`, at [start, end) of the pattern's text."""

    text: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"`{self.text}`" if self.text else "the empty choice"

    def holds(self, other: Choice) -> bool:
        return self != other and self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class _Brace:
    items: tuple[tuple[Choice, tuple[Token | _Brace, ...]], ...]


Segments = tuple[tuple[Token, ...], ...]


def ways(pattern: Pattern) -> list[tuple[Segments, tuple[Choice, ...]]]:
    """The segments for each way of choosing in the braces, with the choices. Raises: SurgeryError (bad-pattern)."""
    foreign = _FOREIGN.search(pattern.text)
    if foreign:
        raise _bad(pattern, *foreign.span(), f"`{foreign[0]}` cannot stand in a pattern", _GLOB_HELP)
    if pattern.text.count("{") > MOST_BRACES:
        raise _bad(pattern, 0, len(pattern.text), f"more than {MOST_BRACES} braces")
    parts = _Reader(pattern).sequence(nested=False)
    if _width(parts) > MOST_ALTERNATIVES:
        raise _bad(pattern, 0, len(pattern.text), f"the braces stand for more than {MOST_ALTERNATIVES} patterns")
    return [(_segments(pattern, tokens), choices) for tokens, choices in _expand(parts)]


def inside(pattern: Pattern, start: int, end: int) -> Span | None:
    """The place of a part of the pattern's text; its span covers the quotes too."""
    span = pattern.span
    if span is None or span.end - span.start != len(pattern.text) + 2:
        return span
    return Span(span.source, span.start + 1 + start, span.start + 1 + max(end, start + 1))


def _bad(pattern: Pattern, start: int, end: int, message: str, *helps: str) -> SurgeryError:
    return fail("bad-pattern", f'in pattern "{pattern.text}": {message}', inside(pattern, start, end), helps=helps)


class _Reader:
    """Reads a pattern's text into tokens and braces."""

    def __init__(self, pattern: Pattern):
        self.pattern, self.text, self.at = pattern, pattern.text, 0

    def sequence(self, nested: bool) -> tuple[Token | _Brace, ...]:
        parts = []
        while self.at < len(self.text) and not (nested and self.text[self.at] in ",}"):
            parts.append(self.brace() if self.text[self.at] == "{" else self.token())
        return tuple(parts)

    def token(self) -> Token:
        start, match = self.at, _PIECE.match(self.text, self.at)
        assert match is not None  # whatever the character, a piece begins with it
        piece = match[0]
        self.at += len(piece)
        if piece == ",":
            raise _bad(self.pattern, start, self.at, "a `,` outside braces",
                       "separate patterns are separate strings, and one of several names is `{a,b}`")
        if piece == "}":
            raise _bad(self.pattern, start, self.at, "a `}` that closes nothing")
        if piece.startswith("***"):
            raise _bad(self.pattern, start, self.at, f"`{piece}` is neither `*` nor `**`", _GLOB_HELP)
        return Token(piece if piece in ("*", "**", "?", ".") else "text", start, piece)

    def brace(self) -> _Brace:
        start, items = self.at, []
        while not items or self.text[self.at] == ",":
            self.at += 1
            items.append(self.item())
            if self.at == len(self.text):
                raise _bad(self.pattern, start, start + 1, "this `{` is never closed")
        self.at += 1
        if self.at == start + 2:
            raise _bad(self.pattern, start, self.at, "empty braces")
        return _Brace(tuple(items))

    def item(self) -> tuple[Choice, tuple[Token | _Brace, ...]]:
        start, numbers = self.at, _RANGE.match(self.text, self.at)
        mistaken = None if numbers else _DOTS.match(self.text, self.at)  # `a..b`: two dots are never part of a name
        if mistaken:
            raise _bad(self.pattern, *mistaken.span(), f"`{mistaken[0]}` is no range of layers",
                       "`{0..11}` is from 0 to 11")
        parts = (self.range(numbers),) if numbers else self.sequence(nested=True)
        return Choice(self.text[start:self.at], start, self.at), parts

    def range(self, match: re.Match) -> Token:
        low, high = (int(match[i] or match[3]) for i in (1, 2))  # a negative index alone is a range of one
        self.at = match.end()
        fault = ""
        if low < 0 <= high:
            fault = "starts from the end and stops from the start"
        elif (low < 0) == (high < 0) and low > high:
            fault = "runs backwards"
        # each number becomes an alternative of a regular expression; `4..-1` has those that it leaves out instead
        elif (high - low if low < 0 or high >= 0 else max(low, -high)) >= LONGEST_RANGE:
            fault = f"spans more than {LONGEST_RANGE} numbers"
        if fault:
            raise _bad(self.pattern, *match.span(), f"`{match[0]}` {fault}", "`{4..-1}` is from 4 to the last")
        return Token("range", match.start(), f"{{{match[0]}}}", low, high)


def _width(parts: tuple[Token | _Brace, ...]) -> int:
    return math.prod(sum(_width(inner) for _, inner in p.items) for p in parts if isinstance(p, _Brace))


def _expand(parts: tuple[Token | _Brace, ...]) -> Iterator[tuple[tuple[Token, ...], tuple[Choice, ...]]]:
    """Each way of choosing one item in every brace: the tokens that are left, and the choices."""
    ways_of_parts = []
    for part in parts:
        if isinstance(part, Token):
            ways_of_parts.append([((part,), ())])
        else:
            ways_of_parts.append([(tokens, (choice, *chosen)) for choice, inner in part.items
                                  for tokens, chosen in _expand(inner)])
    for combination in itertools.product(*ways_of_parts):
        yield (tuple(token for tokens, _ in combination for token in tokens),
               tuple(choice for _, chosen in combination for choice in chosen))


def _segments(pattern: Pattern, tokens: tuple[Token, ...]) -> Segments:
    """The tokens between the dots. Raises: SurgeryError for an empty segment or one that mixes what must stand
    alone."""
    segments: list[list[Token]] = [[]]
    dot = 0
    # A dot is put behind the last segment, so that the end is checked like any other dot.
    for token in (*tokens, Token(".", max(len(pattern.text) - 1, 0), ".")):
        if token.kind != ".":
            segments[-1].append(token)
        elif segments[-1]:
            segments.append([])
            dot = token.at
        else:
            raise _bad(pattern, min(dot, token.at), token.at + 1, "an empty segment",
                       "`**.name` is `name` at any depth" if tokens else _GLOB_HELP)
    # `a**` could be read in more than one way, and what is counted from the end of a list is a whole segment.
    for token in (token for segment in segments if len(segment) > 1 for token in segment):
        if token.kind == "**" or token.from_end:
            raise _bad(pattern, token.at, token.end, f"`{token.text}` must be a segment of its own",
                       "`*` is any text within a segment"
                       if token.kind == "**" else "an index from the end has no prefix")
    return tuple(map(tuple, segments[:-1]))
