"""What a causal language model is given of a task: tokens, and which of them are to be learned or scored.

Takes a tokenizer and items of a task; gives `input_ids` and `labels`, -100 at what is only read (a question, what the
user says). Promises: a text is tokenised once and as a whole; where a token reaches over the end of what is only read,
it is learned; a conversation is written by the tokenizer's chat template, and by a plain one where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from surgery.diagnostics import fail
from surgery.experiments.tasks import ASSISTANT, Choice, Conversation, Generative
from surgery.runtime.calibration import READ
from surgery.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Words

PROMPT = "Question: {question}\nAnswer:"
PLAIN = ("{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
         "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
         # without the space behind it, which is learned as a part of the answer's first token
         "{% if add_generation_prompt %}Assistant:{% endif %}")
Item = dict[str, list[int]]
Part = tuple[str, bool]  # a piece of a text, and whether it is learned


@dataclass(frozen=True)
class Encoded:
    """Items, and how many of them were longer than is kept."""

    items: tuple[Item, ...]
    cut: int


def learned(words: Words, task: Generative, length: int, prompt: str = PROMPT) -> Encoded:
    """What is learned of a task, at most `length` tokens an item: the right choice after its question, what the
    assistant says, every token of a text, which is parted where it is longer. What is cut off otherwise is the end."""
    if task.kind == "language":
        return Encoded(tuple(item for text in task.items for item in _blocks(words, text, length)), 0)
    if task.kind == "choice":
        whole = [marked(words, _answered(each, each.answer, prompt), True) for each in task.items]
    else:
        whole = [marked(words, *conversation(words, each)) for each in task.items]
    kept = [_cut(item, slice(length)) for item in whole]
    return Encoded(tuple(item for item in kept if any(label != READ for label in item["labels"][1:])),
                   sum(len(item["labels"]) > length for item in whole))


def choices(words: Words, task: Generative, length: int, prompt: str = PROMPT) -> Encoded:
    """Every choice of every question, each after its question; what is cut off is the start of the question.

    Raises: SurgeryError (bad-data) for a choice with no token before it, whose first token has no likelihood."""
    whole = [marked(words, _answered(each, place, prompt), True)
             for each in task.items for place in range(len(each.choices))]
    kept = tuple(_cut(item, slice(-length, None)) for item in whole)
    parts = sum(item["labels"][0] != READ for item in kept)
    if parts:  # a choice would be the likelier the less of it is counted
        raise fail("bad-data", f"{counted(parts, 'choice')} of {task.name} cannot be scored whole: nothing stands "
                   f"before the first of the {length} tokens that are kept",
                   helps=("keep more of each: --length; or say more before a choice: --prompt",))
    return Encoded(kept, sum(len(item["labels"]) > length for item in whole))


def _answered(item: Choice, place: int, prompt: str) -> list[Part]:
    return [(prompt.replace("{question}", item.question), False), (f" {item.choices[place]}", True)]


def _cut(item: Item, kept: slice) -> Item:
    return {name: values[kept] for name, values in item.items()}


def _blocks(words: Words, text: str, length: int) -> Iterable[Item]:
    """A text and its end as items of at most `length` tokens, of which the first is not predicted."""
    tokens = words(text)["input_ids"]
    if words.eos_token_id is not None and tokens[-1:] != [words.eos_token_id]:
        tokens = [*tokens, words.eos_token_id]
    blocks = (tokens[start : start + length] for start in range(0, len(tokens), length))
    return ({"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1)


# -------------------------------------------------------------------------------------------------- marked texts


def marked(words: Words, parts: Sequence[Part], special: bool) -> Item:
    """The tokens of a text that is given in parts, with labels where a part is learned. `special`: with the tokens that
    a text of this tokenizer begins with."""
    def tokens(text: str) -> list[int]:
        return words(text, add_special_tokens=special)["input_ids"]

    whole, text, start = tokens("".join(part for part, _ in parts)), "", 0
    labels = [READ] * len(whole)
    for number, (part, is_learned) in enumerate(parts, start=1):
        text += part
        end = len(whole) if number == len(parts) else max(start, _shared(tokens(text), whole))
        if is_learned:
            labels[start:end] = whole[start:end]
        start = end
    return {"input_ids": whole, "labels": labels}


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def conversation(words: Words, messages: Conversation) -> tuple[list[Part], bool]:
    """A conversation in parts, of which those of the assistant are learned, and whether special tokens are still to be
    added. Where a template changes what was said before, as those do that leave thoughts out, the last answer alone is
    learned. Raises: SurgeryError (bad-data) for what the template refuses."""
    turns = [i for i, message in enumerate(messages) if message.role == ASSISTANT]
    pieces = _pieces(words, messages, turns)
    if pieces is None:
        pieces = _pieces(words, messages, turns[-1:])
    if pieces is None:
        raise fail("bad-data", "the chat template of this model does not say where the assistant's answer begins",
                   helps=("`prompt` and `completion` as columns of plain text are learned without one",))
    return pieces, words.chat_template is None


def _pieces(words: Words, messages: Conversation, turns: Sequence[int]) -> list[Part] | None:
    """The text in parts that end where these turns begin and end; None where it does not run through them."""
    ends = [place for i in turns for place in (rendered(words, messages[:i], True), rendered(words, messages[: i + 1]))]
    ends.append(rendered(words, messages))
    if not all(later.startswith(earlier) for earlier, later in zip(ends, ends[1:])):
        return None
    starts = [0, *map(len, ends)]
    found = [(end[start:], number % 2 == 1) for number, (start, end) in enumerate(zip(starts, ends))]
    return [part for part in found if part[0]]


def rendered(words: Words, messages: Conversation, prompt: bool = False) -> str:
    """A conversation as text; `prompt`: up to where the assistant is to answer. Raises: SurgeryError (bad-data)."""
    said: Any = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(words.apply_chat_template(said, tokenize=False, add_generation_prompt=prompt,
                                             chat_template=None if words.chat_template else PLAIN))
    except Exception as error:  # a template is a program, and raises what it likes for roles that it does not know
        roles = ", ".join(message.role for message in messages)
        raise fail("bad-data", f"the chat template of this model refuses a conversation of {roles or 'nobody'}: "
                   f"{str(error) or type(error).__name__}") from error


def padding_token(words: Words) -> int:
    """The token behind, or in front of, a shorter text of a batch, which nothing sees; any where there is none."""
    return words.pad_token_id if isinstance(words.pad_token_id, int) else 0


def collated(items: Sequence[Item], pad: int) -> dict[str, torch.Tensor]:
    """Items as one batch, [items, tokens], with nothing to be seen or learned after the end of each. The first token is
    no label: nothing predicts it."""
    longest = max(len(item["input_ids"]) for item in items)
    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*item[name], *[value] * (longest - len(item[name]))] for item in items])

    there = torch.tensor([[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items])
    labels = padded("labels", READ)
    labels[:, 0] = READ
    return {"input_ids": padded("input_ids", pad), "attention_mask": there, "labels": labels}
