"""Fingerprints of weights, by which a saved adapter tells the weights that it was trained on from others.

Takes the weights of operated layers; gives a few numbers of each, for `meta.json`, and later says which differ.
Promises: a weight costs sixteen reads, whatever its size; one that is held in another dtype now is the same where
rounding makes it so.

Sixteen numbers and no digest of all: a digest would read 140 GB at each checkpoint of a model of 70 billion, and would
know no weight again that is loaded in another dtype. Another base model differs nearly everywhere; of one where a
hundredth of the numbers of every weight were changed, 28 operated weights show it with a probability of 0.99.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from surgery.diagnostics import Diagnostic
from surgery.matching.name_ranges import alike, ranged
from surgery.planning.compile import Placed
from surgery.text import counted, dtype_text, listed

_NUMBERS = 16
_STEP = 37  # from one number to the next, beside equal parts of the weight: else all would stand in one column


def fingerprint_of(weight: Tensor) -> str:
    """A few numbers of a stored weight, with its dtype: `bfloat16 zczMPQ...`."""
    # By index, since a weight may lie transposed, and a flattened one would then be a copy of all of it.
    at = tuple(torch.tensor(axis, dtype=torch.int64, device="cpu") for axis in _places(tuple(weight.shape)))
    found = weight.detach()[at].cpu().to(torch.float32).flatten().tolist()  # of a number [] too
    held = struct.pack(f"<{len(found)}f", *found)
    return f"{dtype_text(weight.dtype)} {base64.b64encode(held).decode()}"


@lru_cache(maxsize=64)  # models have few shapes
def _places(shape: tuple[int, ...]) -> list[list[int]]:
    """Where those numbers are, axis by axis."""
    count, axes = prod(shape), []
    at = [(i * count // _NUMBERS + i * _STEP) % count for i in range(_NUMBERS)] if count else []
    for size in reversed(shape):
        axes.append([place % size for place in at])
        at = [place // size for place in at]
    return axes[::-1]


def fingerprints(placed: Iterable[Placed]) -> dict[str, str]:
    """Those of the operated weights by name; a called layer has no numbers to read."""
    return {p.site.weight_name: fingerprint_of(p.site.weight) for p in placed
            if not p.site.layout.is_called and not p.site.is_meta}


def is_same(saved: str, now: str) -> bool:
    """Whether two fingerprints can be of one weight."""
    (one, first), (two, second) = (_read(each) for each in (saved, now))
    if one == two or {one, two} != {torch.float16, torch.bfloat16}:
        narrower = min(one, two, key=lambda dtype: dtype.itemsize)
        return _is_close(first.to(narrower), second.to(narrower))
    # Neither holds the other's numbers: both were rounded from some third.
    relative, least = 2 * torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float16).tiny
    return _is_close(first, second, relative, least)


def _is_close(one: Tensor, other: Tensor, relative: float = 0, least: float = 0) -> bool:
    """Whether the numbers are equal but for so much; what is not a number is as before if it is none still."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=least, equal_nan=True)


def _read(fingerprint: str) -> tuple[torch.dtype, Tensor]:
    dtype, _, numbers = fingerprint.partition(" ")
    held = base64.b64decode(numbers)
    numbers = struct.unpack(f"<{len(held) // 4}f", held)
    return getattr(torch, dtype), torch.tensor(numbers, dtype=torch.float32, device="cpu")


def differing(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The weights that are known from then and from now, and are not the same."""
    return [name for name, found in now.items() if name in saved and not is_same(saved[name], found)]


def another_base(names: list[str], count: int, folder: object, base: str | None) -> list[Diagnostic]:
    """What to say of weights that differ, of so many that were compared."""
    if not names:
        return []
    ranges = [ranged(group) for group in alike(names)]
    return [Diagnostic("another-base", f"{len(names)} of {counted(count, 'operated weight')} are not those that the "
                       f"adapter in {folder} was trained on: {listed(ranges)}", severity="warning",
                       notes=(f"it was saved for {base}",) if base else (),
                       helps=("load the model, and the revision of it, that the adapter was trained on",))]
