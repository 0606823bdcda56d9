"""Patterns: globs over dotted names, the same for `target`, `except`, `train`, `select` and `--target`.

Takes the text of a pattern, gives a `Glob`. A glob matches a whole dotted name: `*` and `?` within one segment, `**` any
number of segments (none too), `{a,b}` one of several, `{0..11}` an integer of the inclusive range, `{-4..-1}` one counted
from the end of the list that holds it. Promises: a pattern that is not well formed is a `bad-pattern` whose place lies
inside the string; no regular expression in the language (one is only how a glob runs).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from surgery.diagnostics import Span, SurgeryError, fail
from surgery.syntax.tree import Pattern

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


@dataclass(frozen=True)
class Alternative:
    """A pattern with one choice made in each of its braces; `text` is a pattern of its own."""

    segments: tuple[tuple[Token, ...], ...]
    choices: tuple[Choice, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The text of each segment."""
        return tuple("".join(t.text for t in segment) for segment in self.segments)

    @property
    def text(self) -> str:
        return ".".join(self.names)

    @property
    def literal_end(self) -> bool:
        """Whether the last segment spells a name out, rather than taking any."""
        return all(t.kind in ("text", "range", "?") for t in self.segments[-1])

    @cached_property
    def regex(self) -> re.Pattern:
        """What a `marked` name must match in whole."""
        return re.compile("".join(map(_segment_regex, self.segments)))

    def matches(self, marked_name: str) -> bool:
        return self.regex.fullmatch(marked_name) is not None


@dataclass(frozen=True)
class Glob:
    """A compiled pattern."""

    pattern: Pattern
    expansion: tuple[Alternative, ...] = field(repr=False)

    @property
    def text(self) -> str:
        return self.pattern.text

    def alternatives(self) -> tuple[Alternative, ...]:
        """The single patterns that the braces stand for, in order."""
        return self.expansion

    def matches(self, name: str, counts: Mapping[str, int]) -> bool:
        """Whether the pattern takes the whole name; `counts` gives how many children each container has."""
        return self.live(marked(name, counts)) != ()

    def live(self, marked_name: str) -> tuple[Alternative, ...]:
        """The alternatives that take a `marked` name."""
        return tuple(a for a in self.expansion if a.matches(marked_name))

    def dead(self, live: Collection[Alternative]) -> tuple[Choice, ...]:
        """The choices that no live alternative makes, the outermost of each dead brace only."""
        used = {c for a in live for c in a.choices}
        unused = dict.fromkeys(c for a in self.expansion for c in a.choices if c not in used)
        return tuple(c for c in unused if not any(other.holds(c) for other in unused))

    def making(self, choice: Choice) -> Glob:
        """The part of it that makes a choice."""
        return Glob(self.pattern, tuple(a for a in self.expansion if choice in a.choices))

    def place(self, choice: Choice) -> Span | None:
        return inside(self.pattern, choice.start, choice.end)


def compile_pattern(pattern: Pattern | str) -> Glob:
    """The glob of a pattern. Raises: SurgeryError (`bad-pattern`) with the place inside the string."""
    pattern = Pattern(pattern) if isinstance(pattern, str) else pattern
    foreign = _FOREIGN.search(pattern.text)
    if foreign:
        raise _bad(pattern, *foreign.span(), f"`{foreign[0]}` cannot stand in a pattern", _GLOB_HELP)
    if pattern.text.count("{") > MOST_BRACES:
        raise _bad(pattern, 0, len(pattern.text), f"more than {MOST_BRACES} braces")
    parts = _Reader(pattern).sequence(nested=False)
    if _width(parts) > MOST_ALTERNATIVES:
        raise _bad(pattern, 0, len(pattern.text), f"the braces stand for more than {MOST_ALTERNATIVES} patterns")
    return Glob(pattern, tuple(Alternative(_segments(pattern, tokens), choices) for tokens, choices in _expand(parts)))


def marked(name: str, counts: Mapping[str, int]) -> str:
    """The name as `Alternative.matches` takes it: each segment closed by a dot, each index with its place from the end."""
    parts = name.split(".") if name else []
    prefixes = itertools.accumulate(parts[:-1], lambda a, b: f"{a}.{b}" if a else b, initial="")
    return "".join(part + _from_end(part, counts.get(prefix)) + "." for part, prefix in zip(parts, prefixes))


def inside(pattern: Pattern, start: int, end: int) -> Span | None:
    """The place of a part of the pattern's text; its span covers the quotes too."""
    span = pattern.span
    if span is None or span.end - span.start != len(pattern.text) + 2:
        return span
    return Span(span.source, span.start + 1 + start, span.start + 1 + max(end, start + 1))


def _bad(pattern: Pattern, start: int, end: int, message: str, *helps: str) -> SurgeryError:
    return fail("bad-pattern", f'in pattern "{pattern.text}": {message}', inside(pattern, start, end), helps=helps)


def _from_end(part: str, count: int | None) -> str:
    return f"\0-{max(count - int(part), 0)}" if count is not None and part.isascii() and part.isdecimal() else ""


# ------------------------------------------------------------------------------------------------ reading


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
        start, piece = self.at, _PIECE.match(self.text, self.at)[0]
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
        start, found = self.at, _RANGE.match(self.text, self.at)
        meant = None if found else _DOTS.match(self.text, self.at)
        if meant:
            raise _bad(self.pattern, *meant.span(), f"`{meant[0]}` is no range of layers", "`{0..11}` is from 0 to 11")
        parts = (self.range(found),) if found else self.sequence(nested=True)
        return Choice(self.text[start:self.at], start, self.at), parts

    def range(self, found: re.Match) -> Token:
        low, high = (int(found[i] or found[3]) for i in (1, 2))
        self.at = found.end()
        why = _range_fault(low, high)
        if why:
            raise _bad(self.pattern, *found.span(), f"`{found[0]}` {why}", "`{4..-1}` is from 4 to the last")
        return Token("range", found.start(), f"{{{found[0]}}}", low, high)


def _range_fault(low: int, high: int) -> str:
    if low < 0 <= high:
        return "starts from the end and stops from the start"
    if (low < 0) == (high < 0) and low > high:
        return "runs backwards"
    widest = high - low if low < 0 or high >= 0 else max(low, -high)
    return f"spans more than {LONGEST_RANGE} numbers" if widest >= LONGEST_RANGE else ""


def _width(parts: tuple[Token | _Brace, ...]) -> int:
    return math.prod(sum(_width(inner) for _, inner in p.items) for p in parts if isinstance(p, _Brace))


def _expand(parts: tuple[Token | _Brace, ...]) -> Iterator[tuple[tuple[Token, ...], tuple[Choice, ...]]]:
    for combination in itertools.product(*map(_ways, parts)):
        yield tuple(t for tokens, _ in combination for t in tokens), tuple(c for _, chosen in combination for c in chosen)


def _ways(part: Token | _Brace) -> list[tuple[tuple[Token, ...], tuple[Choice, ...]]]:
    if isinstance(part, Token):
        return [((part,), ())]
    return [(tokens, (choice, *chosen)) for choice, inner in part.items for tokens, chosen in _expand(inner)]


def _segments(pattern: Pattern, tokens: tuple[Token, ...]) -> tuple[tuple[Token, ...], ...]:
    """The tokens between the dots. Raises: SurgeryError for an empty segment or one that mixes what must stand alone."""
    segments: list[list[Token]] = [[]]
    dot = 0
    for token in (*tokens, Token(".", max(len(pattern.text) - 1, 0), ".")):
        if token.kind != ".":
            segments[-1].append(token)
        elif segments[-1]:
            segments.append([])
            dot = token.at
        else:
            raise _bad(pattern, min(dot, token.at), token.at + 1, "an empty segment",
                       "`**.name` is `name` at any depth" if tokens else _GLOB_HELP)
    return tuple(_alone(pattern, tuple(segment)) for segment in segments[:-1])


def _alone(pattern: Pattern, segment: tuple[Token, ...]) -> tuple[Token, ...]:
    for token in segment:
        if len(segment) > 1 and (token.kind == "**" or token.from_end):
            raise _bad(pattern, token.at, token.end, f"`{token.text}` must be a segment of its own",
                       "`*` is any text within a segment" if token.kind == "**" else "an index from the end has no prefix")
    return segment


# ------------------------------------------------------------------------------------------------ matching


def _segment_regex(segment: tuple[Token, ...]) -> str:
    if segment[0].kind == "**":
        return r"(?:[^.]+\.)*"
    if segment[0].from_end:
        return _from_end_regex(segment[0].low, segment[0].high) + r"\."
    return "".join(map(_token_regex, segment)) + r"(?:\0-\d+)?\."


def _token_regex(token: Token) -> str:
    if token.kind == "range":
        return _one_of(token.low, token.high)
    return {"*": r"[^.\0]*", "?": r"[^.\0]"}.get(token.kind) or re.escape(token.text)


def _from_end_regex(low: int, high: int) -> str:
    if low < 0:
        return rf"\d+\0-{_one_of(-high, -low)}"
    return rf"(?!{_one_of(0, low - 1)}\0)\d+\0-(?!{_one_of(0, -high - 1)}\.)\d+"


def _one_of(low: int, high: int) -> str:
    return f"(?:{'|'.join(map(str, range(low, high + 1)))})" if high >= low else "(?!)"
