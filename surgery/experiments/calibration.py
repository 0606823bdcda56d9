"""A device's own numbers: what it takes for a FLOP of each dtype, for moving a number, and for a launch.

Takes a device; gives a `Machine` for each dtype that it has. Promises: about a second; each number is the least of
several times, since what disturbs a measurement only adds to it; no state of torch's changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from surgery.codegen.cost_model import Machine
from surgery.experiments.timing import seconds
from surgery.planning.machines import DTYPES, FORMAT, machine, measured, place
from surgery.runtime.atomic_folders import replacing_file

_TIME = 0.08  # seconds that one measurement may take
_SIDES = (512, 2048, 4096)  # of the matrices that are multiplied: the largest for which there is time counts
_MOVED = 32 * 2**20  # bytes that are read and written, more than a cache holds
_LAUNCHES = 100


@torch.no_grad()
def calibrate(device: torch.device) -> dict[str, Machine]:
    """The numbers of a device by dtype; one that it does not compute in is left out."""
    found = {}
    for name in DTYPES:
        try:
            found[name] = _measured(device, getattr(torch, name))
        except (RuntimeError, TypeError):  # torch's ways to say that a device has no such product
            continue
    return found


def _measured(device: torch.device, dtype: torch.dtype) -> Machine:
    flop = 0.0
    for side in _SIDES:
        a = torch.ones(side, side, dtype=dtype, device=device)
        took = _least(partial(torch.mm, a, a, out=torch.empty_like(a)), device)
        flop = took / (2 * side**3)
        if 64 * took > _TIME:  # the next side may be four times as long
            break
    large = torch.zeros(_MOVED // dtype.itemsize, dtype=dtype, device=device)
    number = _least(large.neg_, device) / (2 * large.numel())
    small = torch.zeros(8, dtype=dtype, device=device)
    return Machine(flop, number, _least(partial(_launched, small), device) / _LAUNCHES)


def _launched(small: Tensor) -> None:
    for _ in range(_LAUNCHES):
        small.neg_()


def _least(call: Callable[[], object], device: torch.device) -> float:
    """The least of the times that a call takes; the first one is not counted, which may make things ready."""
    seconds(call, device)
    times = [seconds(call, device)]
    while sum(times) < _TIME and len(times) < 30:
        times.append(seconds(call, device))
    return min(times)


def keep(device: str, machines: Mapping[str, Machine]) -> Path:
    """Write what was measured of a device, beside what is known of others; the file is replaced as a whole.
    Raises: SurgeryError (bad-output)."""
    path, devices = place(), {**measured(), device: dict(machines)}
    text = json.dumps({"format_version": FORMAT, "devices": {
        name: {dtype: each.measured for dtype, each in dtypes.items()} for name, dtypes in devices.items()}}, indent=2)
    with replacing_file(path) as new:
        new.write_text(text + "\n", encoding="utf-8")
    for known in (measured, machine):
        known.cache_clear()
    return path
