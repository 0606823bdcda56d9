"""The comparison: specs and full fine-tuning on one text task, under equal budgets.

Takes specs by name, a model by its loader and tokenizer, a task; gives a `Run` for each method, learning rate and seed,
and a `Row` for each method. Promises: every method sees the same texts in as many steps, and with one seed the same
head and the same batches; the learning rate is chosen on the validation part and the score taken on the test part; each
run is a small JSON file that appears whole, and a run that a file holds is not run again; times that are compared were
taken side by side.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.compile import compile
from surgery.diagnostics import Collector, SurgeryError, fail
from surgery.folders import replacing_file
from surgery.footprint import Clock, side_by_side, step_bytes
from surgery.measure import sharing
from surgery.operate import Surgeon, apply
from surgery.spec import inlined
from surgery.spectra import spectrum
from surgery.spectra.summary import Group
from surgery.syntax.tree import Spec, Target, add
from surgery.tasks import Task, scores
from surgery.training import Setting, encoded, outputs, train, with_head

FULL = "full"
FIGURES = ("entropy", "normalised_entropy", "stable_rank", "effective_rank", "relative_size")
FORMAT = "1.0"
VALIDATION, TEST = 0.2, 0.2
_EVERY = Spec("every", targets=(Target(add("low_rank"), kind="linear"),))
T = TypeVar("T")
Loader = Callable[[int], PreTrainedModel]


@dataclass(frozen=True)
class Run:
    """One training. `asked` is all that its outcome depends on; `update` holds the figures of ΔW, as means over the
    weights. Where the training diverged, the scores are None and `update` is empty."""

    asked: Mapping[str, Any]
    validation: Mapping[str, float] | None
    test: Mapping[str, float] | None
    trained: int
    update: Mapping[str, float | None]
    step_seconds: float
    peak_bytes: int
    machine: str

    @property
    def method(self) -> str:
        return self.asked["method"]

    @property
    def chosen_by(self) -> float:
        """The score that learning rates are chosen by; larger is better."""
        return float("-inf") if self.validation is None else next(iter(self.validation.values()))


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


@dataclass(frozen=True)
class Comparison:
    """What to run. `specs` by the names of the methods, None for full fine-tuning; `load` gives the model with a head
    drawn from a seed; `model` is its name, for the record."""

    specs: Mapping[str, Spec | None]
    model: str
    load: Loader
    words: PreTrainedTokenizerBase
    task: Task
    rates: Sequence[float]
    seeds: int
    epochs: float
    batch: int = Setting.batch

    def check(self) -> None:
        """Before any training. Raises: SurgeryError with all that is wrong with any of the specs for this model."""
        report, model = Collector(), self.load(0)
        for spec in filter(None, self.specs.values()):
            try:
                compile(model, with_head(spec, model))
            except SurgeryError as error:
                report.add(*error.diagnostics)
        report.raise_errors()

    def asked(self) -> list[dict[str, Any]]:
        """What identifies each run, the methods side by side so that a machine's moods fall on all of them."""
        about = {"model": self.model, "task": self.task.name, "kind": self.task.kind, "texts": len(self.task),
                 "digest": self._digest, "epochs": self.epochs, "batch": self.batch}
        return [{"method": method, "spec": text, "rate": rate, "seed": seed, **about}
                for seed in range(self.seeds) for rate in self.rates for method, text in self._texts.items()]

    @property
    def steps_asked(self) -> dict[str, Any]:
        """What the times of steps depend on, but for the machine."""
        return {"specs": self._texts, "model": self.model, "digest": self._digest, "batch": self.batch}

    @property
    def _texts(self) -> dict[str, str | None]:
        return {method: inlined(spec).to_surg() if spec else None for method, spec in self.specs.items()}

    @cached_property
    def _digest(self) -> str:
        """Stands for the texts and labels."""
        return _digest([self.task.texts, self.task.labels, self.task.classes])

    @cached_property
    def parts(self) -> tuple[Task, Task, Task]:
        """To learn from, to choose the learning rate on, to take the score on: the same for all seeds."""
        return self.task.parts(1 - VALIDATION - TEST, VALIDATION)

    def perform(self, asked: Mapping[str, Any]) -> Run:
        """Train once, and measure."""
        spec, seed, (learned, validation, test) = self.specs[asked["method"]], asked["seed"], self.parts
        model, clock, setting = self.load(seed), Clock(), Setting(asked["rate"], self.epochs, self.batch, seed)
        surgeon = apply(model, with_head(spec, model), seed=seed) if spec else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(model, self.words, learned, setting, callbacks=[clock])
        found = [self._scores(model, part) for part in (validation, test)]
        update = self._update(model, surgeon) if None not in found else {}
        return Run(asked, *found, trained, update, clock.seconds, step_bytes(model, self._longest(model)), machine())

    def time(self) -> Steps:
        """The time of a step of every method, side by side."""
        model = self.load(0)
        models = {method: self._beside(model, spec) for method, spec in self.specs.items()}
        return Steps(self.steps_asked, side_by_side(models, self._longest(model)), machine())

    def _beside(self, model: PreTrainedModel, spec: Spec | None) -> PreTrainedModel:
        """A method's model, on the weights of `model` that it does not train."""
        if spec is None:
            return self.load(0)
        whole = with_head(spec, model)
        copied = sharing(model, compile(model, whole).train)
        apply(copied, whole)
        return copied

    def _scores(self, model: PreTrainedModel, part: Task) -> dict[str, float] | None:
        given = outputs(model, self.words, part)
        return scores(part, given) if np.isfinite(given).all() else None

    def _update(self, model: PreTrainedModel, surgeon: Surgeon | None) -> dict[str, float | None]:
        """Means over the weights that the spec operates on; for full fine-tuning, that any of the specs operates on."""
        found = spectrum(surgeon, top=0) if surgeon else spectrum(self.load(0), model, top=0)
        means = Group.of("", [row for row in found.rows if surgeon or row.name in self._operated]).means
        return {name: means[name] for name in FIGURES}

    @cached_property
    def _operated(self) -> frozenset[str]:
        model = self.load(0)
        specs = [*filter(None, self.specs.values())] or [_EVERY]
        return frozenset(p.site.name for spec in specs for p in compile(model, spec).placed)

    def _longest(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The longest texts to learn from as one batch."""
        items = sorted(encoded(self.parts[0], self.words, Setting.length), key=lambda item: -len(item["input_ids"]))
        return {k: v.to(model.device) for k, v in self.words.pad(items[: self.batch], return_tensors="pt").items()}


def machine() -> str:
    """The machine in words: the processor, the threads, torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ------------------------------------------------------------------------------------------------------------ files


def _digest(what: Any) -> str:
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def place_of(folder: Path, asked: Mapping[str, Any]) -> Path:
    """The file of a run: runs that were asked for otherwise lie side by side."""
    return folder / f"{asked['method']}-{asked['rate']:g}-{asked['seed']}-{_digest(dict(asked))}.json"


def finished(folder: Path, asked: Mapping[str, Any]) -> Run | None:
    """The run, if it is in the folder."""
    return _read(place_of(folder, asked), Run)


def keep(folder: Path, run: Run) -> None:
    """Write a run's file, whole or not at all. Raises: SurgeryError (bad-output)."""
    _write(place_of(folder, run.asked), run)


def known_steps(file: Path, asked: Mapping[str, Any]) -> Steps | None:
    """The times in a file, if they are those that are asked for, in this order too:
    ratios are to the first method's."""
    found = _read(file, Steps)
    return found if found and json.dumps(found.asked) == json.dumps(asked) else None


def keep_steps(file: Path, steps: Steps) -> None:
    """Write the times' file, whole or not at all. Raises: SurgeryError (bad-output)."""
    _write(file, steps)


def _read(file: Path, kind: type[T]) -> T | None:
    """What a file holds; None where there is no file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return kind(**{name: value for name, value in found.items() if name != "format_version"})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise fail("bad-data", f"{file} is not finished: {error}", helps=("delete it",)) from None


def _write(target: Path, what: Run | Steps) -> None:
    text = json.dumps({"format_version": FORMAT, **asdict(what)}, indent=1, allow_nan=False)
    with replacing_file(target) as new:
        new.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, None for a single seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method at the learning rate that its validation scores are best at. `edge` is `top` or `bottom` where that is
    the end of several rates, so that a better one may lie beyond. `scores` are of the test part, the first is the one
    to go by, and there are none where the training diverged; `entropy` is the SVD entropy of ΔW, a mean over the
    weights. The times are medians of steps side by side, the ratio to the first method's, None where they were not
    taken; the memory is the most of any run."""

    method: str
    rate: float
    edge: str | None
    seeds: int
    scores: Mapping[str, Mean]
    trained: int
    step_seconds: float | None
    step_ratio: float | None
    peak_bytes: int
    entropy: Mean | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rows(runs: Sequence[Run], steps: Steps | None = None) -> list[Row]:
    """One row for each method, in the order of the runs."""
    methods = dict.fromkeys(r.method for r in runs)
    return [_row(method, [r for r in runs if r.method == method], steps) for method in methods]


def _row(method: str, runs: Sequence[Run], steps: Steps | None) -> Row:
    rates = dict.fromkeys(r.asked["rate"] for r in runs)
    best = max(rates, key=lambda rate: fmean(r.chosen_by for r in _at(rate, runs)))
    chosen = _at(best, runs)
    tests = [r.test for r in chosen if r.test is not None]
    entropies = [r.update["entropy"] for r in chosen if r.update.get("entropy") is not None]
    found = {name: Mean.of([test[name] for test in tests]) for name in tests[0]} if len(tests) == len(chosen) else {}
    return Row(method, best, _edge(best, rates) if found else None, len(chosen), found, chosen[0].trained,
               steps and steps.seconds(method), steps and steps.ratio(method), max(r.peak_bytes for r in runs),
               Mean.of(entropies) if len(entropies) == len(chosen) else None)


def _edge(rate: float, rates: Iterable[float]) -> str | None:
    """The end of several rates that one is."""
    ends = {min(rates): "bottom", max(rates): "top"}
    return ends.get(rate) if len(ends) > 1 else None


def _at(rate: float, runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.asked["rate"] == rate]
