"""Demo models: small random models of the common families, built on the spot, so that everything works offline.

Takes a name of `DEMOS`, gives a transformers config, a model in eval mode, or a batch for it. Promises: the same seed
gives the same weights and the same batch; the caller's random state is left as it was; at most a few megabytes unless
sizes are given (`llama:hidden_size=1024,num_hidden_layers=8`, any number of the family's config) or the name is one of
`LARGER`; the sizes of the inner layers are multiples of 32. GPT-2 and T5 tie their embeddings to their heads,
as they usually do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from surgery.diagnostics import did_you_mean, fail
from surgery.models.draws import same_draws

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 256
BATCH, LENGTH, IMAGE = 2, 12, 32


@dataclass(frozen=True)
class Demo:
    """One family: the names of its config and its model in transformers, and the sizes."""

    config: str
    model: str
    sizes: Mapping[str, Any]


_DECODER = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}

DEMOS: dict[str, Demo] = {
    "llama": Demo("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "bert": Demo("BertConfig", "BertForSequenceClassification",
                 {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 128}),
    "gpt2": Demo("GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": 2}),
    "t5": Demo("T5Config", "T5ForConditionalGeneration", {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0}),
    "mixtral": Demo("MixtralConfig", "MixtralForCausalLM", {
        **_DECODER, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "vit": Demo("ViTConfig", "ViTForImageClassification", {**_ENCODER, "image_size": IMAGE, "patch_size": 8}),
    "resnet": Demo("ResNetConfig", "ResNetForImageClassification", {
        "embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}),
}

# Large enough for a measured time to mean something: 52 million parameters.
LARGER = {"llama-bench": "llama:hidden_size=1024,intermediate_size=2816,num_hidden_layers=4,num_attention_heads=16,"
                         "num_key_value_heads=16,max_position_embeddings=4096"}


def demo_config(name: str) -> PreTrainedConfig:
    """The config of a demo model. Raises: SurgeryError (`unknown-model`)."""
    import transformers

    demo = _demo(name)
    return getattr(transformers, demo.config)(**demo.sizes, architectures=[demo.model], name_or_path=f"demo:{name}")


def load_demo(name: str, seed: int = 0) -> PreTrainedModel:
    """A demo model with random weights, in eval mode. Raises: SurgeryError (`unknown-model`)."""
    config = demo_config(name)
    with same_draws(seed):
        return _model_class(name)(config).eval()


def demo_inputs(model: PreTrainedModel | str, seed: int = 0, batch: int = BATCH,
                length: int = LENGTH) -> dict[str, Tensor]:
    """A batch for a model, or for the demo of that name: the keyword arguments of its forward (`length` tokens a
    row)."""
    import torch

    config, main = ((demo_config(model), _model_class(model).main_input_name) if isinstance(model, str)
                    else (model.config, model.main_input_name))
    draw = torch.Generator().manual_seed(seed)
    if main == "pixel_values":
        size = getattr(config, "image_size", IMAGE)
        return {main: torch.randn(batch, config.num_channels, size, size, generator=draw, device="cpu")}
    names = ("input_ids", "decoder_input_ids")[: 1 + bool(config.is_encoder_decoder)]
    # of images and texts the text's own configuration has it
    count = config.vocab_size if hasattr(config, "vocab_size") else config.get_text_config().vocab_size
    return {n: torch.randint(3, count, (batch, length), generator=draw, device="cpu") for n in names}


@cache  # to look whether a config has such sizes makes one
def _demo(name: str) -> Demo:
    """The demo of a name, with the sizes that stand behind it."""
    family, _, sizes = name.partition(":")
    if family in LARGER:
        return _sized(_demo(LARGER[family]), sizes)
    if family in DEMOS:
        return _sized(DEMOS[family], sizes)
    near = did_you_mean(f"demo:{family}", [f"demo:{known}" for known in (*DEMOS, *LARGER)])
    raise fail("unknown-model", f"no demo is called `{name}`", notes=(f"the demos are {', '.join((*DEMOS, *LARGER))}",),
               helps=(near,) if near else ())


def _sized(demo: Demo, text: str) -> Demo:
    """The demo with other sizes: `hidden_size=1024,num_hidden_layers=8`."""
    given: dict[str, int] = {}
    for size in text.split(",") if text else ():
        name, _, value = size.partition("=")
        if not value.isdecimal() or int(value) < 1:
            raise fail("unknown-model", f"`{size}` is not a size of a demo",
                       helps=("for example demo:llama:hidden_size=1024",))
        given[name] = int(value)
    if given:
        import transformers

        # a configuration takes whatever name it is given: a misspelt one would change nothing
        known = getattr(transformers, demo.config)(**demo.sizes)
        for name in given:
            if not isinstance(getattr(known, name, None), int):
                near = did_you_mean(name, [*demo.sizes, *(k for k, v in vars(known).items() if isinstance(v, int))])
                raise fail("unknown-model", f"{demo.config} has no size `{name}`", helps=(near,) if near else ())
    return replace(demo, sizes={**demo.sizes, **given})


def _model_class(name: str) -> type[PreTrainedModel]:
    import transformers

    return getattr(transformers, _demo(name).model)
