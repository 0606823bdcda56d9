"""A model that reads text, small enough to be trained in a test: a BERT of two layers with a tokenizer of letters."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VOCABULARY = {token: i for i, token in enumerate(["[PAD]", "[UNK]", *"abcdefghij"])}


@cache
def words() -> PreTrainedTokenizerFast:
    """Tokens are letters between spaces."""
    letters = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]", unk_token="[UNK]")


def save_model(folder: Path) -> str:
    """The model with its tokenizer, as a pretrained one lies on the disk; gives the folder's name."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def texts(count: int, seed: int = 0) -> list[str]:
    """Letters at random, 3 to 8 of them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=draw).tolist()
    return [" ".join("abcdefghij"[i] for i in torch.randint(0, 10, (n,), generator=draw)) for n in lengths]
