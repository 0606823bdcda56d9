"""Every row of the table of PEFT's methods, from PEFT to here and back: the logits, the configuration, the bits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from each import in_turns
from layers import perturb
from peft_trips import Demo, adapted, apart, config_of, opened, saved, tensors_of
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, MixtralConfig, PreTrainedConfig

import surgery
from surgery.peft.import_module import WHOLE
from surgery.peft.table.method import Method
from surgery.peft.table.methods import METHODS

SAME = 2e-6
SIZES = ":hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"
LLAMA, BERT, RESNET = f"llama{SIZES},num_key_value_heads=1", f"bert{SIZES}", "resnet"
# Sizes that divide the sides of the demo models; a row that has none here is tried as PEFT has it by default.
CONFIGS: dict[str, dict[str, Any]] = {
    "vera": {"r": 5}, "randlora": {"r": 4, "randlora_alpha": 3}, "tinylora": {"r": 3, "u": 5},
    "unilora": {"r": 3, "theta_d_length": 20}, "vblora": {"r": 2, "num_vectors": 5, "vector_length": 16},
    "lokr, other sizes": {"r": 1, "decompose_factor": 4}, "lokr": {"r": 1}, "gralora": {"r": 4, "gralora_k": 2},
    "miss": {"r": 8}, "miss, cut": {"r": 5}, "miss_bat": {"r": 8}, "miss, mini": {"r": 8, "mini_r": 2},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 40, "random_loc_seed": 3}, "waveft": {"n_frequency": 40, "random_loc_seed": 3},
    "waveft without waves": {"n_frequency": 40}, "shira": {"r": 2}, "supertuning": {"sparsity": 0.9}, "psoft": {"r": 5},
    "coft": {"oft_block_size": 8, "r": 0, "eps": 6000.0}, "boft, one factor": {"boft_block_size": 4},
    "hra of odd rank": {"r": 3},
    **{name: {"oft_block_size": 8, "r": 0} for name in ("oft", "oft, Cayley-Neumann", "oft, one block for all")},
    **{f"road_{n}": {"group_size": 8} for n in (1, 2, 4)},
}
# PEFT computes a singular basis anew in each model, and not to the last bit.
LOOSE = {"pissa": 1e-5, "olora": 1e-5, "psoft": 1e-5, "tinylora": 1e-5}


def demo_and_modules(method: Method) -> tuple[str, list[str]]:
    """A demo model with modules that the row is on. Where there is no bias, rows that differ in what they do to it are
    one."""
    if "linear" in method.tensors:
        return BERT, ["query", "output.dense"]
    if WHOLE in method.tensors:
        return LLAMA, ["norm", "input_layernorm"]
    return (RESNET, ["convolution"]) if "convolution" in method.tensors else (LLAMA, ["embed_tokens"])


def full(method: Method, modules: list[str]) -> peft.PeftConfig:
    lists = {name: modules[-1:] if method.settings.get(name) else [] for name in method.family.lists}
    fields = {**CONFIGS.get(method.name, {}), **method.settings, **lists, "target_modules": modules}
    return getattr(peft, method.family.config_class)(**fields)


ROWS = [pytest.param(method, id=method.name) for method in METHODS if not method.needs_cuda]


@in_turns(2)
@pytest.mark.parametrize("method", ROWS)
def test_there_and_back(method: Method, tmp_path: Path) -> None:
    name, modules = demo_and_modules(method)
    demo, there, back = Demo(name), tmp_path / "there", tmp_path / "back"
    wanted = demo.from_peft(full(method, modules), there)
    surgeon = surgery.import_peft(model := demo.model(), there)
    assert apart(demo.says(model), wanted) <= SAME
    assert apart(wanted, demo.plain) > 100 * SAME

    found = surgery.export_peft(surgeon, back, like=config_of(there))
    assert (found.peft_type, found.rank) == (method.family.peft_type, None)
    assert apart(demo.says(opened(demo.model(), back)), wanted) <= LOOSE.get(method.name, 1e-7)
    before, after = tensors_of(there), tensors_of(back)
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert all(is_worked_out(key, method) for key in before.keys() - after.keys())
    assert {key: value for key, value in config_of(back).items() if config_of(there).get(key) != value} == {}


def is_worked_out(key: str, method: Method) -> bool:
    """Whether PEFT needs not be given a tensor: it works it out, or it is the model's own."""
    return key.endswith(method.derived) or key.endswith(".base_layer.weight")


_SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
              vocab_size=32, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
# How experts lie, and whether PEFT knows it.
EXPERTS: dict[str, tuple[PreTrainedConfig, list[str]]] = {
    "out x in": (MixtralConfig(**_SIZES), ["q_proj"]),
    "in x out": (GptOssConfig(**_SIZES), []),
    "in x out, which PEFT does not see": (Llama4TextConfig(**_SIZES | {"num_experts_per_tok": 1}, pad_token_id=0), ["q_proj"]),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(Demo):
    def __init__(self, config: PreTrainedConfig):
        self.config, self.inputs = config, {"input_ids": torch.arange(20).reshape(2, 10)}
        self.plain = self.says(self.model())

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config).eval()
            for parameter in model.parameters():  # Llama-4's class leaves its experts empty
                nn.init.normal_(parameter, std=0.2)
        return model


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_there_and_back(name: str, tmp_path: Path) -> None:
    (config, modules), there, back = EXPERTS[name], tmp_path / "there", tmp_path / "back"
    demo, router = Experts(config), ["mlp.gate.weight"] if name == "out x in" else []
    theirs = adapted(demo.model(), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, target_parameters=[*BOTH, *router],
        rank_pattern={r"layers\.1\..*experts.down_proj": 2, "gate.weight": 3}))
    wanted = demo.says(theirs)
    saved(theirs, there)
    surgeon = surgery.import_peft(model := demo.model(), there)
    assert apart(demo.says(model), wanted) <= SAME < 0.01 < apart(wanted, demo.plain)
    surgery.export_peft(surgeon, back, like=config_of(there))
    assert apart(demo.says(opened(demo.model(), back)), wanted) <= SAME
    before, after = tensors_of(there), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in after)


def test_a_single_expert_that_is_stored_turned_acts_here_and_is_refused_there(tmp_path: Path) -> None:
    """PEFT's own forward adds B A, [out, in], to it: an error, or where its sides are equal another update."""
    sides = {"hidden_size": 16, "intermediate_size": 8, "num_local_experts": 1, "num_experts_per_tok": 1}
    demo = Experts(GptOssConfig(**_SIZES | sides))
    surgeon = surgery.apply(demo.model(), surgery.load("sora").retarget("**.experts.*"), check=False)
    perturb(surgeon.model, 0.2)
    operated = demo.says(surgeon.model)
    with pytest.raises(surgery.SurgeryError, match="no update of the weight of `a single transposed expert`"):
        surgery.export_peft(surgeon, tmp_path / "ours", rank=2)
    surgeon.merge()
    assert apart(demo.says(surgeon.model), operated) <= SAME < apart(operated, demo.plain)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])  # 16 x 16
    theirs = saved(adapted(demo.model(), config), tmp_path / "theirs")
    with pytest.raises(surgery.SurgeryError, match="PEFT's LORA on a single transposed expert"):
        surgery.import_peft(demo.model(), theirs)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_a_spec_of_ours(name: str, tmp_path: Path) -> None:
    demo, out = Experts(EXPERTS[name][0]), tmp_path / "out"
    for text, rank in (("lora", None), ("add low_rank(2)\n  add low_rank(1, 3)", 3), ("post magnitude()", 4)):
        body = surgery.load(text).retarget("**.experts.down_proj") if text == "lora" else surgery.parse(
            f'target linear "**.experts.*", "**.q_proj" {{\n  {text}\n}}')
        surgeon = surgery.apply(demo.model(), body)
        perturb(surgeon.model, 0.2)
        with pytest.warns(UserWarning, match="takes no dropout") if text == "lora" else nullcontext():
            found = surgery.export_peft(surgeon, out, rank=4 if "magnitude" in text else None)
        assert config_of(out)["target_modules"] == ([] if text == "lora" else ["q_proj"])  # of None PEFT makes some
        assert (found.rank, found.exact) == (rank, "magnitude" not in text)
        error = apart(demo.says(opened(demo.model(), out)), demo.says(surgeon.model))
        assert error <= 1e-5 if found.exact else 1e-3 < error and max(found.errors.values()) > 0.1
