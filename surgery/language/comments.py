"""Which statement each comment belongs to.

Takes the text, its comments and the places of its statements. Gives the `Trivia` of each statement by the offset where
it starts (that of the file at `FILE`). Promises: every comment lands in exactly one place.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from lark import Token, Tree

from surgery.language.grammar import extent, pattern_of
from surgery.language.json_fields import Trivia

FILE = -1
STATEMENTS = {"language", "use", "header", "check", "select", "train", "parameter", "transform",
              "update", "param", "noise", "let", "result", "target", "step", "repeat", "rounds"}
STRING_OR_COMMENT = re.compile(f"{pattern_of('STRING')}|({pattern_of('COMMENT')})")


@dataclass
class Place:
    """A statement's range, where its `{` stands, the statements in it, and the comments that it got (as ranges)."""

    start: int
    end: int
    brace: int | None
    parts: list[Place] = field(default_factory=list)
    above: list[tuple[int, int]] = field(default_factory=list)
    beside: list[tuple[int, int]] = field(default_factory=list)
    inside: list[tuple[int, int]] = field(default_factory=list)

    def in_block(self, offset: int) -> bool:
        return self.brace is not None and self.brace < offset

    def around(self, offset: int) -> tuple[Place | None, Place | None]:
        """The last part that ends before an offset, and the first that starts after it, on its side of the brace."""
        index = bisect_right(self.parts, offset, key=lambda part: part.start)
        before, after = (part[0] if part and self.in_block(part[0].start) == self.in_block(offset) else None
                         for part in (self.parts[max(index - 1, 0):index], self.parts[index:index + 1]))
        return before, after

    def part_at(self, offset: int) -> Place | None:
        """The part that an offset lies in."""
        index = bisect_right(self.parts, offset, key=lambda part: part.start)
        part = self.parts[index - 1] if index else None
        return part if part and part.start < offset < part.end else None

    def everything(self) -> Iterator[Place]:
        stack = [self]  # and no recursion: nothing has said yet how deep the text may be
        while stack:
            yield (place := stack.pop())
            stack += place.parts


def trivia_of(text: str, root: Tree, tokens: list[Token]) -> dict[int, Trivia]:
    """The trivia of every statement that has any, by the offset of its start."""
    whole = _places(root, [extent(t)[0] for t in tokens if t.type == "LBRACE"])
    # Strings are matched as well, so that a `#` in one of them is passed over.
    for match in STRING_OR_COMMENT.finditer(text):
        if match[1]:
            _give(text, whole, match.span())
    trivia = {FILE: Trivia(inside=_lines(text, whole.inside, _last_end(whole), None))}
    for parent in whole.everything():
        for before, part in zip([None, *parent.parts], parent.parts):
            # what stands before the `{` ends no blank line for what stands behind it
            same_side = before is not None and parent.in_block(before.start) == parent.in_block(part.start)
            above = _lines(text, part.above, before.end if before and same_side else None, part.start)
            is_blank = above[:1] == ("",)
            trivia[part.start] = Trivia(above[is_blank:], "".join(text[a:b].rstrip() for a, b in part.beside),
                                        _lines(text, part.inside, _last_end(part), None), is_blank)
    return trivia


def _places(root: Tree, braces: list[int]) -> Place:
    """The statements as a tree of places under the whole file."""
    whole = Place(FILE, 1 << 62, FILE)
    path = [whole]
    statements = [part.meta for part in root.iter_subtrees() if part.data in STATEMENTS]
    # in the order of the text a statement that begins before the last one ended lies in it
    for meta in sorted(statements, key=lambda m: m.start_pos):
        while path[-1].end <= meta.start_pos:
            path.pop()
        following = bisect_right(braces, meta.start_pos)
        brace = next((b for b in braces[following:following + 1] if b < meta.end_pos), None)
        path[-1].parts.append(Place(meta.start_pos, meta.end_pos, brace))
        path.append(path[-1].parts[-1])
    return whole


def _give(text: str, whole: Place, comment: tuple[int, int]) -> None:
    """Put a comment beside what ends on its line, else above what follows,
    else at the end of the block or list around it."""
    start, _ = comment
    parent = whole
    while inner := parent.part_at(start):
        parent = inner
    before, after = parent.around(start)
    opens_line = parent is not whole and parent.in_block(start) and "\n" not in text[parent.brace : start]
    # A comment is about what it stands beside, else about what follows it; one at the end of a block has nothing that
    # follows, and is kept at that end.
    if before and "\n" not in text[before.end : start]:
        (before.inside if before.beside else before.beside).append(comment)
    elif not before and opens_line:
        parent.beside.append(comment)
    elif after:
        after.above.append(comment)
    elif parent.in_block(start):
        parent.inside.append(comment)
    elif before:
        before.inside.append(comment)
    else:
        parent.above.append(comment)


def _last_end(place: Place) -> int | None:
    ends = [part.end for part in place.parts if place.in_block(part.start)]
    return ends[-1] if ends else None


def _lines(text: str, comments: list[tuple[int, int]], start: int | None, end: int | None) -> tuple[str, ...]:
    """The comments as lines, with "" where a blank line stands between two of them, before or after."""
    lines: list[str] = []
    for a, b in comments:
        lines += [""] * _blank(text, start, a) + [text[a:b].rstrip()]
        start = b
    return (*lines, *[""] * _blank(text, start, end))


def _blank(text: str, start: int | None, end: int | None) -> bool:
    return start is not None and end is not None and text[start:end].count("\n") > 1
