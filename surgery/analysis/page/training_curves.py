"""The curves of a training run, from the state that the Trainer of transformers writes.

Takes a folder; finds `trainer_state.json` in it or beside it, or in a checkpoint's folder there; gives curves by the
title of their chart. Promises: a run without a state is no error, a state that cannot be read is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.analysis.spectra.curves import Curve
from surgery.diagnostics import fail
from surgery.files import read_json

STATE = "trainer_state.json"
_TITLES = {"loss": "loss", "eval_loss": "loss", "learning_rate": "learning rate", "grad_norm": "norm of the gradient"}
_NOT_CURVES = ("step", "epoch", "total_flos")
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def found_state(folder: Path) -> Path | None:
    """The state that lies nearest; of several as near, that of the longest run. Raises: SurgeryError (bad-data)."""
    for root in (folder, folder.absolute().parent):
        files = [*root.glob(STATE), *sorted(root.glob(f"checkpoint-*/{STATE}"))]
        if files:
            return max(files, key=lambda file: max((entry["step"] for entry in _state(file)["log_history"]), default=0))
    return None


def charts(state: Path) -> dict[str, list[Curve]]:
    """The curves over the steps of training. Raises: SurgeryError (bad-data)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in _state(state)["log_history"]:
        for name, value in _numbers(entry):
            title = _TITLES.get(name, name.removeprefix("eval_").replace("_", " "))
            found.setdefault(title, {}).setdefault(_label(name), []).append((float(entry["step"]), value))
    known = [title for title in found if any(len(points) > 1 for points in found[title].values())]
    return {title: [Curve(label, *map(tuple, zip(*points))) for label, points in found[title].items()]
            for title in sorted(known, key=_rank)}


def _rank(title: str) -> int:
    """The loss comes first, then what a task scores, then how the training was run."""
    return 0 if title == "loss" else 2 if title in _TITLES.values() else 1


def _label(name: str) -> str:
    return "evaluation" if name.startswith("eval_") else "training"


def _numbers(entry: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """What an entry logs that a curve can show: no times, no totals of the whole run, nothing infinite."""
    for name, value in entry.items():
        is_curve = name not in _NOT_CURVES and not name.startswith("train_") and not name.endswith(_TIMES)
        if is_curve and _is_number(value):
            yield name, float(value)


def _is_number(value: Any) -> bool:
    """Whether a curve can show it: it is finite, and a float can hold it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _state(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file, allow_nan=True)  # where a loss was none, the Trainer writes NaN
        if all(_is_number(entry["step"]) for entry in found["log_history"]):
            return found
        reason = "a step of its log is no finite number"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError):
        reason = "it is not the state of a Trainer"
    raise fail("bad-data", f"cannot read {file}: {reason}")
