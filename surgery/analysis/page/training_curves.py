"""The curves of a training run, from the state that the Trainer of transformers writes.

Takes a folder; finds `trainer_state.json` in it or beside it, or in a checkpoint's folder there; gives curves by the
title of their chart. Promises: a run without a state is no error, a state that cannot be read is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.analysis.spectra.curves import Curve
from surgery.diagnostics import fail
from surgery.files import is_number, read_json

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
    by_title: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in _state(state)["log_history"]:
        for name, value in entry.items():
            # no times, no totals of the whole run, nothing infinite
            is_curve = name not in _NOT_CURVES and not name.startswith("train_") and not name.endswith(_TIMES)
            if not (is_curve and is_number(value)):
                continue
            # Training and evaluation are two curves of one chart, where a gap between them shows.
            title = _TITLES.get(name, name.removeprefix("eval_").replace("_", " "))
            label = "evaluation" if name.startswith("eval_") else "training"
            by_title.setdefault(title, {}).setdefault(label, []).append((float(entry["step"]), float(value)))

    def order(title: str) -> int:
        # The loss comes first, then what a task scores, then how the training was run.
        return 0 if title == "loss" else 2 if title in _TITLES.values() else 1

    # One point alone is no curve: a figure that is logged once says nothing about a course.
    shown = [title for title, curves in by_title.items() if any(len(points) > 1 for points in curves.values())]
    return {title: [Curve(label, *map(tuple, zip(*points))) for label, points in by_title[title].items()]
            for title in sorted(shown, key=order)}


def _state(file: Path) -> dict[str, Any]:
    try:
        state = read_json(file, allow_nan=True)  # where a loss was none, the Trainer writes NaN
        if all(is_number(entry["step"]) for entry in state["log_history"]):
            return state
        reason = "a step of its log is no finite number"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError):
        reason = "it is not the state of a Trainer"
    raise fail("bad-data", f"cannot read {file}: {reason}")
