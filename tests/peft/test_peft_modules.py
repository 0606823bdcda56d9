"""Which modules a configuration names: by our reading of PEFT's rules, and by PEFT itself."""

import warnings
from typing import Any

import peft
import pytest
from packed import Int4Linear
from peft.utils.other import ModulesToSaveWrapper

from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.layers.survey import Survey
from surgery.models.demo import load_demo
from surgery.peft.table.method import Family
from surgery.peft.target_modules import named, resolved, saved_whole
from surgery.runtime.apply import apply

CONFIGS = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.1.self_attn.o_proj"]}),
    ("llama", {"target_modules": r".*\.[13]\..*(up|down)_proj"}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj", "lm_head", "proj"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 2}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp", "norm"]}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["dense", "classifier"], "modules_to_save": ["classifier", "output.dense"]}),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("t5", {"target_modules": ["q", "wo", "shared"]}),
    ("t5", {"target_modules": ["q", "wi", "wo"], "layers_to_transform": [1], "layers_pattern": ["layer"]}),
]


@pytest.mark.parametrize("demo, fields", CONFIGS, ids=str)
def test_the_modules_are_those_that_peft_takes(demo: str, fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(load_demo(demo), peft.LoraConfig(r=2, **fields))
    inner, config = theirs.get_base_model(), peft.LoraConfig(r=2, **fields).to_dict()
    # a text classifier's head is saved whole unasked, as PEFT adds it to the configuration
    config["modules_to_save"] = theirs.peft_config["default"].modules_to_save
    assert named(config, load_demo(demo)) == theirs.base_model.targeted_module_names
    saved = [n for n, m in inner.named_modules(remove_duplicate=False) if isinstance(m, ModulesToSaveWrapper)]
    found = saved_whole(config["modules_to_save"], load_demo(demo))
    assert set(saved) == {name for name in found if not any(name.startswith(f"{n}.") for n in saved)}


def test_a_field_is_resolved_for_a_module() -> None:
    family = Family("X", "X", {}, ("feedforward_modules",), {"r": "rank_pattern", "alpha": "alpha_pattern"})
    config = {"r": 8, "alpha": 16, "rank_pattern": {"a.q": 2, r"layers\.\d.q": 3, "q": 4}, "alpha_pattern": {},
              "feedforward_modules": ["down"]}
    ranks = {name: resolved(config, family, name)["r"] for name in ("x.a.q", "layers.1.q", "q", "k", "ba.q")}
    assert ranks == {"x.a.q": 2, "layers.1.q": 3, "q": 4, "k": 8, "ba.q": 4}
    assert resolved(config, family, "q")["alpha"] == 16
    assert [resolved(config, family, name)["feedforward_modules"] for name in ("mlp.down", "mlp.up")] == [True, False]
    listed = {**config, "feedforward_modules": r".*\.up"}
    assert [resolved(listed, family, name)["feedforward_modules"] for name in ("mlp.down", "mlp.up")] == [False, True]


def test_what_is_no_regular_expression_is_said() -> None:
    with pytest.raises(SurgeryError, match="is no regular expression"):
        named({"target_modules": "*q_proj"}, load_demo("llama"))


def test_beside_a_layer_of_peft_all_can_be_operated_on_and_of_it_nothing() -> None:
    """Its merge reads plain weights and writes one: what a formula makes of either was left out without a word."""
    theirs = peft.get_peft_model(load_demo("llama:num_hidden_layers=1"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    survey, layer = Survey(theirs), "base_model.model.model.layers.0"
    linear = {site.name: site.is_head for site in survey.sites if site.kind == "linear"}
    assert linear == {f"{layer}.{name}_proj": False for name in (
        "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")} | {"base_model.model.lm_head": True}
    assert {r.name.rpartition("q_proj.")[2] for r in survey.refused if "PEFT" in r.reason} == {
        "base_layer", "lora_A.default", "lora_B.default"}


@pytest.mark.parametrize("config", [
    peft.LoraConfig(target_modules=["q_proj"]), peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), peft.OFTConfig(target_modules=["q_proj"]),
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    peft.LoraConfig(target_modules=["k_proj"], trainable_token_indices={"embed_tokens": [0]})], ids=lambda c: c.peft_type)
def test_an_operated_layer_takes_no_adapter_of_peft_before_it_is_merged(config: peft.PeftConfig) -> None:
    """Whose start and whose merge take the frozen weight for W'."""
    spec = parse('target linear "**.q_proj" { pre diagonal() }  target embedding { pre diagonal() }')
    surgeon = apply(load_demo("llama:num_hidden_layers=1"), spec, check=False)
    for put_in in (lambda: None, surgeon.merge):  # which unmerge() would take back, with PEFT's merge in it
        put_in()
        with pytest.raises(SurgeryError, match="PEFT was to put an adapter.*(layers.0.self_attn.q_proj|embed_tokens)`"):
            peft.get_peft_model(surgeon.model, config)
    surgeon.merge_and_remove()
    peft.get_peft_model(surgeon.model, config)


@pytest.mark.parametrize(("name", "config"), [
    ("llama", peft.LoraConfig(target_modules=["q_proj"])),
    ("mixtral", peft.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))])
def test_nor_does_one_that_is_called_or_a_stack_of_experts(name: str, config: peft.PeftConfig) -> None:
    model = load_demo(f"{name}:num_hidden_layers=1")
    layer = model.model.layers[0]
    if name == "llama":
        layer.self_attn.q_proj = Int4Linear(layer.self_attn.q_proj.in_features, layer.self_attn.q_proj.out_features)
    apply(model, parse('target linear "**.q_proj", "**.experts.*" { add low_rank(2) }'), check=False)
    with pytest.raises(SurgeryError, match=r"operated \w+ \(`model.layers.0.(self_attn.q_proj|mlp.experts)`\)"):
        peft.get_peft_model(model, config)
