"""Training a model on a task with the HF Trainer, and what it then says.

Takes a model that gives what the task asks for, its tokenizer and a part of the task; trains the parameters that are
not frozen. Promises: the same seed on the same machine trains the same model; a loss is a mean over all that a step
learns, texts or tokens, in however many batches and processes they are; nothing is left on the disk; outputs do not
depend on the batch that a text is in but for rounding. Needs the extra `train`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from surgery.diagnostics import fail
from surgery.experiments.prompts import PROMPT, collated, learned, padding_token
from surgery.experiments.tasks import AnyTask
from surgery.experiments.text_tasks import Task
from surgery.experiments.timing import training_device
from surgery.extras import need
from surgery.language.json_fields import Pattern
from surgery.language.tree import Spec, Train
from surgery.runtime.apply import prepare
from surgery.runtime.calibration import READ
from surgery.runtime.surgeon import Surgeon

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # as transformers has them
EVALUATED = 64  # texts at a time where nothing is kept for a backward pass
MEASURED_ON = 8  # batches that give what starts name


@dataclass(frozen=True)
class Setting:
    """How to train: AdamW for so many epochs, or `steps` if they are given, of `batch` items (`accumulate` batches a
    step), of like length and in random order. The learning rate rises over `warmup` (a share of the steps; from 1 on,
    steps) and then falls to 0 as `schedule`, of `SCHEDULES`, says. `length` is the number of tokens
    kept of a text; `checkpointing` computes activations a second time and holds fewer of them; `bf16` computes in
    bfloat16 and keeps the parameters as they are; `prompt` stands before a choice."""

    lr: float = 1e-3
    epochs: float = 2
    batch: int = 32
    seed: int = 0
    length: int = 128
    steps: int | None = None
    accumulate: int = 1
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    checkpointing: bool = False
    bf16: bool = False
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        """Raises: SurgeryError (bad-value), for what nothing can be trained with."""
        for name, value in ((n, v) for n, v in vars(self).items() if isinstance(v, (int, float))):
            if not isfinite(value) or value < 0 or value == 0 and name not in _MAY_BE_0:
                raise fail("bad-value", f"`{name}` is a number {'from 0 on' if name in _MAY_BE_0 else 'above 0'}, and "
                           f"not {value}")
        if self.schedule not in SCHEDULES:
            raise fail("bad-value", f"there is no schedule `{self.schedule}`, but {', '.join(SCHEDULES)}")


_MAY_BE_0 = ("seed", "warmup", "weight_decay", "checkpointing", "bf16")


def heads(model: PreTrainedModel) -> list[str]:
    """The modules that stand beside the base model, and are new to it."""
    first = {name.partition(".")[0] for name, _ in model.named_parameters()}
    return sorted(first - {model.base_model_prefix}) if model.base_model is not model else []


def with_head(spec: Spec, model: PreTrainedModel) -> Spec:
    """The spec with `train "HEAD.**"` for each module that stands beside the base model: a new head must be trained."""
    asked = tuple(Train(patterns=(Pattern(f"{name}.**"),)) for name in heads(model))
    return spec.model_copy(update={"train": (*spec.train, *asked)})


def whole(spec: Spec, model: PreTrainedModel, task: AnyTask) -> Spec:
    """The spec with all that trains: a new head too, where the task puts one on the model."""
    return with_head(spec, model) if isinstance(task, Task) else spec


def operated(model: PreTrainedModel, spec: Spec, task: AnyTask, words: PreTrainedTokenizerBase, learned: AnyTask,
             setting: Setting) -> Surgeon:
    """Apply the spec to a model that is to learn a task; starts are measured on `learned`, a part of it or all. Raises:
    SurgeryError, as `apply`. The caller tells its warnings: once, and not for each run of a comparison."""
    surgeon = prepare(model, whole(spec, model, task), seed=setting.seed, **measured_on(model, words, learned, setting))
    surgeon.check_start()
    return surgeon.begin()


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: AnyTask, setting: Setting, *,
          optimiser: torch.optim.Optimizer | None = None, bar: bool = False,
          callbacks: Iterable[TrainerCallback] = ()) -> None:
    """Train what is not frozen, or what `optimiser` holds at its own rates, in place; the model ends in evaluation
    mode. Raises: SurgeryError (missing-extra; bad-data where no token is left to be learned)."""
    need("accelerate", "train", "training")
    lesson = lesson_of(model, tokenizer, part, setting)
    with TemporaryDirectory() as folder:  # the Trainer wants one, though it saves nothing here
        trainer = trainer_of(model, lesson, arguments(folder, setting, disable_tqdm=not bar),
                             callbacks=list(callbacks), optimizers=(optimiser, None))
        trainer.train()
    model.eval()


@dataclass(frozen=True)
class Lesson:
    """What a model is given of a task: encoded items, what makes a batch of some, and their loss. `cut` items were
    longer than is kept."""

    items: Sequence[Any]
    collator: Callable[[list[Any]], Any]
    cut: int = 0
    loss: Callable[..., torch.Tensor] | None = None  # as the Trainer has it; None: the model's own

    @property
    def blank(self) -> Any:
        """An item of which nothing is learned."""
        item = min(self.items, key=lambda item: len(item["input_ids"]))
        labels = item["labels"]
        if isinstance(labels, list):
            return {**item, "labels": [READ] * len(labels)}
        return {**item, "labels": READ if isinstance(labels, int) else float("nan")}

    def longest(self, batch: int) -> dict[str, torch.Tensor]:
        """The longest items as one batch: the most that a step can take."""
        return dict(self.collator(sorted(self.items, key=lambda item: -len(item["input_ids"]))[:batch]))


def lesson_of(model: PreTrainedModel, words: PreTrainedTokenizerBase, task: AnyTask, setting: Setting) -> Lesson:
    """What a model learns of a task. Raises: SurgeryError (bad-data) where no token of it is left to be learned."""
    if isinstance(task, Task):
        model.config.pad_token_id = words.pad_token_id
        return Lesson(encoded(task, words, setting.length), partial(padded, model, words),
                      longer(task, words, setting.length), _loss_of(model, task))
    found = learned(words, task, setting.length, setting.prompt)
    if not found.items:
        raise fail("bad-data", f"nothing of {task.name} is left to be learned in {setting.length} tokens",
                   helps=("keep more of each text: --length",))
    return Lesson(found.items, partial(collated, pad=padding_token(words)), found.cut, _loss_of(model, task))


def _loss_of(model: PreTrainedModel, task: AnyTask) -> Callable[..., torch.Tensor] | None:
    """The loss that a task is learned by; None for the model's own."""
    if isinstance(task, Task):
        return partial(headed_loss, bool(task.classes))
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return token_loss
    # how much the balance of routers counts, by its name in transformers
    weight = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", None))
    return None if weight is None else partial(routed_loss, weight)


def measured_on(model: PreTrainedModel, words: PreTrainedTokenizerBase, task: AnyTask, setting: Setting,
                **count: int) -> dict[str, Any]:
    """What `apply` measures starts on: batches of a task and the loss that it is learned by, which is not every model's
    own."""
    found, own = batches(model, words, task, setting, **count), _loss_of(model, task)
    if own is None:
        return {"data": found}

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return own(model(**{name: values for name, values in batch.items() if name != "labels"}), batch["labels"])

    return {"data": found, "loss": loss}


def batches(model: PreTrainedModel, words: PreTrainedTokenizerBase, task: AnyTask, setting: Setting,
            count: int = MEASURED_ON) -> Iterator[Any]:
    """Batches of a task, with labels, of items drawn at random, since a file may be sorted by them. Nothing is read
    before the first is asked for. Raises: SurgeryError (bad-data)."""
    lesson = lesson_of(model, words, task, setting)
    size, drawn = len(lesson.items), random.Random(setting.seed)
    places = drawn.sample(range(size), min(size, count * setting.batch))
    for start in range(0, len(places), setting.batch):
        yield lesson.collator([lesson.items[i] for i in places[start : start + setting.batch]])


def headed_loss(has_classes: bool, outputs: Any, labels: torch.Tensor,
                num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """The cross entropy, or squared error, of these texts as their part of the mean over the `num_items_in_batch` of a
    step. A model's own loss is a mean over one batch, whose sum over the batches of a step the Trainer takes."""
    logits, known = outputs["logits"].float(), _known(labels)
    count = known.sum() if num_items_in_batch is None else num_items_in_batch
    if has_classes:
        return cross_entropy(logits, labels, ignore_index=READ, reduction="sum") / count
    return (logits.squeeze(-1) - labels)[known].square().sum() / count


def _known(labels: torch.Tensor) -> torch.Tensor:
    """Which of the labels of texts with a head are learned: those of blank items are not."""
    return ~labels.isnan() if labels.is_floating_point() else labels != READ


def token_loss(outputs: Any, labels: torch.Tensor,
               num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """The cross entropy of these tokens [texts, tokens], each of those before it, as their part of the mean over the
    `num_items_in_batch` of a step. The own loss of some models (BART's decoder, CPM-Ant) is that of each token given
    itself, and a mean over one batch."""
    logits = outputs["logits"].float().flatten(0, 1)
    wanted = pad(labels, (0, 1), value=READ)[:, 1:].flatten().to(logits.device)
    count = (wanted != READ).sum() if num_items_in_batch is None else num_items_in_batch
    total = cross_entropy(logits, wanted, ignore_index=READ, reduction="sum")
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def routed_loss(weight: float, outputs: Any, labels: torch.Tensor,
                num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """`token_loss`, and how unevenly routers spread their tokens, times `weight`: of the batches of a step the mean, by
    their tokens. In a model's own loss it is the sum over the batches."""
    loss, uneven = token_loss(outputs, labels, num_items_in_batch), outputs.get("aux_loss")
    if uneven is None:
        return loss
    share = 1 if num_items_in_batch is None else (labels[:, 1:] != READ).sum() / num_items_in_batch
    return loss + weight * share * uneven.to(loss.device)


class Order(Sampler):
    """The order of items in each epoch: random, and of like length in a step of `size` items. `epoch` tells which one
    begins. It rests on the seed and the epoch alone: drawn from torch's own numbers, as the Trainer draws it, it would
    rest on how many of them dropout took before, which differs by method and is not there where a run goes on. `blanks`
    stand behind the items, in each epoch too."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int, epoch: Callable[[], int], blanks: int = 0):
        self.lengths, self.size, self.seed, self.epoch, self.blanks = list(lengths), size, seed, epoch, blanks

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch()):  # seeds that follow one another must not share orders
            torch.randperm(len(self.lengths), generator=draw)
        yield from get_length_grouped_indices(self.lengths, self.size, generator=draw)
        yield from range(len(self.lengths), len(self))


class OrderedTrainer(Trainer):
    """A Trainer whose steps learn the same items however many processes share them out, whatever else draws random
    numbers, and where a run goes on. The last of its items are `blanks`."""

    blanks = 0

    def _get_train_sampler(self, *arguments: Any, **more: Any) -> Any:
        # By itself it orders items by length for the batch of one process, of which there are several in a step.
        args, items = self.args, cast(Sequence[Any], self.train_dataset)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # an epoch begins where the last one ended, which is a whole number, or in its midst where a run goes on
        lengths = [len(item["input_ids"]) for item in items[: len(items) - self.blanks]]
        return Order(lengths, step, args.seed, lambda: int(self.state.epoch or 0), self.blanks)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # By itself it counts no label of -100, which a number to regress on may be.
        counted = [{"labels": torch.where(_known(each["labels"]), 0, READ)} if each["labels"].ndim == 1 else each
                   for each in batch_samples]
        return super()._get_num_items_in_batch(counted, device)


def trainer_of(model: PreTrainedModel, lesson: Lesson, arguments: Any, kind: Any = None, **more: Any) -> Any:
    """The Trainer of transformers, or another `kind` of it, that prints nothing by itself."""
    from transformers import PrinterCallback

    # Several processes have whole batches: what is missing of the last ones is filled with items that were learned
    # already, unless blank ones stand there.
    processes = arguments.world_size
    blanks = -len(lesson.items) % (arguments.train_batch_size * processes) if processes > 1 else 0
    items = [*lesson.items, *[lesson.blank] * blanks]
    trainer = (kind or OrderedTrainer)(model, arguments, train_dataset=items, data_collator=lesson.collator,
                                       compute_loss_func=lesson.loss, **more)
    trainer.blanks = blanks
    trainer.remove_callback(PrinterCallback)  # which prints on stdout, where results are
    return trainer


class OneDevice(TrainingArguments):
    """Arguments of a process that trains on one device. By itself the Trainer would have each of a machine's GPUs learn
    a batch in every step, and so learn other steps than the setting says."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def arguments(folder: str, setting: Setting, **more: Any) -> Any:
    """A setting as the Trainer has it; nothing is saved or reported unless `more` says so."""
    # Items of like length in a batch waste little on padding. Where no GPU is, pinned memory only warns.
    asked = {
        "learning_rate": setting.lr, "num_train_epochs": setting.epochs, "max_steps": setting.steps or -1,
        "per_device_train_batch_size": setting.batch, "gradient_accumulation_steps": setting.accumulate,
        "lr_scheduler_type": SCHEDULES[setting.schedule], "warmup_steps": setting.warmup,
        "weight_decay": setting.weight_decay, "bf16": setting.bf16, "seed": setting.seed,
        "use_cpu": training_device().type == "cpu", "train_sampling_strategy": "group_by_length",
        "save_strategy": "no", "report_to": "none", "logging_steps": 50, "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # which writes a loss of 0 where there is none
        "dataloader_pin_memory": torch.cuda.is_available()}
    if setting.checkpointing:  # which has another name from some version on
        name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        asked |= {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    return OneDevice(folder, **{**asked, **more})


def encoded(task: Task, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """What a model is given for each text: its tokens, at most `length`, and its label."""
    tokens = tokenizer(list(task.texts), list(task.seconds) or None, truncation=True, max_length=length)
    labels = [int(each) for each in task.labels] if task.classes else task.labels
    return [{**{key: values[i] for key, values in tokens.items()}, "labels": label} for i, label in enumerate(labels)]


def longer(task: Task, tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """How many texts have more tokens than are kept."""
    def tokens(texts: Sequence[str], seconds: Sequence[str], **how: Any) -> list[list[int]]:
        return tokenizer(list(texts), list(seconds) or None, **how)["input_ids"] if texts else []

    kept = tokens(task.texts, task.seconds, truncation=True, max_length=length)
    full = task.taken(i for i, each in enumerate(kept) if len(each) == length)
    return sum(len(each) > length for each in tokens(full.texts, full.seconds))


def padded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]]) -> Any:
    """Encoded texts as one batch. What fills it up stands behind a text, where it moves no position, whichever side the
    tokenizer was saved with; but for models that read the last place of a batch (XLNet)."""
    side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"
    return tokenizer.pad(list(items), return_tensors="pt", padding_side=side)


@contextmanager
def padding_known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside, the model takes for padding what the tokenizer pads with. (Some find the end of a text by it, and their
    own configuration may name another token.)"""
    said = model.config.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    try:
        yield
    finally:
        model.config.pad_token_id = said


@torch.no_grad()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task,
            length: int = Setting.length) -> np.ndarray:
    """What the model gives for each text, [texts, outputs]. The model must be in evaluation mode."""
    items = encoded(task, tokenizer, length)
    # By length, so that a batch has little padding; the outputs go back to the places of their texts.
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))
    logits = torch.empty(len(items), task.outputs)
    with padding_known(model, tokenizer):
        for start in range(0, len(order), EVALUATED):
            chosen = order[start : start + EVALUATED]
            tokens = [{k: v for k, v in items[i].items() if k != "labels"} for i in chosen]
            batch = padded(model, tokenizer, tokens).to(model.device)
            logits[chosen] = model(**batch).logits.float().cpu()
    return logits.numpy()
