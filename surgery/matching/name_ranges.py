"""Names that differ in their numbers alone: the same module in every layer of a list, or in every one of its experts.

Takes dotted names; gives what they have in common. Promises: a number is a whole segment, `0` and not `conv1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from surgery.matching.patterns_from_names import number_range

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def starred(name: str) -> str:
    """The name without its numbers: `layers.*.q_proj`."""
    return _NUMBER.sub("*", name)


def alike(names: Iterable[str]) -> list[list[str]]:
    """The names, those that differ in their numbers alone together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(starred(name), []).append(name)
    return list(groups.values())


def ranged(names: Sequence[str]) -> str:
    """Names that differ in their numbers alone as one: `layers.{0..3}.q_proj`."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names))
    texts = iter([number_range(column) for column in columns])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def module_type(name: str) -> str:
    """What follows the first number in a name, further numbers out: `layer.2.attention.q` -> `attention.q`."""
    rest = _NUMBER.split(name, maxsplit=1)[-1].strip(".")
    return ".".join(part for part in rest.split(".") if not part.isdecimal()) or name
