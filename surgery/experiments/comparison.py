"""The comparison: specs and full fine-tuning on one task, under equal budgets.

Takes specs by name, a model by its loader and tokenizer, a task in parts; gives a `Run` for each method, learning rate
and seed, and the times of their steps. Promises: every method sees the same items in as many steps, and with one seed
the same head and the same batches; the learning rate is chosen on one part and the scores taken on others; times that
are compared were taken side by side. `comparison_files` keeps what it gives, and `comparison_table` says what that
shows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.analysis.spectra import Spectra, gathered, spectrum
from surgery.analysis.spectra.checkpoint import Weights, pairs
from surgery.analysis.spectra.curves import distribution
from surgery.analysis.spectra.summary import Group
from surgery.analysis.spectra.summary import Row as SpectrumRow
from surgery.analysis.spectra.updates import of_models
from surgery.diagnostics import Collector, SurgeryError, fail, tell
from surgery.experiments import comparison_workers as workers
from surgery.experiments.comparison_files import (
    RUNS,
    STEPS,
    Layer,
    Run,
    Steps,
    digest,
    finished,
    keep,
    keep_steps,
    known_steps,
)
from surgery.experiments.comparison_table import Mean, Row, at_best, by_method, rows
from surgery.experiments.evaluation import refuse_unfit, scored
from surgery.experiments.fine_tuning import Data, Training, groups
from surgery.experiments.tasks import AnyTask
from surgery.experiments.text_tasks import Task
from surgery.experiments.timing import sharing, training_device
from surgery.experiments.training import lesson_of, operated, train, whole
from surgery.experiments.training_cost import Clock, side_by_side, step_bytes
from surgery.language.library import inlined
from surgery.language.tree import Spec, Target, add
from surgery.models.loading import load as load_model
from surgery.models.loading import load_with_head, tokenizer
from surgery.planning.compile import compile
from surgery.runtime.calibration import refuse
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.optimiser_groups import refuse_unknown
from surgery.runtime.surgeon import Surgeon
from surgery.text import counted

FIGURES = ("entropy", "normalised_entropy", "entropy_by_largest", "stable_rank", "effective_rank", "relative_size",
           "condition_number")
VALIDATION, TEST = 0.2, 0.2
_PLACES = 24  # of a layer's singular values, so many are kept
_EVERY = Spec("every", targets=(Target(add("low_rank"), kind="linear"),))
_APART = ("lr", "seed", "epochs", "batch")  # settings that a run says of itself, whatever they are
Rates = Sequence[float] | Mapping[str, Sequence[float]]  # of all methods, or of each
Loader = Callable[[int], PreTrainedModel]
Starting = Callable[[str], AbstractContextManager]


def compare(specs: Mapping[str, Spec | None], model: str, data: Data | str | PathLike, folder: str | PathLike, *,
            rates: Rates = (1e-4, 3e-4, 1e-3), seeds: int = 5, sweep: int | None = None,
            setting: Training = Training(), dtype: str | None = None, trust: bool = False,
            devices: Sequence[str] = ()) -> list[Row]:
    """Train specs (and full fine-tuning, which None stands for) side by side on a task; a row for each.

    `model` is a name that `load_model` takes, and gets a new head where the task asks for one; `data` is what
    `surgery.train` takes. The learning rate is chosen among `rates` on `data.dev`, or a fifth of what there is to learn
    from, by the first `sweep` seeds; the scores are taken on `data.tests`, or another fifth. Runs that `folder`
    holds are not repeated. `trust`: run Python code that lies in the model's folder. `devices`, such as
    `["cuda:0", "cuda:1"]`: a worker process on each of them trains.

    Raises: SurgeryError, before any training, for what is wrong with any of the specs for this model; lost-run, after
    all the others, for runs whose worker was lost."""
    workers.refuse_unknown(devices)
    asked = data if isinstance(data, Data) else Data(str(data))
    comparison = comparison_of(specs, model, asked, trust, dtype, rates=rates, seeds=seeds, sweep=sweep, how=setting)
    comparison.check()
    runs = comparison.runs(Path(folder), devices=devices)
    return rows(runs, comparison.steps(Path(folder), devices=devices), sweep)


def comparison_of(specs: Mapping[str, Spec | None], model: str, data: Data, trust: bool = False,
                  dtype: str | None = None, **budget: Any) -> Comparison:
    """The comparison of specs on a model that is named. Raises: SurgeryError (unknown-model; as `Data.read`)."""
    task, dev, tests = data.read()
    names = [test.name for test in tests]
    if len({*names}) < len(names):
        raise fail("bad-data", f"two tests have one name: {', '.join(names)}",
                   helps=("scores are kept by the names of files: rename one",))

    load = Loading(model, dtype, trust, (task.outputs, task.head) if isinstance(task, Task) else None)
    return Comparison(specs, model, load, tokenizer(model, trust), task, dev=dev, tests=tests, dtype=dtype, **budget)


@dataclass(frozen=True)
class Loading:
    """Loads a model for a seed, with a new head of so many outputs and such a configuration, or as it is."""

    model: str
    dtype: str | None
    trust: bool
    head: tuple[int, Mapping[str, Any]] | None

    def __call__(self, seed: int) -> PreTrainedModel:
        if self.head is None:  # without a head of its own it is the same for every seed
            return deepcopy(self._pretrained)
        outputs, config = self.head
        found = load_with_head(self.model, outputs, seed, self.trust, **config)
        return found.to(getattr(torch, self.dtype)) if self.dtype else found

    @cached_property
    def _pretrained(self) -> PreTrainedModel:
        return load_model(self.model, self.dtype, self.trust)

    def __reduce__(self) -> tuple[Any, ...]:  # a worker loads it by itself
        return Loading, (self.model, self.dtype, self.trust, self.head)


@dataclass(frozen=True)
class Comparison:
    """What to run. `specs` by the names of the methods, None for full fine-tuning; `load` gives the model, with a head
    drawn from a seed where the task asks for one; `model` is its name, for the record. `how` to train, but for the
    rate and the seed; the first `sweep` seeds try all `rates`, and the others the best of those alone."""

    specs: Mapping[str, Spec | None]
    model: str
    load: Loader
    words: PreTrainedTokenizerBase
    task: AnyTask
    rates: Rates
    seeds: int
    sweep: int | None = None
    how: Training = Training()
    dev: AnyTask | None = None
    tests: Sequence[AnyTask] = field(default_factory=tuple)
    dtype: str | None = None

    def check(self) -> None:
        """Before any training. Raises: SurgeryError with all that is wrong with any of the specs for this model."""
        report, model = Collector(), self.load(0)
        _, dev, tests = self.parts
        for task in (self.task, dev, *tests):
            refuse_unfit(model, task)
        for spec in filter(None, self.specs.values()):
            try:
                plan = compile(model, whole(spec, model, self.task))
                refuse(model, plan.placed)
                refuse_unknown(plan, [f"lr_{name}" for name in self.how.rates])
                tell(plan.warnings)
            except SurgeryError as error:
                report.add(*error.diagnostics)
        report.raise_errors()

    def asked(self, seeds: Sequence[int] | None = None,
              rates: Mapping[str, Sequence[float]] | None = None) -> list[dict[str, Any]]:
        """What identifies each run, the methods side by side so that a machine's moods fall on all of them. `rates`:
        those of each method, all where they are not said."""
        about = {"model": self.model, "task": self.task.name, "kind": self.task.kind, "texts": len(self.task),
                 "digest": self._digest, "epochs": float(self.how.epochs), "batch": self.how.batch, **self._others}
        tried = rates or self.tried
        return [{"method": method, "spec": text, "rate": rate, "seed": seed, **about}
                for seed in (range(self.seeds) if seeds is None else seeds)
                for rate in dict.fromkeys(rate for each in tried.values() for rate in each)
                for method, text in self._texts.items() if rate in tried[method]]

    @property
    def tried(self) -> dict[str, Sequence[float]]:
        """The learning rates of each method."""
        return {method: self.rates[method] if isinstance(self.rates, Mapping) else self.rates for method in self.specs}

    @property
    def steps_asked(self) -> dict[str, Any]:
        """What the times of steps depend on, but for the machine."""
        return {"specs": self._texts, "model": self.model, "digest": self._digest, "batch": self.how.batch,
                **self._others}

    @property
    def _texts(self) -> dict[str, str | None]:
        return {method: inlined(spec).to_surg() if spec else None for method, spec in self.specs.items()}

    @cached_property
    def _digest(self) -> str:
        """Stands for what is learned."""
        return _digest_of(self.task)

    @cached_property
    def _weights(self) -> str:
        """Stands for the weights of the base model, by a few numbers of each."""
        model = self.load(0)
        pretrained = model.base_model if isinstance(self.task, Task) else model  # a head is new
        return digest({name: fingerprint_of(p) for name, p in pretrained.named_parameters()
                       if type(p) is torch.nn.Parameter and p.ndim})

    @cached_property
    def _others(self) -> dict[str, Any]:
        """What a run depends on besides, where it is not as it is where nobody says so."""
        usual, files = asdict(Training()), {"dev": self.dev and _digest_of(self.dev), "dtype": self.dtype,
                                            "tests": {t.name: _digest_of(t) for t in self.tests} or None}
        changed = {name: value for name, value in asdict(self.how).items()
                   if name not in _APART and value != usual[name]}
        return {**changed, **{name: value for name, value in files.items() if value is not None}}

    @cached_property
    def parts(self) -> tuple[AnyTask, AnyTask, Sequence[AnyTask]]:
        """To learn from, to choose the learning rate on, to take the scores on: the same for all seeds."""
        shares = [*([] if self.dev else [VALIDATION]), *([] if self.tests else [TEST])]
        if not shares:
            return self.task, self.dev or self.task, self.tests
        learned, *cut = self.task.parts(1 - sum(shares), *shares[:-1])
        dev = self.dev or cut.pop(0)
        return learned, dev, self.tests or cut

    def runs(self, folder: Path, starting: Starting = nullcontext,
             ended: Callable[[str, Run, bool], None] = lambda what, run, is_new: None,
             devices: Sequence[str] = ()) -> list[Run]:
        """Every run, from its file in `folder` or performed and kept there. `starting` stands around each that is
        performed, and `ended` is told of each; both with a line that says which it is. `devices`: several runs at a
        time, one on each of them, by workers. Raises: SurgeryError (lost-run) where a worker ends before its run."""
        sweep = self.seeds if self.sweep is None else min(self.sweep, self.seeds)
        runs: list[Run] = []

        def perform(asked: Sequence[Mapping[str, Any]], of: int) -> None:
            lines = {f"{number}/{of}  {each['method']}  lr {each['rate']:g}  seed {each['seed']}": each
                     for number, each in enumerate(asked, start=len(runs) + 1)}
            known = {what: finished(folder / RUNS, each, lambda: self._weights) for what, each in lines.items()}
            for what, run in known.items():
                if run is not None:
                    ended(what, run, False)
            missing = {what: each for what, each in lines.items() if known[what] is None}
            for what, run in self._performed(missing, folder, starting, devices):
                known[what] = run
                ended(what, run, True)
            runs.extend(run for run in known.values() if run)

        first, later = self.asked(range(sweep)), range(sweep, self.seeds)
        count = len(first) + len(later) * len(self.specs)
        perform(first, count)
        if later:
            perform(self.asked(later, {method: [at_best(mine)[0]] for method, mine in by_method(runs).items()}), count)
        return runs

    def _performed(self, asked: Mapping[str, Mapping[str, Any]], folder: Path, starting: Starting,
                   devices: Sequence[str]) -> Iterator[tuple[str, Run]]:
        """Each run under its line, when it has ended and is kept: what is interrupted goes on from there."""
        if devices and asked:
            with starting(f"{counted(len(asked), 'run')} on {', '.join(devices)}"):
                yield from workers.performed(self, asked, folder, devices)
            return
        for what, each in asked.items():
            with starting(what):
                run = self.perform(each)
            keep(folder / RUNS, run)
            yield what, run

    def steps(self, folder: Path, starting: Starting = nullcontext,
              devices: Sequence[str] = ()) -> Steps:
        """The times of steps, from their file in `folder` or taken (on the first of the devices) and kept there."""
        known = known_steps(folder / STEPS, self.steps_asked)
        if known is not None:
            return known
        with starting("timing steps side by side"):
            if devices:
                workers.timed(self, folder, devices[0])
            else:
                keep_steps(folder / STEPS, self.time())
        return self.steps(folder)

    def perform(self, asked: Mapping[str, Any]) -> Run:
        """Train once, and measure."""
        spec, (learned, dev, tests) = self.specs[asked["method"]], self.parts
        setting = replace(self.how, lr=asked["rate"], seed=asked["seed"])
        model, clock = self._placed(setting.seed), Clock()
        surgeon = operated(model, spec, self.task, self.words, learned, setting) if spec else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        optimiser = torch.optim.AdamW(groups(surgeon, model, setting))
        train(model, self.words, learned, setting, optimiser=optimiser, callbacks=[clock])
        scores = [self._scores(model, part) for part in (dev, *tests)]
        costs = (clock.seconds, step_bytes(model, self._longest(model)), machine())
        known = [each for each in scores if each is not None]
        if len(known) < len(scores):  # it diverged: there is no score of it, and no update to look at
            return Run(asked, None, None, trained, {}, *costs, weights=self._weights)
        validation, *found = ({name: mean.value for name, mean in each.items()} for each in known)
        names, spectra = [test.name for test in tests], self._spectra(surgeon, model, setting.seed)
        errors = [next(iter(each.values())).error for each in known[1:]]
        return Run(asked, validation, dict(zip(names, found)), trained, _means(spectra.rows), *costs,
                   dict(zip(names, errors)), layers_of(spectra), self._weights)

    def time(self) -> Steps:
        """The time of a step of every method, side by side."""
        model, models = self._placed(0), {}
        for method, spec in self.specs.items():
            if spec is None:  # full fine-tuning trains all of its own
                models[method] = self._placed(0)
                continue
            # on the weights of `model`, but for those that it trains: ten methods then need one model's memory
            models[method] = sharing(model, compile(model, whole(spec, model, self.task)).train)
            operated(models[method], spec, self.task, self.words, self.parts[0], replace(self.how, seed=0))
        return Steps(self.steps_asked, side_by_side(models, self._longest(model)), machine())

    def _placed(self, seed: int) -> PreTrainedModel:
        """The model where it trains."""
        model = self.load(seed)
        Module.to(model, training_device())
        return model

    def _scores(self, model: PreTrainedModel, part: AnyTask) -> dict[str, Mean] | None:
        """The scores on a part; None where the training diverged."""
        try:
            return scored(model, self.words, part, self.how.scoring).scores
        except SurgeryError as error:
            if any(diagnostic.code != "bad-value" for diagnostic in error.diagnostics):
                raise
            return None  # outputs that are not finite

    def _spectra(self, surgeon: Surgeon | None, model: PreTrainedModel, seed: int) -> Spectra:
        """Those of ΔW. Full fine-tuning changes everything: it is measured where the specs operate, or means would not
        compare; from what it began with, since a layer that the checkpoint lacks (a pooler) is drawn by the seed."""
        if surgeon is not None:
            return spectrum(surgeon, top=0, condition=True)
        changed = of_models(pairs(Weights(self.load(seed)), Weights(model)))
        return gathered([each for each in changed if each.name in self._operated], top=0, condition=True)

    @cached_property
    def _operated(self) -> frozenset[str]:
        """The weights that any of the specs operates on; without a spec, every linear layer's."""
        model = self.load(0)
        specs = [*filter(None, self.specs.values())] or [_EVERY]
        return frozenset(p.site.name for spec in specs for p in compile(model, spec).placed)

    def _longest(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The longest items to learn from as one batch."""
        # The most that a step can take: the memory of a usual batch would say little of what must fit.
        longest = lesson_of(model, self.words, self.parts[0], self.how).longest(self.how.batch)
        return {name: values.to(model.device) for name, values in longest.items()}


def layers_of(spectra: Spectra) -> tuple[Layer, ...]:
    """What is kept of each layer's spectra; weights outside of the layers are left out."""
    found = []
    for layer in dict.fromkeys(row.layer for row in spectra.rows if row.layer is not None):
        rows = [row for row in spectra.rows if row.layer == layer]
        curve = distribution("", [row for row in rows if row.changed], _PLACES)
        found.append(Layer(layer, _means(rows), curve.x, curve.y))
    return tuple(found)


def _means(rows: Sequence[SpectrumRow]) -> dict[str, float | None]:
    means = Group.of("", rows).means
    return {name: means[name] for name in FIGURES}


def _digest_of(task: AnyTask) -> str:
    """Stands for the items of a task."""
    if not isinstance(task, Task):
        return digest(repr(task.items))
    pairs = [task.seconds] if task.seconds else []  # runs of single texts keep the digest that they had
    return digest([task.texts, task.labels, task.classes, *pairs])


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
