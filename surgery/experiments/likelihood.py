"""How likely a causal language model finds texts, and what it writes.

Takes a model and encoded items; gives log-likelihoods of the tokens that are labelled, or texts. Promises: in float64
sums over float32 log-softmaxes; what an item gives does not depend on the batch that it is in but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.experiments.prompts import Item, collated, padding_token
from surgery.runtime.calibration import READ

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Words

Told = Callable[[int, int], None]  # of items that are done, and of how many


@dataclass(frozen=True)
class Likelihood:
    """The sum of the log-likelihoods of `tokens` tokens."""

    total: float
    tokens: int


def by_length(lengths: Sequence[int], batch: int, told: Told) -> Iterator[list[int]]:
    """The places of items of like length, the longest first so that what does not fit in memory is seen at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
        told(min(start + batch, len(order)), len(order))


@torch.no_grad()
def likelihoods(model: Any, items: Sequence[Item], pad: int, batch: int,
                told: Told = lambda done, of: None) -> list[Likelihood]:
    """How likely the labelled tokens of each item are, given all before them. The model must be in evaluation mode."""
    found = [Likelihood(0.0, 0)] * len(items)
    for chosen in by_length([len(item["input_ids"]) for item in items], batch, told):
        given = {name: t.to(model.device) for name, t in collated([items[i] for i in chosen], pad).items()}
        labels = given.pop("labels")[:, 1:]
        logits = model(**given).logits[:, :-1]
        for place, row, wanted in zip(chosen, logits, labels):
            kept = wanted != READ
            values = row[kept].float().log_softmax(-1).gather(-1, wanted[kept, None])
            found[place] = Likelihood(float(values.double().sum()), int(kept.sum()))
    return found


@torch.no_grad()
def written(model: Any, words: Words, prompts: Sequence[str], special: bool, tokens: int, batch: int,
            told: Told = lambda done, of: None) -> list[str]:
    """What the model writes after each prompt, at most `tokens` tokens, always the likeliest, whatever penalties its
    own generation configuration names."""
    ids = [words(prompt, add_special_tokens=special)["input_ids"] for prompt in prompts]
    found = [""] * len(prompts)
    pad, ends = padding_token(words), _ends(model, words)
    for chosen in by_length(list(map(len, ids)), batch, told):
        longest = max(len(ids[i]) for i in chosen)  # a prompt ends where the answer begins: what is not there is before
        rows = [[pad] * (longest - len(ids[i])) + ids[i] for i in chosen]
        there = [[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chosen]
        with _no_preferences(model):
            made = model.generate(input_ids=torch.tensor(rows, device=model.device),
                                  attention_mask=torch.tensor(there, device=model.device), max_new_tokens=tokens,
                                  do_sample=False, pad_token_id=pad, eos_token_id=ends)
        for place, row in zip(chosen, made):
            found[place] = str(words.decode(row[longest:], skip_special_tokens=True))
    return found


@contextmanager
def _no_preferences(model: Any) -> Iterator[None]:
    """Inside, the model's own generation configuration (a repetition penalty, a least length, ...) asks for nothing."""
    from transformers import GenerationConfig

    said = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = said


def _ends(model: nn.Module, words: Words) -> list[int] | None:
    """The tokens that end an answer: those that the model's configuration says, and the tokenizer's."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(said if isinstance(said, list) else [said]), words.eos_token_id]
    return list(dict.fromkeys(each for each in found if each is not None)) or None
