"""Patterns: globs over dotted names, the same for `target`, `except`, `train`, `select` and `--target`.

Takes the text of a pattern, gives a `Glob`. A glob matches a whole dotted name: `*` and `?` within one segment, `**`
any number of segments (none too), `{a,b}` one of several, `{0..11}` an integer of the inclusive range, `{-4..-1}` one
counted from the end of the list that holds it. Promises: a pattern that is not well formed is a `bad-pattern` whose
place lies inside the string; no regular expression in the language (one is only how a glob runs).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from surgery.diagnostics import Span
from surgery.language.tree import Pattern
from surgery.matching.pattern_parser import Choice, Segments, Token, inside, ways


@dataclass(frozen=True)
class Alternative:
    """A pattern with one choice made in each of its braces; `text` is a pattern of its own."""

    segments: Segments
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

    @cached_property
    def _is_plain(self) -> bool:
        """Whether a regular expression takes at most quadratic time: each further `*` would make it one power more."""
        stars = [sum(t.kind == "*" for t in segment) for segment in self.segments]
        return sum(segment[0].kind == "**" for segment in self.segments) <= 1 and max(stars) <= 1

    @cached_property
    def _by_segment(self) -> tuple[Callable[[str], object], ...]:
        return tuple(map(_segment_matcher, self.segments))

    def matches(self, marked_name: str) -> bool:
        if self._is_plain:
            return self.regex.fullmatch(marked_name) is not None
        # Segment by segment, all places in the pattern at once: what a regular expression would try one way after the
        # other, and take a time that grows with a power of the name's length.
        reached, end = self._onward({0}), len(self.segments)
        for part in marked_name.split(".")[:-1]:
            stays = {at for at in reached if at < end and self.segments[at][0].kind == "**"}
            steps = {at + 1 for at in reached - stays if at < end and self._by_segment[at](f"{part}.")}
            reached = self._onward(stays | steps)
        return end in reached

    def _onward(self, reached: set[int]) -> set[int]:
        """The segments that may come next, each `**` standing for none too."""
        onward: set[int] = set()
        for at in reached:
            onward.add(at)
            while at < len(self.segments) and self.segments[at][0].kind == "**" and at + 1 not in onward:
                at += 1
                onward.add(at)
        return onward


@dataclass(frozen=True)
class Glob:
    """A compiled pattern."""

    pattern: Pattern
    alternatives: tuple[Alternative, ...] = field(repr=False)  # one for each choice in its braces, in order

    @property
    def text(self) -> str:
        return self.pattern.text

    def matches(self, name: str, counts: Mapping[str, int]) -> bool:
        """Whether the pattern takes the whole name; `counts` gives how many children each container has."""
        return self.live(marked(name, counts)) != ()

    def live(self, marked_name: str) -> tuple[Alternative, ...]:
        """The alternatives that take a `marked` name."""
        return tuple(a for a in self.alternatives if a.matches(marked_name))

    def unmatched(self, live: Collection[Alternative]) -> tuple[Choice, ...]:
        """The choices that no live alternative makes, of each brace the outermost only."""
        used = {c for a in live for c in a.choices}
        unused = dict.fromkeys(c for a in self.alternatives for c in a.choices if c not in used)
        return tuple(c for c in unused if not any(other.holds(c) for other in unused))

    def making(self, choice: Choice) -> Glob:
        """The part of it that makes a choice."""
        return Glob(self.pattern, tuple(a for a in self.alternatives if choice in a.choices))

    def place(self, choice: Choice) -> Span | None:
        return inside(self.pattern, choice.start, choice.end)


def compile_pattern(pattern: Pattern | str) -> Glob:
    """The glob of a pattern. Raises: SurgeryError (`bad-pattern`) with the place inside the string."""
    pattern = Pattern(pattern) if isinstance(pattern, str) else pattern
    return Glob(pattern, tuple(Alternative(segments, choices) for segments, choices in ways(pattern)))


def marked(name: str, counts: Mapping[str, int]) -> str:
    """The name as `Alternative.matches` takes it: each segment closed by a dot, each index of a list followed by its
    place from the end. `layers.2.q` in a list of 12 is `layers.2\\0-10.q.`, so that `{-10..-1}` needs no look-up."""
    parts = name.split(".") if name else []
    prefixes = itertools.accumulate(parts[:-1], lambda a, b: f"{a}.{b}" if a else b, initial="")
    segments = []
    for part, prefix in zip(parts, prefixes):
        if prefix in counts and part.isascii() and part.isdecimal():
            segments.append(f"{part}\0-{max(counts[prefix] - int(part), 0)}.")
        else:  # where what holds it is no list, `2` is a name like any other
            segments.append(f"{part}.")
    return "".join(segments)


# ---------------------------------------------------------------------------------------------- as expressions


def _segment_regex(segment: tuple[Token, ...]) -> str:
    first = segment[0]
    if first.kind == "**":
        return r"(?:[^.]+\.)*"
    if first.from_end and first.low < 0:
        return rf"\d+\0-{_one_of(-first.high, -first.low)}\."
    if first.from_end:
        # From 4 to the last but one: how long the list is, is not known here, so it is said by what it leaves out.
        before, behind = _one_of(0, first.low - 1), _one_of(0, -first.high - 1)
        return rf"(?!{before}\0)\d+\0-(?!{behind}\.)\d+\."
    return "".join(map(_token_regex, segment)) + r"(?:\0-\d+)?\."


def _segment_matcher(segment: tuple[Token, ...]) -> Callable[[str], object]:
    """Whether a segment takes a part of a marked name with its dot. Several `*` are not left to a regular expression,
    which would try every way of sharing the text among them."""
    if sum(token.kind == "*" for token in segment) <= 1:
        return re.compile(_segment_regex(segment)).fullmatch
    pieces = [(token.kind == "*", re.compile(_token_regex(token))) for token in segment]
    widest = max(len(token.text) for token in segment)  # a number of a range is no wider than the range's text

    def matches(part: str) -> bool:
        text, reached = re.sub(r"(?:\0-\d+)?\.$", "", part), {0}
        for is_star, piece in pieces:
            if not reached:
                return False
            reached = set(range(min(reached), len(text) + 1)) if is_star else {
                end for start in reached for end in range(start, min(start + widest, len(text)) + 1)
                if piece.fullmatch(text, start, end)}
        return len(text) in reached

    return matches


def _token_regex(token: Token) -> str:
    if token.kind == "range":
        return _one_of(token.low, token.high)
    return {"*": r"[^.\0]*", "?": r"[^.\0]"}.get(token.kind) or re.escape(token.text)


def _one_of(low: int, high: int) -> str:
    # an empty range matches nothing, where empty parentheses would match the empty text
    return f"(?:{'|'.join(map(str, range(low, high + 1)))})" if high >= low else "(?!)"
