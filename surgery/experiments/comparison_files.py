"""What a comparison keeps: the runs, and the times of steps side by side.

Takes a `Run` or `Steps`, with all that it was asked for; gives the same back from its file. Promises: each is a small
JSON file that appears whole; what was asked for otherwise is another run, and is never taken for it, but for what a
spec says in comments.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from surgery.diagnostics import fail
from surgery.files import read_json
from surgery.runtime.atomic_folders import replacing_file

FORMAT = "2.0"
RUNS, STEPS = "runs", "steps.json"  # in the folder of a comparison
MEAN = "mean"  # of the tests, where there are several
LOWER = ("mse", "loss", "perplexity")  # scores of which less is better
T = TypeVar("T")
_STRING_OR_COMMENT = re.compile(r'("[^"\n]*")|\s*#[^\n]*')


@dataclass(frozen=True)
class Layer:
    """The spectra of ΔW in one layer, as means over its weights: `figures` by name, and the `shares` p_i of the
    singular values at some `places` i."""

    layer: int
    figures: Mapping[str, float | None]
    places: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training. `asked` is all that its outcome depends on; `tests` holds the scores on each test, and `errors` the
    standard error that the first of them has for the items that were scored, where it was taken; `update` the figures
    of ΔW, as means over the weights, and `layers` those of each layer; `weights` stands for those of the base model,
    whose name may come to mean others (None in files of older versions). Where the training diverged, the scores are
    None and there are no figures."""

    asked: Mapping[str, Any]
    validation: Mapping[str, float] | None
    tests: Mapping[str, Mapping[str, float]] | None
    trained: int
    update: Mapping[str, float | None]
    step_seconds: float
    peak_bytes: int
    machine: str
    errors: Mapping[str, float | None] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    weights: str | None = None

    @property
    def method(self) -> str:
        return self.asked["method"]

    @property
    def chosen_by(self) -> float:
        """The score that learning rates are chosen by, so that larger is better."""
        if self.validation is None:
            return float("-inf")
        name, value = next(iter(self.validation.items()))
        return -value if name in LOWER else value

    @property
    def main(self) -> dict[str, float]:
        """The score to go by on each test, and their mean where there are several; none where the training diverged."""
        found = {test: next(iter(scores.values())) for test, scores in (self.tests or {}).items()}
        return {**found, MEAN: fmean(found.values())} if len(found) > 1 else found


@dataclass(frozen=True)
class Steps:
    """The seconds of steps of several methods that took turns. `asked` is all that they depend on but for the
    machine."""

    asked: Mapping[str, Any]
    times: Mapping[str, Sequence[float]]
    machine: str

    def seconds(self, method: str) -> float:
        return median(self.times[method])

    def ratio(self, method: str) -> float:
        """The time over the first method's, the median of the rounds."""
        return median(mine / first for mine, first in zip(self.times[method], next(iter(self.times.values()))))


# ------------------------------------------------------------------------------------------------------------ files


def digest(what: Any) -> str:
    """Stands for plain data in a name or a record."""
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def place_of(folder: Path, asked: Mapping[str, Any]) -> Path:
    """The file of a run: runs that were asked for otherwise lie side by side."""
    return folder / f"{_name_of(asked)}-{digest(_meant(asked))}.json"


def finished(folder: Path, asked: Mapping[str, Any], weights: Callable[[], str] | None = None) -> Run | None:
    """The run, if it is in the folder. `weights`: what stands for those that the base model has now, asked for where
    there is a run. Raises: SurgeryError (bad-data) for one of other weights."""
    wanted = digest(_meant(asked))
    # by what is in them: a comment of the spec that has changed since is in the names of earlier versions' files
    for file in sorted(folder.glob(f"{glob.escape(_name_of(asked))}-*.json")):
        run = _read(file, Run)
        if run is None or digest(_meant(run.asked)) != wanted:
            continue
        if run.weights and weights and weights() != run.weights:
            raise fail("bad-data", f"{file} is a run of other weights than {asked.get('model')} has now",
                       helps=("name another folder, or delete the runs in this one",))
        return run
    return None


def _name_of(asked: Mapping[str, Any]) -> str:
    return f"{asked['method']}-{asked['rate']:g}-{asked['seed']}"


def _meant(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without the comments of its specs, which change nothing."""
    def bare(spec: str | None) -> str | None:
        return spec and _STRING_OR_COMMENT.sub(lambda found: found[1] or "", spec).strip()

    found = dict(asked)
    if "spec" in found:
        found["spec"] = bare(found["spec"])
    if "specs" in found:
        found["specs"] = {method: bare(spec) for method, spec in found["specs"].items()}
    return found


def keep(folder: Path, run: Run) -> None:
    """Write a run's file, whole or not at all. Raises: SurgeryError (bad-output)."""
    _write(place_of(folder, run.asked), run)


def known_steps(file: Path, asked: Mapping[str, Any]) -> Steps | None:
    """The times in a file, if they are those that are asked for, in this order too:
    ratios are to the first method's."""
    steps = _read(file, Steps)
    # compared as text, since two dicts are equal in any order
    return steps if steps and json.dumps(_meant(steps.asked)) == json.dumps(_meant(asked)) else None


def keep_steps(file: Path, steps: Steps) -> None:
    """Write the times' file, whole or not at all. Raises: SurgeryError (bad-output)."""
    _write(file, steps)


def _read(file: Path, kind: type[T]) -> T | None:
    """What a file holds; None where there is no file."""
    try:
        fields = read_json(file)
        return TypeAdapter(kind).validate_python({n: v for n, v in fields.items() if n != "format_version"})
    except FileNotFoundError:
        return None
    except ValidationError as error:
        # Somebody may have edited it: training again over it would lose what it says.
        wrong = ", ".join(dict.fromkeys(str(fault["loc"][0]) for fault in error.errors(include_input=False)))
        raise fail("bad-data", f"{file} is not finished: it lacks, or has wrongly: {wrong}",
                   helps=("delete it",)) from None
    except (OSError, ValueError, AttributeError) as error:
        raise fail("bad-data", f"{file} is not finished: {error}", helps=("delete it",)) from None


def _write(target: Path, what: Run | Steps) -> None:
    text = json.dumps({"format_version": FORMAT, **asdict(what)}, indent=1, allow_nan=False)
    with replacing_file(target) as new:
        new.write_text(text + "\n", encoding="utf-8")
