"""The machine that programs are chosen for: a device's own numbers where `surgery bench --calibrate` measured them, and
supposed ones elsewhere.

Takes a kind of device as torch calls it and a dtype; gives a `Machine`. Promises: the same in one process whenever it
is asked; a choice rests on it and nothing else does, so that saved adapters are the same on every machine; a file that
cannot be read is told once and changes no choice; no torch.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from surgery.codegen.cost_model import CPU, Machine
from surgery.diagnostics import Diagnostic, tell
from surgery.files import read_json

FORMAT = "1.0"
DTYPES = ("float32", "bfloat16", "float16", "float64")
_BYTES = {"float32": 4, "float64": 8}
# What one H200 was measured to do (an H100 is near): by dtype the multiplications and additions in a second; bytes in a
# second; seconds from Python to a kernel.
_RATES = {"float32": 50e12, "float64": 50e12, "bfloat16": 700e12, "float16": 700e12}
_BYTES_A_SECOND, _LAUNCH = 4.3e12, 5e-6

Measured = Mapping[str, Mapping[str, Machine]]


def supposed(device: str, dtype: str) -> Machine:
    """The numbers of a device that nobody measured. What is neither a CPU nor a mere shape (`meta`) is like CUDA."""
    if device in ("cpu", "meta"):
        return CPU
    return Machine(1 / _RATES.get(dtype, 50e12), _BYTES.get(dtype, 2) / _BYTES_A_SECOND, _LAUNCH)


@cache
def machine(device: str, dtype: str = "float32") -> Machine:
    """The numbers of a device ("cpu", "cuda") for tensors of a dtype."""
    known = measured().get("cpu" if device == "meta" else device, {}).get(dtype) or supposed(device, dtype)
    return known if _BYTES.get(dtype, 2) >= _BYTES["float32"] else replace(known, setup_flop=machine(device).flop)


# ------------------------------------------------------------------------------------------------------ what is kept


def place() -> Path:
    """The file of this machine in the folder SURGERY_CACHE, or in the user's cache: a home may be shared by several."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("SURGERY_CACHE") or Path(caches) / "surgery")
    return root / f"calibration-{re.sub('[^A-Za-z0-9.-]', '_', platform.node()) or 'machine'}.json"


@cache
def measured() -> Measured:
    """What was measured here, by device and dtype; nothing, with a warning, where the file is not one of ours."""
    try:
        path = place()
    except RuntimeError:  # a user without a home
        return {}
    try:
        return _read(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        tell([Diagnostic(
            "bad-value", f"the calibration in {path} is not used: {error}", severity="warning",
            helps=("`surgery bench --calibrate` measures again; without it programs are chosen as for any machine",))])
        return {}


def _read(held: Any) -> Measured:
    """The machines in a file. Raises: ValueError."""
    if not isinstance(held, dict) or held.get("format_version") != FORMAT or not isinstance(held.get("devices"), dict):
        raise ValueError(f"it is not of format {FORMAT}")
    return {device: {dtype: _machine(numbers) for dtype, numbers in dtypes.items()}
            for device, dtypes in held["devices"].items() if isinstance(dtypes, dict)}


def _machine(numbers: Any) -> Machine:
    """A machine whose numbers could be one's. Raises: ValueError."""
    if not isinstance(numbers, dict) or numbers.keys() != CPU.measured.keys():
        raise ValueError(f"a device has the numbers {', '.join(CPU.measured)}")
    for name, value in numbers.items():
        if type(value) is not float or not math.isfinite(value) or not 0 < value < 1:
            raise ValueError(f"`{name}` is {value!r}, and no time in seconds")
    return Machine(**numbers)
