"""Importing PEFT adapters: what their configurations can say of modules, and what is said of those that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import run
from peft_trips import Demo, apart, config_of, opened, tensors_of
from safetensors.torch import save_file

import surgery
from surgery.diagnostics import SurgeryError

SAME = 2e-6
# What PEFT saves and never reads.
SAVED_AGAIN = re.compile(r"base_layer\.weight$|\.(modules_to_save|original_module)\.")

CASES = {
    "patterns of rank and alpha, an embedding, norms saved": ("llama", peft.LoraConfig, {
        "r": 4, "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.[12]\.self_attn\.v_proj": 3},
        "modules_to_save": ["norm"]}),
    "all-linear, every bias": ("bert", peft.LoraConfig, {"r": 4, "target_modules": "all-linear", "bias": "all"}),
    "the operated modules' biases": ("bert", peft.LoraConfig, {
        "r": 4, "target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["pooler"]}),
    "every bias, and a module saved whole": ("bert", peft.LoraConfig, {
        "r": 4, "target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "rows that modules share": ("vit", peft.VeraConfig, {"r": 4, "target_modules": ["q_proj", "fc1"]}),
    "a text classifier's head": ("bert", peft.LoraConfig, {
        "r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "Conv1D and a tied embedding": ("gpt2", peft.LoraConfig, {
        "r": 4, "target_modules": ["c_attn", "wte"], "use_dora": True, "fan_in_fan_out": True}),
    "a regular expression": ("t5", peft.LoraConfig, {
        "r": 4, "target_modules": r".*block\.0\..*\.(q|wo)", "use_rslora": True}),
    "layers and exceptions": ("llama", peft.OFTConfig, {
        "oft_block_size": 8, "r": 0, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2, 3],
        "exclude_modules": ["layers.3.self_attn.q_proj"], "use_cayley_neumann": False}),
    "gains on inputs and on outputs": ("t5", peft.IA3Config, {
        "target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
    "two rows of one kind, which read different fields": ("bert", peft.LoKrConfig, {
        "r": 1, "target_modules": ["query", "key"], "rank_pattern": {"key": 40}}),
}


@pytest.mark.parametrize("demo, kind, fields", CASES.values(), ids=CASES)
def test_the_operated_model_says_what_pefts_does(demo: str, kind: type, fields: dict[str, Any], tmp_path: Path) -> None:
    demo, there = Demo(demo), tmp_path / "there"
    wanted = demo.from_peft(kind(**fields), there)
    surgeon = surgery.import_peft(model := demo.model(), there)
    assert apart(demo.says(model), wanted) <= SAME
    assert apart(wanted, demo.plain) > 100 * SAME

    surgeon.save(tmp_path / "saved")
    surgery.attach(again := demo.model(), tmp_path / "saved")
    assert torch.equal(demo.says(again), demo.says(model))

    surgery.export_peft(surgeon, tmp_path / "back", like=config_of(there))
    assert torch.equal(demo.says(opened(demo.model(), tmp_path / "back")), wanted)
    before, after = tensors_of(there), tensors_of(tmp_path / "back")
    assert after.keys() == {key for key in before if not SAVED_AGAIN.search(key)}
    assert all(torch.equal(after[key], before[key]) for key in after)


def test_bases_that_no_one_module_needs_whole(tmp_path: Path) -> None:
    demo, config = Demo("vit"), peft.RandLoraConfig(r=4, target_modules=["q_proj", "fc1", "fc2"])
    wanted = demo.from_peft(config, tmp_path / "there")
    surgery.export_peft(surgery.import_peft(demo.model(), tmp_path / "there"), tmp_path / "back")
    assert torch.equal(demo.says(opened(demo.model(), tmp_path / "back")), wanted)


def test_what_modules_share_is_large_enough(tmp_path: Path) -> None:
    Demo("llama").from_peft(peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "there")
    whole = tensors_of(tmp_path / "there")
    less = {name: t[:, :32].clone() if name.endswith("vera_A") else t for name, t in whole.items()}
    save_file(less, tmp_path / "there" / "adapter_model.safetensors")
    with pytest.raises(SurgeryError, match="of a size or a dtype that they cannot have"):
        surgery.import_peft(Demo("llama").model(), tmp_path / "there")


def test_a_seed_that_is_none(tmp_path: Path) -> None:
    config = peft.FourierFTConfig(n_frequency=8, target_modules=["q_proj"])
    Demo("llama").from_peft(config, tmp_path / "there")
    wrong = {**config_of(tmp_path / "there"), "random_loc_seed": "x"}
    (tmp_path / "there/adapter_config.json").write_text(json.dumps(wrong))
    with pytest.raises(SurgeryError, match="adapter_config.json says what cannot be: manual_seed"):
        surgery.import_peft(Demo("llama").model(), tmp_path / "there")


def test_alike_modules_share_a_target_and_layers_are_ranges(tmp_path: Path) -> None:
    demo, kind, fields = next(iter(CASES.values()))
    Demo(demo).from_peft(kind(**fields), tmp_path / "there")
    text = surgery.import_peft(Demo(demo).model(), tmp_path / "there").spec.to_surg()
    assert text.partition("\n")[2] == """spec lora(rank: int = 4, alpha: float = 8, dropout: float = 0.0)

target "model.embed_tokens", "model.layers.{0,3}.self_attn.v_proj", "model.layers.{1..3}.self_attn.q_proj" {
  add low_rank(rank, alpha) dropout(dropout)
}

target linear "model.layers.{1..2}.self_attn.v_proj" {
  add low_rank(rank, 3) dropout(dropout)
}

target linear "model.layers.0.self_attn.q_proj" {
  add low_rank(2, alpha) dropout(dropout)
}

train "model.layers.{0..3}.{input_layernorm,post_attention_layernorm}.weight", "model.norm.weight"
"""


# ----------------------------------------------------------------------------------------------------- what is wrong


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("peft") / "there"
    Demo("llama").from_peft(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), there)
    return there


def changed(lora: Path, folder: Path, config: dict[str, Any], tensors: Callable[[dict], dict] = lambda t: t) -> Path:
    """A copy of an adapter with other fields and tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(lora), **config}), encoding="utf-8")
    found = tensors(dict(tensors_of(lora)))
    save_file({key: t.clone() for key, t in found.items()}, folder / "adapter_model.safetensors")
    return folder


def put(name: str, tensor: torch.Tensor) -> Callable[[dict], dict]:
    """A tensor is added, or stands in the place of another."""
    return lambda tensors: {**tensors, name: tensor}


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS: list[tuple[dict[str, Any], Callable[[dict], dict], str]] = [
    ({"peft_type": "PREFIX_TUNING"}, dict, r"\[no-weight\]: prefix_tuning has no single W'"),
    ({"alora_invocation_tokens": [1]}, dict, r"\[no-weight\]: alora"),
    ({"peft_type": "LORAX"}, dict, r"\[unknown-method\].* LORAX does\n.*can be imported: .*LORA, "),
    ({"use_qalora": True}, dict, r"\[unknown-method\].* with use_qalora = True"),
    ({"turn_around": True}, dict, r"\[unknown-method\].* with turn_around = True"),
    ({"target_modules": ["q_porj"]}, dict, r"\[no-match\]: target_modules names no module(.|\n)*did you mean `q_proj`"),
    ({"target_modules": "q_(proj"}, dict, r"is no regular expression"),
    ({"target_modules": 3}, dict, r"has what cannot stand there as target_modules"),
    ({"target_modules": ["self_attn"]}, dict, r"\[unsupported-module\]"),
    ({"target_modules": ["k_proj"]}, dict, r"lacks 8 tensors(.|\n)*k_proj.lora_A.weight(.|\n)*holds 8 tensors"),
    ({"r": {}}, dict, r"has what cannot stand there as r$"),
    ({"r": "4"}, dict, r"has what cannot stand there as r$"),
    ({"peft_type": "MISS", "r": 0, "miss_dropout": 0.0}, dict, r"adapter_config.json says what cannot be: .* by zero"),
    ({"target_modules": [], "target_parameters": ["experts.up"]}, dict, r"\[no-match\].*no parameter: `experts.up`"),
    ({"target_parameters": ["norm.weight"]}, dict, r"\[unsupported-module\].*LlamaRMSNorm"),
    ({}, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()},
     r"is of dtype float8_e4m3fn, which no adapter"),
    ({}, lambda t: {k: v.int() for k, v in t.items()}, r"or a dtype that they cannot have(.|\n)*for `model.layers.0"),
    ({"r": 3}, dict, r"q_proj.lora_A.weight is \[2, 64\], and adapter_config.json asks for \[3, 64\]"),
    ({}, put(f"{Q}.lora_A.weight", torch.zeros(2, 7)), r"\[2, 7\], and adapter_config.json asks for \[2, 64\]"),
    ({}, lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
     r"lacks 1 tensor that adapter_config.json"),
    ({}, put(f"{Q}.lora_C", torch.zeros(2)), r"holds 1 tensor that adapter_config.json has no place for"),
    ({}, put("base_model.model.model.x", torch.zeros(2)), r"holds 1 tensor that this LlamaForCausalLM has no"),
    ({}, put("base_model.model.model.norm.weight", torch.zeros(2)), r"model.norm.weight is \[2\], and this Llama"),
    ({}, put(f"{Q}.base_layer.weight", torch.zeros(64, 64)), r"trained on another `model.layers.0.self_attn"),
    ({}, put("x", torch.zeros(2)), r"x does not begin with base_model"),
    ({}, put(f"{Q}.lora_A.weight", torch.full((2, 64), torch.nan)), r"lora_A.weight is not finite"),
]


@pytest.mark.parametrize("config, tensors, words", FAULTS, ids=[words for *_, words in FAULTS])
def test_an_adapter_that_does_not_fit(config: dict, tensors: Callable, words: str, lora: Path, tmp_path: Path) -> None:
    folder, model = changed(lora, tmp_path / "changed", config, tensors), Demo("llama").model()
    with pytest.raises(SurgeryError) as caught:
        surgery.import_peft(model, folder)
    assert re.search(words, str(caught.value)), caught.value
    surgery.apply(model, "lora")  # the model is as it was


def test_a_field_that_is_missing(lora: Path, tmp_path: Path) -> None:
    folder = changed(lora, tmp_path / "changed", {})
    config = {name: value for name, value in config_of(lora).items() if name != "lora_alpha"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SurgeryError, match="does not say lora_alpha"):
        surgery.import_peft(Demo("llama").model(), folder)


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("bomb"),)


PICKLES = {
    "code": ({"base_model.model.x": Bomb()}, "is no pickle of tensors alone"),
    "an object": (torch.nn.Linear(2, 2), "is no pickle of tensors alone"),
    "no table": ([torch.zeros(2)], "is no table of tensors by name"),
    "numbers as names": ({1: torch.zeros(2)}, "is no table of tensors by name"),
    "no tensor": ({"base_model.model.x": 3}, "no plain tensor: `base_model.model.x`"),
    "sparse": ({"base_model.model.x": torch.zeros(2, 2).to_sparse()}, "no plain tensor: `base_model.model.x`"),
    "more numbers than bytes": ({"base_model.model.x": torch.zeros(1).expand(1 << 40)}, "no plain tensor: `base_model.model"),
    "no numbers": ({"base_model.model.x": torch.zeros(2, device="meta")}, "no plain tensor: `base_model.model.x`"),
    "not finite": ({"base_model.model.x": torch.full((2,), torch.inf)}, "base_model.model.x is not finite"),
}


@pytest.mark.parametrize("held, words", PICKLES.values(), ids=PICKLES)
def test_of_a_pickle_tensors_alone_are_read(
        held: Any, words: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = changed(lora, tmp_path / "changed", {})
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    with pytest.raises(SurgeryError, match=words):
        surgery.import_peft(Demo("llama").model(), folder)
    assert not Path("bomb").exists()


@pytest.mark.parametrize("written", [b"", b"PK\x03\x04", b"a pickle"])
def test_bytes_that_are_no_pickle(written: bytes, lora: Path, tmp_path: Path) -> None:
    folder = changed(lora, tmp_path / "changed", {})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(written)
    with pytest.raises(SurgeryError, match="is no pickle of tensors alone"):
        surgery.import_peft(Demo("llama").model(), folder)


def test_a_folder_that_is_none_of_pefts(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="folders of their own: .*there"):
        surgery.import_peft(Demo("llama").model(), lora.parent)
    with pytest.raises(SurgeryError, match="is not a folder"):
        surgery.import_peft(Demo("llama").model(), tmp_path / "nowhere")


def test_a_configuration_that_no_parser_gets_through(lora: Path, tmp_path: Path) -> None:
    folder = changed(lora, tmp_path / "changed", {})
    (folder / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(SurgeryError, match="cannot read adapter_config.json"):
        surgery.import_peft(Demo("llama").model(), folder)


@pytest.mark.parametrize("ensure", [False, True])  # PEFT, told to keep them together, knows other names than these
def test_peft_parts_what_the_model_ties(ensure: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=ensure)
    Demo("gpt2").from_peft(config, tmp_path / "there")
    with pytest.raises(SurgeryError, match=r"tied-weight\]: the adapter has a `transformer.wte.weight` of its own"):
        surgery.import_peft(Demo("gpt2").model(), tmp_path / "there")


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("import", lora, "-o", out)
    assert result.exit_code == 0, result.output
    assert "LORA for demo:llama: 4 modules" in result.output and "surgery merge" in result.output
    surgery.attach(model := Demo("llama").model(), out)
    wanted = Demo("llama").says(opened(Demo("llama").model(), lora))
    assert apart(Demo("llama").says(model), wanted) <= SAME
    assert run("import", lora, "-o", out).exit_code == 2  # it is there already
    merged = run("merge", out, "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output


def test_the_command_as_json(lora: Path, tmp_path: Path) -> None:
    result = run("import", lora, "demo:llama", "-o", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert (found["peft_type"], found["model"], len(found["modules"])) == ("LORA", "demo:llama", 4)
    assert surgery.parse(found["text"]).name == "lora"


def test_a_dead_name_is_a_warning(lora: Path, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "query"], "alpha_pattern": {"quarry": 3}}
    folder = changed(lora, tmp_path / "changed", config)
    result = run("import", folder, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "warning[dead-name]: `query` of target_modules matches no module" in result.stderr
    assert "warning[dead-name]: `quarry` of alpha_pattern matches no module" in result.stderr


def test_an_adapter_without_a_model(lora: Path, tmp_path: Path) -> None:
    folder = changed(lora, tmp_path / "changed", {"base_model_name_or_path": None})
    result = run("import", folder, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "does not say which model it is for" in result.stderr


def test_peft_is_not_needed() -> None:
    sources = [path.read_text("utf-8") for path in Path(surgery.__file__).with_name("peft").rglob("*.py")]
    assert not [line for text in sources for line in text.splitlines() if re.match(r"\s*(import|from) peft\b", line)]
