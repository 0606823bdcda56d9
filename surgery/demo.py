"""Demo models: small random models of the common families, built on the spot, so that everything works offline.

Takes a name of `DEMOS`, gives a transformers config, a model in eval mode, or a batch for it. Promises: the same seed gives
the same weights and the same batch; the caller's random state is left as it was; at most a few megabytes; the sizes of the
inner layers are multiples of 32. GPT-2 and T5 tie their embeddings to their heads, as they usually do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.diagnostics import did_you_mean, fail

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


def demo_names() -> tuple[str, ...]:
    """The names of the demo models."""
    return tuple(DEMOS)


def demo_config(name: str) -> PreTrainedConfig:
    """The config of a demo model. Raises: SurgeryError (`unknown-model`)."""
    import transformers

    demo = _demo(name)
    return getattr(transformers, demo.config)(**demo.sizes, architectures=[demo.model], name_or_path=f"demo:{name}")


def load_demo(name: str, seed: int = 0) -> PreTrainedModel:
    """A demo model with random weights, in eval mode. Raises: SurgeryError (`unknown-model`)."""
    import torch

    config = demo_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _model_class(name)(config).eval()


def demo_inputs(model: PreTrainedModel | str, seed: int = 0) -> dict[str, Tensor]:
    """A tiny batch for a model, or for the demo of that name: the keyword arguments of its forward."""
    import torch

    config, main = ((demo_config(model), _model_class(model).main_input_name) if isinstance(model, str)
                    else (model.config, model.main_input_name))
    draw = torch.Generator().manual_seed(seed)
    if main == "pixel_values":
        size = getattr(config, "image_size", IMAGE)
        return {main: torch.randn(BATCH, config.num_channels, size, size, generator=draw)}
    names = ("input_ids", "decoder_input_ids")[: 1 + bool(config.is_encoder_decoder)]
    return {n: torch.randint(3, config.vocab_size, (BATCH, LENGTH), generator=draw) for n in names}


def _demo(name: str) -> Demo:
    if name in DEMOS:
        return DEMOS[name]
    near = did_you_mean(f"demo:{name}", [f"demo:{known}" for known in DEMOS])
    raise fail("unknown-model", f"no demo is called `{name}`", notes=(f"the demos are {', '.join(DEMOS)}",),
               helps=(near,) if near else ())


def _model_class(name: str) -> type[PreTrainedModel]:
    import transformers

    return getattr(transformers, _demo(name).model)
