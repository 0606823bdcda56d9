"""What `surgery plan --batch` predicts of a training step, beside one that is measured."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from surgery.cli.main import main
from surgery.experiments.timing import peak_bytes
from surgery.experiments.training_memory import Training, training_memory
from surgery.language.library import load
from surgery.models.demo import demo_inputs
from surgery.runtime.apply import apply


def llama(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                       num_attention_heads=4, num_key_value_heads=2, vocab_size=vocabulary)


EXPERTS = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, num_experts_per_tok=2)


@pytest.mark.parametrize("spec, config, batch, length, checkpointing", [
    ("lora", llama(64, 3, 300), 2, 64, False),
    ("dora", llama(128, 2, 1000), 4, 32, False),
    ("sora", llama(64, 2, 100), 1, 256, True),
    ("lora", MixtralConfig(**EXPERTS, num_local_experts=4), 2, 128, False),
    ("sora", Qwen2MoeConfig(**EXPERTS, num_experts=8, moe_intermediate_size=48, shared_expert_intermediate_size=48),
     2, 128, False),
])
def test_a_step_takes_what_is_predicted(spec, config, batch, length, checkpointing):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    said = training_memory(skeleton, load(spec), Training(batch, length, checkpointing=checkpointing))
    model = AutoModelForCausalLM.from_config(config)
    if not isinstance(config, LlamaConfig):
        model.set_experts_implementation("grouped_mm")
    surgeon = apply(model, spec, check=False)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    inputs = demo_inputs(model, batch=batch, length=length)

    def step() -> None:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()

    step()  # compiles
    model.zero_grad()
    measured = peak_bytes(step, torch.device("cpu"))
    assert said["gradients"] + said["activations"] == pytest.approx(measured, rel=0.1)
    trained = sum(p.numel() for p in surgeon.parameters())
    assert (said["gradients"], said["optimiser"]) == (4 * trained, 8 * trained)
    assert said["adapter"] == sum(4 * t.numel() for t in {id(t): t for t in surgeon.named_tensors().values()}.values())


def plan(*arguments: str) -> dict:
    result = CliRunner().invoke(main, ["plan", "lora", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_devices_and_optimisers_change_what_is_held():
    asked = ["demo:llama", "--batch", "2", "--length", "16"]
    one, copied = plan(*asked)["step_bytes"], plan(*asked, "--gpus", "4", "--optimiser", "adamw-8bit")["step_bytes"]
    sharded = plan(*asked, "--gpus", "4", "--sharded", "--optimiser", "sgd")["step_bytes"]
    assert copied["gradients"] == 2 * one["gradients"] and 3.8 < one["optimiser"] / copied["optimiser"] < 4
    assert [one[part] - 4 * sharded[part] for part in ("base", "adapter", "gradients")] == [0, 0, 0]
    assert sharded["gathered layers"] and sharded["optimiser"] == 0
    assert one["activations"] == copied["activations"] == sharded["activations"]
    assert plan("demo:llama")["step_bytes"] is None


def test_a_classifier_has_no_tokens_for_labels_and_a_model_may_refuse_a_batch(tmp_path: Path):
    assert plan("demo:bert", "--batch", "2", "--length", "16")["step_bytes"]["activations"]
    config = llama(64, 2, 100)  # it scores a text by its last token, and says of none that it is padding
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path)
    said = CliRunner().invoke(main, ["plan", "lora", str(tmp_path), "--batch", "2"])
    assert said.exit_code == 0 and "is not known" in said.output and "no padding token" in said.output, said.output
    assert plan(str(tmp_path), "--batch", "1")["step_bytes"]["activations"]


@pytest.mark.parametrize("about, size", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5625),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.515869140625),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.51953125),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 16384),
    ({"quant_method": "of_another"}, 4),
])
def test_the_base_is_as_large_as_it_is_packed(tmp_path: Path, about: dict, size: float):
    config = llama(64, 2, 100)
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], about
    config.save_pretrained(tmp_path)
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    rest = 2 * 100 * 64 + 5 * 64  # the embedding, the head and the norms
    assert plan(str(tmp_path))["memory_bytes"]["base"] == pytest.approx(layers * size + 4 * rest, abs=1)
