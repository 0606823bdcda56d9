"""Fused experts that do not say by transformers' interface how they lie."""

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, Llama4TextConfig

from surgery.language.library import load
from surgery.layers.layouts import EXPERTS, TRANSPOSED_EXPERTS
from surgery.planning.compile import compile
from surgery.runtime.surgeon import apply

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "num_key_value_heads": 2}
CONFIGS = {
    "llama4": (Llama4TextConfig(**SIZES, num_attention_heads=4, head_dim=4, num_local_experts=3, num_experts_per_tok=1,
                                intermediate_size_mlp=24, interleave_moe_layer_step=1, pad_token_id=0),
               {"experts.gate_up_proj": (48, 16), "experts.down_proj": (16, 24)}, TRANSPOSED_EXPERTS),
    "jetmoe": (JetMoeConfig(**SIZES, kv_channels=4, num_local_experts=3, num_experts_per_tok=2),
               {"mlp.input_linear.weight": (48, 16), "mlp.output_linear.weight": (16, 24)}, EXPERTS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_of_an_own_class_are_stacks(name: str) -> None:
    config, shapes, layout = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # which the class leaves empty
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    spec = load("lora", rank=2).retarget(*(f"**.{ending}" for ending in shapes))
    planned = compile(model, spec)
    assert {(p.site.out, p.site.in_) for p in planned.placed} == {*shapes.values()} and len(planned.placed) == 4
    assert all((p.site.stack, p.site.layout) == (3, layout) for p in planned.placed)
    x = torch.arange(3, 23)[None]
    base = model(x).logits
    surgeon = apply(model, spec)
    torch.testing.assert_close(model(x).logits, base)
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter.normal_(std=0.1)
    operated = model(x).logits
    assert (operated - base).abs().max() > 1e-3
    operated.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgeon.parameters())
    surgeon.merge()
    torch.testing.assert_close(model(x).logits, operated, rtol=1e-4, atol=1e-5)
