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
    # Only names with numbers at the same places can share a pattern with a range there.
    shapes: dict[tuple, list[tuple[str, ...]]] = {}
    for name in dict.fromkeys(names):
        parts = tuple(name.split("."))
        shapes.setdefault(tuple("0" if p.isdecimal() else p for p in parts), []).append(parts)
    boxes = [box for alike in shapes.values() for box in _boxes(alike)]
    # Boxes that differ at one position alone, and have words there, become one. The last position goes first: names
    # mostly differ in their last segment (`q_proj`, `v_proj`), and only boxes that are equal elsewhere can be joined.
    for position in reversed(range(max((len(b) for b in boxes), default=0))):
        joined: dict[tuple, list[Box]] = {}
        for box in boxes:
            words = position < len(box) and all(_PLAIN.fullmatch(p) and not p.isdecimal() for p in box[position])
            joined.setdefault((box[:position], box[position + 1:], len(box)) if words else (box,), []).append(box)
        boxes = [same[0] if len(same) == 1 else
                 (*same[0][:position], tuple(dict.fromkeys(w for b in same for w in b[position])),
                  *same[0][position + 1:]) for same in joined.values()]
    texts = []
    for box in boxes:
        segments = [choices[0] if len(choices) == 1 else number_range(map(int, choices)) if choices[0].isdecimal()
                    else f"{{{','.join(choices)}}}" for choices in box]
        texts.append(".".join(segments))
    return tuple(texts)


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


def number_range(numbers: Iterable[int]) -> str:
    """`{0..3,7}`; a single number is itself."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    return f"{{{','.join(f'{r[0]}..{r[-1]}' if len(r) > 1 else str(r[0]) for r in runs)}}}"
