"""Models that read text, small enough to be trained in a test: a BERT of two layers with a tokenizer of letters, and a
Llama of one layer with one of bytes and pairs of them."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from forked import begin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = {token: i for i, token in enumerate(["[PAD]", "[UNK]", *"abcdefghij"])}


@cache
def words() -> PreTrainedTokenizerFast:
    """Tokens are letters between spaces."""
    letters = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]", unk_token="[UNK]")


def save_model(folder: Path, longest: int = 32) -> str:
    """The model with its tokenizer, as a pretrained one lies on the disk; gives the folder's name."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=longest, **sizes)).save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def texts(count: int, seed: int = 0) -> list[str]:
    """Letters at random, 3 to 8 of them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=draw).tolist()
    return [" ".join("abcdefghij"[i] for i in torch.randint(0, 10, (n,), generator=draw)) for n in lengths]


# ---------------------------------------------------------------------------------------------- a causal model


TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@cache
def pieces() -> PreTrainedTokenizerFast:
    """Tokens are bytes and a few pairs of them, so that any text can be read; a word takes the space before it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator(["Question: what is the answer of a question? Answer: the answer"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>",
                                   chat_template=TEMPLATE)


@cache
def causal() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, eos_token_id=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
                         bos_token_id=None, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save_causal(folder: Path) -> str:
    """The model with its tokenizer; gives the folder's name."""
    causal().save_pretrained(folder)
    pieces().save_pretrained(folder)
    return str(folder)


def questions(count: int, seed: int = 0) -> list[dict]:
    """Which choice is of `a` alone? Choices differ in length."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        choices = ["".join(draw.choices("bcdef gh", k=draw.randint(2, 9))).strip() or "b" for _ in range(3)]
        answer = draw.randrange(3)
        choices[answer] = "a" * draw.randint(2, 6)
        found.append({"question": "what is " + "".join(draw.choices("xyz ", k=draw.randint(0, 30))),
                      "choices": choices, "answer": answer})
    return found


# --------------------------------------------------------------------------------------------------- lost workers


@dataclass(frozen=True)
class Deadly:
    """Loads a model as `load` does, and ends the process that is the first to find this file, as a system without
    memory would."""

    load: Callable[[int], Any]
    once: Path

    def __call__(self, seed: int) -> Any:
        try:
            self.once.unlink()
        except FileNotFoundError:
            return self.load(seed)
        os.kill(os.getpid(), signal.SIGKILL)


class Forked:
    """What stands in for the `subprocess.Popen` of a worker: a copy of this process, in which all is imported already."""

    def __init__(self, words: list[str], *, stderr: IO[bytes], **how: Any):
        from surgery.experiments.comparison_workers import main

        (asked, self_asks), (self_reads, answers) = os.pipe(), os.pipe()
        self.pid = begin(main, asked, answers, stderr.fileno(), (self_asks, self_reads))
        os.close(asked), os.close(answers)
        self.stdin, self.stdout = os.fdopen(self_asks, "wb"), os.fdopen(self_reads, "rb")
        self.code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.close()
        self.wait()
