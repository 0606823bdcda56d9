"""Fine-tuning a model as a spec says, on a data file, with the Trainer of transformers.

Takes a spec, the name of a model, data files and a setting; gives the operated model with its scores before and after,
and saves the adapter with what it was made with. Promises: everything that can be wrong is told before the model
trains; the adapter appears whole or not at all; a run that was stopped goes on from its last checkpoint to the same
end, and only with the settings that it began with. Needs the extra `train`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from surgery.diagnostics import fail, tell
from surgery.experiments import training_record
from surgery.experiments.comparison_files import LOWER, digest
from surgery.experiments.evaluation import Evaluation, Scoring, refuse_unfit, scored
from surgery.experiments.likelihood import Told
from surgery.experiments.tasks import AnyTask, read_task
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import (
    OrderedTrainer,
    Setting,
    arguments,
    heads,
    lesson_of,
    operated,
    trainer_of,
)
from surgery.extras import need
from surgery.language.library import inlined, load
from surgery.language.tree import Spec
from surgery.models.loading import load as load_model
from surgery.models.loading import load_with_drawn, tokenizer
from surgery.runtime.atomic_folders import refuse_taken, refuse_unwritable, replacing_file
from surgery.runtime.batched_setups import batched_setups
from surgery.runtime.saved_format import ADAPTER, Saved
from surgery.runtime.surgeon import Surgeon
from surgery.text import listed

STATE = "trainer_state.json"
_LOGS = 20  # lines that a run tells of its loss, if it has as many steps
# The score that the best checkpoint is chosen by, for each kind of task; the loss for any other.
_CHOSEN_BY = {"classification": "accuracy", "regression": "spearman", "choice": "accuracy", "answer": "exact_match"}


@dataclass(frozen=True)
class Training(Setting):
    """How to fine-tune: as `Setting`, with a rate for a new head, and for each `param` of the spec by its name
    (`{"B": 1e-3}`). A checkpoint, and a score on what is held out, every `every` steps, or epochs where that is None;
    after `patience` of them without a better score the training ends. `prompt` and `tokens`: as `Scoring` has
    them."""

    lr: float = 3e-4
    batch: int = 16
    length: int = 512
    head_lr: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    every: int | None = None
    patience: int | None = None
    tokens: int = 256

    @property
    def scoring(self) -> Scoring:
        """How the model is scored, before and after: in the batches and lengths that it trains in."""
        return Scoring(self.batch, self.length, self.prompt, self.tokens)


@dataclass(frozen=True)
class Data:
    """The data files: to learn from; `dev` to choose the best checkpoint on; `tests` to score before and after. `kind`,
    `label`, `threshold`: what the columns do not tell. `limit`, `test_limit`: use so many items of a file."""

    learned: str
    dev: str | None = None
    tests: Sequence[str] = ()
    kind: str | None = None
    label: str | None = None
    threshold: float | None = None
    limit: int | None = None
    test_limit: int | None = None

    def read(self) -> tuple[AnyTask, AnyTask | None, list[AnyTask]]:
        """The tasks. Raises: SurgeryError (missing-file, bad-data)."""
        task = self._read(self.learned).limited(self.limit)
        again = partial(self._read, kind=task.kind, classes=task.classes) if isinstance(task, Task) else self._read
        tests = [again(path).limited(self.test_limit) for path in self.tests]
        return task, again(self.dev).limited(self.test_limit) if self.dev else None, tests

    def _read(self, path: str, kind: str | None = None, classes: Sequence[str] = ()) -> AnyTask:
        labels = {"label": self.label, "threshold": self.threshold}
        return read_task(path, kind or self.kind, classes=classes, **labels)

    @property
    def files(self) -> list[str]:
        return [self.learned, *([self.dev] if self.dev else []), *self.tests]


@dataclass(frozen=True)
class Watch:
    """Who is told of a training: `note` of what stays, `now` of what is being done, `busy` stands around what takes
    time."""

    note: Callable[[str], None] = lambda text: None
    now: Callable[[str], None] = lambda text: None
    busy: Callable[[str], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Trained:
    """A training that ended: the surgeon of the operated model, and the scores on each test, before and after. Where it
    went on after `earlier` steps of a run that was stopped, `loss` (their mean) and `seconds` are of the others of its
    `steps`. `is_first`: of processes that train together, the one that saves and tells."""

    surgeon: Surgeon
    folder: Path
    before: tuple[Evaluation, ...]
    after: tuple[Evaluation, ...]
    steps: int
    loss: float
    seconds: float
    is_first: bool = True
    earlier: int = 0


def train(spec: Spec | str | PathLike, model: str, data: Data | str | PathLike, folder: str | PathLike, *,
          setting: Training = Training(), dtype: str | None = None, force: bool = False, resume: bool = False,
          trust: bool = False, self_contained: bool = False, watch: Watch = Watch(),
          about: Mapping[str, Any] = MappingProxyType({})) -> Trained:
    """Fine-tune `model` (a name that `load_model` takes, with a tokenizer) as `spec` says; save the adapter into
    `folder`, with `training.toml`: the options that it was trained with, and `about`.

    Checkpoints lie in `FOLDER-checkpoints`. `resume`: go on from the last of them. `force`: replace what an earlier run
    wrote. `self_contained`: as in `save`. Classification and regression put a new head on the model, which is saved
    with the adapter.

    Raises: SurgeryError (missing-extra, missing-file, bad-data, bad-output, unknown-model; and what `apply` raises)."""
    need("accelerate", "train", "training")
    run = _Run(load(spec) if not isinstance(spec, Spec) else spec, model,
               data if isinstance(data, Data) else Data(str(data)), Path(folder), setting, dtype, trust, self_contained,
               watch if _processes().is_main_process else Watch(), about)
    return run.perform(force, resume)


@dataclass(frozen=True)
class _Run:
    """One training, with all that it depends on."""

    spec: Spec
    model: str
    data: Data
    folder: Path
    setting: Training
    dtype: str | None
    trust: bool
    self_contained: bool
    watch: Watch
    about: Mapping[str, Any]

    def perform(self, force: bool, resume: bool) -> Trained:
        task, dev, tests = self.data.read()
        refuse_taken(self.folder, ADAPTER, force)
        refuse_unwritable(self.folder)
        checkpoints = Checkpoints(Path(f"{self.folder}-checkpoints"), self.record())
        last = checkpoints.last(resume, force)
        with self.watch.busy(f"loading {self.model}"):
            words, (model, drawn) = tokenizer(self.model, self.trust), self._loaded(task)
        for each in (task, *filter(None, [dev]), *tests):
            refuse_unfit(model, each)
        surgeon = operated(model, self.spec, task, words, task, self.setting)
        tell(surgeon.plan.warnings)  # now, before hours of training
        self._refuse_lost(surgeon, drawn)
        if last is not None and Saved(last).differing(surgeon.base):
            raise fail("bad-output", f"the run in {last.parent} began on other weights than {self.model} has now",
                       helps=("--force starts anew; in Python, force=True",))
        before = self._scores(model, words, tests, "before")
        trainer = self._trainer(surgeon, words, task, dev, checkpoints)
        with _processes().main_process_first():
            if not resume:  # not before all else is right: what fails leaves the earlier run's checkpoints
                checkpoints.begin_anew()
        with self._batches(surgeon):
            done = trainer.train(resume_from_checkpoint=str(last) if last else None)
        model.eval()
        after = self._scores(model, words, tests, "after")
        if trainer.is_world_process_zero():
            self._save(surgeon, task, trainer.state, force)
        return Trained(surgeon, self.folder, before, after, done.global_step, done.training_loss,
                       done.metrics["train_runtime"], trainer.is_world_process_zero(),
                       int(last.name.rpartition("-")[2]) if last else 0)

    def record(self) -> str:
        """What the training is asked for, as TOML: a command's options, and what it was made with."""
        data, setting = asdict(self.data), asdict(self.setting)
        asked = {
            "spec": self.spec.name, "model": self.model, "dtype": self.dtype, "data": data.pop("learned"),
            "dev": data.pop("dev"), "eval": data.pop("tests"), "task": data.pop("kind"),
            "eval_limit": data.pop("test_limit"), **data,
            "rate": [f"{name}={rate!r}" for name, rate in setting.pop("rates").items()], **setting,
            **({"self_contained": True} if self.self_contained else {}), **self.about}
        made = {**training_record.versions(), "spec_digest": digest(inlined(self.spec).to_surg())}
        return training_record.toml(asked, {
            "versions": made, "data_sha256": {path: training_record.digest_of(path) for path in self.data.files}})

    def _loaded(self, task: AnyTask) -> tuple[Any, Mapping[str, Sequence[int]]]:
        """The model, and the shapes of what is drawn of it."""
        model: Any
        if isinstance(task, Task):
            model, drawn = load_with_drawn(self.model, task.outputs, self.setting.seed, self.trust, **task.head)
            model = model.to(getattr(torch, self.dtype)) if self.dtype else model
        else:
            model, drawn = load_model(self.model, self.dtype, self.trust), {}
        return model.to(_processes().device), drawn

    def _refuse_lost(self, surgeon: Surgeon, drawn: Mapping[str, Sequence[int]]) -> None:
        """Raises: SurgeryError (bad-adapter) for what is drawn and not trained: nothing that is saved would hold it."""
        lost = [name for name in drawn if name not in surgeon.plan.train]
        if lost:
            module = lost[0].rpartition(".")[0]
            raise fail("bad-adapter", f"what is trained could not be loaded again: the files of {self.model} do not "
                       f"hold {listed(lost)}, and an adapter would not either",
                       helps=(f'train it: `train "{module}.*"` in the spec, and `except "{module}"` where a target '
                              "takes it",))

    def _scores(self, model: Any, words: Any, tests: Sequence[AnyTask], when: str) -> tuple[Evaluation, ...]:
        found = []
        for task in tests:
            found.append(scored(model, words, task, self.setting.scoring, self._told(f"{when}: {task.name}")))
            self.watch.note(f"{when:7} {found[-1]}")
        return tuple(found)

    def _told(self, what: str) -> Told:
        return lambda done, of: self.watch.now(f"{what} {done}/{of}")

    def _trainer(self, surgeon: Surgeon, words: Any, task: AnyTask, dev: AnyTask | None,
                 checkpoints: Checkpoints) -> Trainer:
        model: Any = surgeon.model
        setting = self.setting
        lesson = lesson_of(model, words, task, setting)
        if lesson.cut:
            self.watch.note(f"{lesson.cut} of {len(task)} items are longer than {setting.length} tokens, and are cut "
                            "there")
        chosen: dict[str, Any] = {}
        when = {"strategy": "steps" if setting.every else "epoch", "steps": setting.every or 500}
        more = {f"save_{name}": value for name, value in when.items()} | {"save_total_limit": 2}
        watchers: list[TrainerCallback] = [Progress(self.watch)]
        if dev is not None:
            main = _CHOSEN_BY.get(dev.kind, "loss")
            more |= {f"eval_{name}": value for name, value in when.items()}
            more |= {"load_best_model_at_end": True, "metric_for_best_model": main, "greater_is_better":
                     main not in LOWER}
            chosen = {"kind": _Scored, "eval_dataset": [lesson.items[0]],
                      "score": lambda: scored(model, words, dev, setting.scoring, self._told("dev"))}
            watchers += [EarlyStoppingCallback(setting.patience)] if setting.patience else []
        optimiser = torch.optim.AdamW(groups(surgeon, model, setting))
        a_pass = -(-len(lesson.items) // (setting.batch * setting.accumulate))
        asked = arguments(str(checkpoints.folder), setting, logging_strategy="steps",
                          logging_steps=max(1, int((setting.steps or a_pass * setting.epochs) // _LOGS)), **more)
        return trainer_of(model, lesson, asked, callbacks=watchers, optimizers=(optimiser, None), **chosen)

    def _batches(self, surgeon: Surgeon) -> AbstractContextManager[None]:
        """The set-ups of like layers at once, where it is launches that they cost. That no adapter changes while a
        forward pass runs is known here, as it is not of a loop of a user's: the model was loaded for this training, the
        Trainer alone calls it, and callbacks and the optimiser run between passes. Of several processes each may hold
        a part, and what checkpoints is run again: there each layer makes its own."""
        if self.setting.checkpointing or not _launches_cost():
            return nullcontext()
        return batched_setups(surgeon.model, list(surgeon.adapters.values()), frugal=True)

    def _save(self, surgeon: Surgeon, task: AnyTask, state: Any, force: bool) -> None:
        with self.watch.busy(f"saving {self.folder}"):
            config: Any = surgeon.model.config
            headed = {"pad_token_id": config.pad_token_id} if isinstance(task, Task) else {}
            told = {"kind": task.kind, "classes": list(getattr(task, "classes", ())), **headed}
            files = {training_record.FILE: self.record(),
                     STATE: json.dumps({"log_history": state.log_history}, indent=1)}
            surgeon.save(self.folder, base_model=self.model, force=force, task=told, files=files,
                         self_contained=self.self_contained)


def groups(surgeon: Surgeon | None, model: Any, setting: Training) -> list[dict[str, Any]]:
    """What trains, as an optimiser's groups, a new head at a rate of its own; without a surgeon all of the model.
    Raises: SurgeryError (bad-value)."""
    named = {f"lr_{name}": rate for name, rate in setting.rates.items()}
    # without a surgeon as a surgeon gives what `train` names: decay to matrices alone
    trained = [{"params": [p for p in model.parameters() if (p.ndim > 1) is decays], "lr": setting.lr,
                "weight_decay": setting.weight_decay if decays else 0.0} for decays in (True, False)]
    found = surgeon.parameter_groups(setting.lr, setting.weight_decay, **named) if surgeon else trained
    tops = heads(model) if setting.head_lr is not None else []
    # of the model itself: what adapters share stands at its root too
    own = {name: surgeon.named_tensors()[name] for name in surgeon.plan.train} if surgeon else model.named_parameters()
    new = {id(p) for name, p in dict(own).items() if name.partition(".")[0] in tops}
    parted = [{**group, "params": [p for p in group["params"] if (id(p) in new) is is_new],
               **({"lr": setting.head_lr} if is_new else {})} for group in found for is_new in (False, True)]
    return [group for group in parted if group["params"]]


def _processes() -> Any:
    """The processes that train together: which one this is, and its device."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def _launches_cost() -> bool:
    """Whether this process trains alone, on a GPU."""
    from accelerate.utils import DistributedType

    processes = _processes()
    return processes.device.type == "cuda" and processes.distributed_type == DistributedType.NO


class _Scored(OrderedTrainer):
    """A Trainer that scores its model as `surgery eval` does."""

    def __init__(self, *arguments: Any, score: Callable[[], Evaluation], **more: Any):
        super().__init__(*arguments, **more)
        self.score = score

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        found = {f"eval_{name}": mean.value for name, mean in self.score().scores.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class Progress(TrainerCallback):
    """Tells of a training's steps, losses and scores."""

    def __init__(self, watch: Watch):
        self.watch, self.started, self.first = watch, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.started, self.first = monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.watch.now(f"{self._at(state)}  {self._time(state)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in (logs or {}):
            self.watch.note(f"{self._at(state)}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}  "
                            f"{self._time(state)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        found = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in (metrics or {}).items()
                          if name.startswith("eval_") and isinstance(value, float))
        self.watch.note(f"{self._at(state)}  {found}")

    def _at(self, state: Any) -> str:
        return f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"

    def _time(self, state: Any) -> str:
        each = (monotonic() - self.started) / max(1, state.global_step - self.first)
        left = int(each * (state.max_steps - state.global_step))
        return f"{each:.2f} s a step, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a training's checkpoints, with the record of what it was asked for."""

    folder: Path
    record: str

    @property
    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))

    def last(self, resume: bool, force: bool) -> Path | None:
        """The checkpoint to go on from; None to start anew. Raises: SurgeryError (bad-output) for a folder that holds
        something else, or a training that began otherwise."""
        found = self._found
        others = [p.name for p in self.folder.glob("*") if p not in found and p.name != training_record.FILE]
        if others:
            raise fail("bad-output", f"{self.folder} is for checkpoints, and holds {', '.join(sorted(others)[:5])}",
                       helps=("name another folder: -o",))
        if resume:
            self._refuse_other()
            whole = [path for path in found if (path / STATE).is_file()]
            return whole[-1] if whole else None
        if found and not force:
            raise fail("bad-output", f"{self.folder} holds checkpoints of an earlier run",
                       helps=("--resume goes on from the last one, --force starts anew; in Python, resume=True and "
                              "force=True",))
        return None

    def begin_anew(self) -> None:
        """Clear the folder for a training, and note there what it is asked for."""
        for path in self._found:
            shutil.rmtree(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(self.folder / training_record.FILE) as new:
            new.write_text(self.record, encoding="utf-8")

    def _refuse_other(self) -> None:
        """Raises: SurgeryError (bad-output) unless the checkpoints were made by what is asked for now."""
        try:
            before = (self.folder / training_record.FILE).read_text(encoding="utf-8")
            names = training_record.unequal(before, self.record)
        except OSError:
            raise fail("bad-output", f"there is no run to go on with: {self.folder} holds none") from None
        except ValueError as error:  # TOML's, and UTF-8's
            raise fail("bad-output", f"{self.folder / training_record.FILE} is not TOML any more: {error}",
                       helps=("--force starts anew; in Python, force=True",)) from None
        if names:
            raise fail("bad-output", f"the run in {self.folder} began with other settings: {', '.join(names)}",
                       helps=(f"what it began with is in {self.folder / training_record.FILE}",))
