"""Offsets of a text as an editor counts: lines from 0, and in a line the units of its encoding.

Takes a text; gives positions of the protocol. Promises: lines end where the protocol says, at LF, CR LF and CR alone,
and a place beyond a line's end is that end.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from lsprotocol import types

_UNIT = {types.PositionEncodingKind.Utf8: ("utf-8", 1), types.PositionEncodingKind.Utf16: ("utf-16-le", 2),
         types.PositionEncodingKind.Utf32: ("utf-32-le", 4)}
_LINE_END = re.compile(r"\r\n|\n|\r")


class Positions:
    """The lines of a text, in an encoding that client and server agreed on."""

    def __init__(self, text: str, encoding: str | None = None):
        self.text = text
        self._codec, self._bytes = _UNIT[types.PositionEncodingKind(encoding or types.PositionEncodingKind.Utf16)]
        ends = list(_LINE_END.finditer(text))
        self._starts = [0, *(end.end() for end in ends)]
        self._ends = [*(end.start() for end in ends), len(text)]

    def position(self, offset: int) -> types.Position:
        line = bisect_right(self._starts, offset) - 1
        before = self.text[self._starts[line] : offset]
        return types.Position(line, len(before.encode(self._codec, "surrogatepass")) // self._bytes)

    def offset(self, position: types.Position) -> int:
        if position.line >= len(self._starts):
            return len(self.text)
        start, end = self._starts[position.line], self._ends[position.line]
        units = self.text[start:end].encode(self._codec, "surrogatepass")[: position.character * self._bytes]
        return start + len(units.decode(self._codec, "ignore"))

    def range(self, start: int, end: int) -> types.Range:
        return types.Range(self.position(start), self.position(end))

    @property
    def everything(self) -> types.Range:
        return self.range(0, len(self.text))
