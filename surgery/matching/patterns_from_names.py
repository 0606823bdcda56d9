"""Names as patterns: the few patterns that match given names and no other.

Takes dotted names; gives the texts of patterns. Promises: together the patterns match the names and nothing else,
whatever other names there are; numbers become ranges, and names that differ in one segment become `{a,b}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

Box = tuple[tuple[str, ...], ...]  # what may stand in each segment
_PLAIN = re.compile(r"[\w-]+")


def patterns(names: Iterable[str]) -> tuple[str, ...]:
    """The patterns of some names, in the order in which the names first need them."""
    shapes: dict[tuple, list[tuple[str, ...]]] = {}
    for name in dict.fromkeys(names):
        parts = tuple(name.split("."))
        shapes.setdefault(tuple("0" if p.isdecimal() else p for p in parts), []).append(parts)
    boxes = [box for alike in shapes.values() for box in _boxes(alike)]
    for position in reversed(range(max((len(b) for b in boxes), default=0))):
        boxes = _joined(boxes, position)
    return tuple(".".join(map(_segment, box)) for box in boxes)


def _boxes(rows: Sequence[tuple[str, ...]]) -> Iterator[Box]:
    """Rows of equal length as products of sets: a first segment goes with others that are followed by the same."""
    if not rows[0]:
        yield ()
        return
    following: dict[str, dict[tuple[str, ...], None]] = {}
    for first, *rest in rows:
        following.setdefault(first, {})[tuple(rest)] = None
    alike: dict[tuple, list[str]] = {}
    for first, rests in following.items():
        alike.setdefault(tuple(sorted(rests)), []).append(first)
    for firsts in alike.values():
        yield from ((tuple(firsts), *box) for box in _boxes(list(following[firsts[0]])))


def _joined(boxes: Iterable[Box], position: int) -> list[Box]:
    """Boxes that differ at one position alone, and have words there, become one."""
    found: dict[tuple, list[Box]] = {}
    for box in boxes:
        words = position < len(box) and all(_PLAIN.fullmatch(p) and not p.isdecimal() for p in box[position])
        found.setdefault((box[:position], box[position + 1:], len(box)) if words else (box,), []).append(box)
    return [_union(same, position) for same in found.values()]


def _union(boxes: Sequence[Box], position: int) -> Box:
    if len(boxes) == 1:
        return boxes[0]
    words = tuple(dict.fromkeys(word for box in boxes for word in box[position]))
    return (*boxes[0][:position], words, *boxes[0][position + 1:])


def _segment(choices: tuple[str, ...]) -> str:
    if len(choices) == 1:
        return choices[0]
    return number_range([int(c) for c in choices]) if choices[0].isdecimal() else f"{{{','.join(choices)}}}"


def number_range(numbers: Iterable[int]) -> str:
    """`{0..3,7}`; a single number is itself."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    return f"{{{','.join(f'{r[0]}..{r[-1]}' if len(r) > 1 else str(r[0]) for r in runs)}}}"
