"""The comparison: specs and full fine-tuning on one text task, under equal budgets.

Takes specs by name, a model by its loader and tokenizer, a task; gives a `Run` for each method, learning rate and seed,
and the times of their steps. Promises: every method sees the same texts in as many steps, and with one seed the same
head and the same batches; the learning rate can be chosen on one part of the texts and the score taken on another;
times that are compared were taken side by side. `runs` keeps what it gives, and `compare_rows` says what that shows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.analysis.spectra import spectrum
from surgery.analysis.spectra.summary import Group
from surgery.diagnostics import Collector, SurgeryError
from surgery.experiments.comparison_files import Run, Steps, digest, finished, keep, keep_steps, known_steps
from surgery.experiments.comparison_table import Row, rows
from surgery.experiments.text_tasks import Task, scores
from surgery.experiments.timing import sharing
from surgery.experiments.training import Setting, encoded, outputs, train, with_head
from surgery.experiments.training_cost import Clock, side_by_side, step_bytes
from surgery.language.library import inlined
from surgery.language.tree import Spec, Target, add
from surgery.models.loading import load_with_head, tokenizer
from surgery.planning.compile import compile
from surgery.runtime.surgeon import apply

FULL = "full"
FIGURES = ("entropy", "normalised_entropy", "stable_rank", "effective_rank", "relative_size")
VALIDATION, TEST = 0.2, 0.2
_EVERY = Spec("every", targets=(Target(add("low_rank"), kind="linear"),))
RUNS, STEPS = "runs", "steps.json"
Loader = Callable[[int], PreTrainedModel]
Starting = Callable[[str], AbstractContextManager]


def compare(specs: Mapping[str, Spec | None], model: str, task: Task, folder: str | PathLike, *,
            rates: Sequence[float] = (1e-4, 3e-4, 1e-3), seeds: int = 5, epochs: float = 2, batch: int = 32,
            trust: bool = False) -> list[Row]:
    """Train specs (and full fine-tuning, which None stands for) side by side on a text task; a row for each.

    `model` is a name that `load_model` takes, and gets a new head; `task` is what `read` of a file of texts gives. The
    learning rate is chosen among `rates` on a fifth of the texts and the score taken on another. What `folder` holds
    already is not done again. `trust`: run Python code that lies in the model's folder.

    Raises: SurgeryError, before any training, for what is wrong with any of the specs for this model."""
    comparison = comparison_of(specs, model, task, trust, rates=rates, seeds=seeds, epochs=epochs, batch=batch)
    comparison.check()
    return rows(comparison.runs(Path(folder)), comparison.steps(Path(folder)))


def comparison_of(specs: Mapping[str, Spec | None], model: str, task: Task, trust: bool = False,
                  **budget: Any) -> Comparison:
    """The comparison of specs on a model that is named. Raises: SurgeryError (unknown-model)."""
    return Comparison(specs, model, lambda seed: load_with_head(model, task.outputs, seed, trust, **task.head),
                      tokenizer(model, trust), task, **budget)


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
        pairs = [self.task.seconds] if self.task.seconds else []  # runs of single texts keep the digest that they had
        return digest([self.task.texts, self.task.labels, self.task.classes, *pairs])

    @cached_property
    def parts(self) -> tuple[Task, Task, Task]:
        """To learn from, to choose the learning rate on, to take the score on: the same for all seeds."""
        learned, validation, test = self.task.parts(1 - VALIDATION - TEST, VALIDATION)
        return learned, validation, test

    def runs(self, folder: Path, starting: Starting = lambda what: nullcontext(),
             ended: Callable[[str, Run, bool], None] = lambda what, run, is_new: None) -> list[Run]:
        """Every run, from its file in `folder` or performed and kept there. `starting` stands around each that is
        performed, and `ended` is told of each; both with a line that says which it is."""
        runs, asked = [], self.asked()
        for number, each in enumerate(asked, start=1):
            what = f"{number}/{len(asked)}  {each['method']}  lr {each['rate']:g}  seed {each['seed']}"
            run = known = finished(folder / RUNS, each)
            if run is None:
                with starting(what):
                    run = self.perform(each)
                keep(folder / RUNS, run)  # at once: what is interrupted goes on from here
            ended(what, run, known is None)
            runs.append(run)
        return runs

    def steps(self, folder: Path, starting: Starting = lambda what: nullcontext()) -> Steps:
        """The times of steps, from their file in `folder` or taken and kept there."""
        known = known_steps(folder / STEPS, self.steps_asked)
        if known is None:
            with starting("timing steps side by side"):
                known = self.time()
            keep_steps(folder / STEPS, known)
        return known

    def perform(self, asked: Mapping[str, Any]) -> Run:
        """Train once, and measure."""
        spec, seed, (learned, validation, test) = self.specs[asked["method"]], asked["seed"], self.parts
        model, clock, setting = self.load(seed), Clock(), Setting(asked["rate"], self.epochs, self.batch, seed)
        surgeon = apply(model, with_head(spec, model), seed=seed) if spec else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # groups, and not the parameters alone: a spec may say a rate of its own for a parameter
        groups = surgeon.parameter_groups(setting.lr) if surgeon else model.parameters()
        optimiser = torch.optim.AdamW(groups, lr=setting.lr, weight_decay=0.0)
        train(model, self.words, learned, setting, optimiser=optimiser, callbacks=[clock])
        chosen_by, scored = self._scores(model, validation), self._scores(model, test)
        update: dict[str, float | None] = {}
        if chosen_by is not None and scored is not None:
            # Full fine-tuning changes everything: it is measured where the specs operate, or means would not compare.
            spectra = spectrum(surgeon, top=0) if surgeon else spectrum(self.load(0), model, top=0)
            means = Group.of("", [row for row in spectra.rows if surgeon or row.name in self._operated]).means
            update = {name: means[name] for name in FIGURES}
        return Run(asked, chosen_by, scored, trained, update, clock.seconds, step_bytes(model, self._longest(model)),
                   machine())

    def time(self) -> Steps:
        """The time of a step of every method, side by side."""
        model, models = self.load(0), {}
        for method, spec in self.specs.items():
            if spec is None:  # full fine-tuning trains all of its own
                models[method] = self.load(0)
                continue
            # on the weights of `model`, but for those that it trains: ten methods then need one model's memory
            whole = with_head(spec, model)
            models[method] = sharing(model, compile(model, whole).train)
            apply(models[method], whole)
        return Steps(self.steps_asked, side_by_side(models, self._longest(model)), machine())

    def _scores(self, model: PreTrainedModel, part: Task) -> dict[str, float] | None:
        """The scores on a part; None where the training diverged."""
        given = outputs(model, self.words, part)
        return scores(part, given) if np.isfinite(given).all() else None

    @cached_property
    def _operated(self) -> frozenset[str]:
        """The weights that any of the specs operates on; without a spec, every linear layer's."""
        model = self.load(0)
        specs = [*filter(None, self.specs.values())] or [_EVERY]
        return frozenset(p.site.name for spec in specs for p in compile(model, spec).placed)

    def _longest(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The longest texts to learn from as one batch."""
        # The most that a step can take: the memory of a usual batch would say little of what must fit.
        items = sorted(encoded(self.parts[0], self.words, Setting.length), key=lambda item: -len(item["input_ids"]))
        return {k: v.to(model.device) for k, v in self.words.pad(items[: self.batch], return_tensors="pt").items()}


def machine() -> str:
    """The machine in words: the processor, the threads, torch."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        # `platform` knows the architecture alone: two machines of one would count as the same.
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                    platform.machine())
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"
