"""Exporting surgeries: what becomes of those that PEFT has no method for, and of what is trained beside them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from command import run
from layers import perturb
from peft_trips import Demo, apart, config_of, opened, tensors_of
from torch import Tensor, nn

import surgery
from surgery.diagnostics import SurgeryError
from surgery.runtime.surgeon import Surgeon

SAME = 3e-6


def operated(demo: Demo, text: str) -> Surgeon:
    """A spec on a demo model, with all that it trains moved at random."""
    surgeon = surgery.apply(model := demo.model(), surgery.parse(text))
    perturb(model, 0.2)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in surgeon.plan.train:
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return surgeon


def through_peft(demo: Demo, surgeon: Surgeon, folder: Path, **more: object) -> tuple[surgery.Exported, float]:
    """What was written, and how far the logits of PEFT's model are off."""
    found = surgery.export_peft(surgeon, folder, **more)
    return found, apart(demo.says(opened(demo.model(), folder)), demo.says(surgeon.model))


TWO = "add low_rank(2, 3)\n  add low_rank(3, 1)"
EXACT = {
    "llama, low rank in two parts": ("llama", f'target linear "**.{{q,down}}_proj" {{\n  {TWO}\n}}', 5),
    "the outputs of low rank turned": ("llama", 'target linear "**.v_proj" {\n  post orthogonal(rank = 2)\n}', 4),
    "gpt2, stored transposed": ("gpt2", f'target linear "**.c_attn" {{\n  {TWO}\n}}', 5),
    "kernels": ("resnet", f'target conv "**.layer.1.convolution" {{\n  {TWO}\n}}', 5),
    "a tied embedding": ("gpt2", f'target embedding "**.wte" untie {{\n  {TWO}\n}}', 5),
    "a bias beside it": ("bert", f'target linear "**.query" {{\n  {TWO}\n  add shift(2)\n}}', 5),
}


@pytest.mark.parametrize("name, text, rank", EXACT.values(), ids=EXACT)
def test_an_update_of_low_rank_is_an_exact_lora(name: str, text: str, rank: int, tmp_path: Path) -> None:
    demo = Demo(name)
    surgeon = operated(demo, text)
    found, error = through_peft(demo, surgeon, tmp_path / "out")
    assert (found.peft_type, found.rank, found.exact) == ("LORA", rank, True)
    assert found.errors.keys() == surgeon.adapters.keys() and max(found.errors.values()) < 1e-6
    assert error <= SAME


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_of_an_adapter_in_another_dtype_is_made_as_the_model_makes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """The product was refused, and one of two parameters was rounded to bfloat16."""
    text = """update moved() on bias {
      param P[out, 3] ~ normal()
      param v[3] = 0
      return P @ v + ones(out, 3) @ v
    }
    target linear "**.query" { add moved() }"""
    surgeon = surgery.apply(model := Demo("bert").model(), surgery.parse(text), dtype=dtype)
    perturb(model, 0.2)
    surgery.export_peft(surgeon, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    for name, adapter in surgeon.adapters.items():
        wanted = adapter.weights(model.get_submodule(name))[1]
        (held,) = (t for key, t in tensors.items() if name in key and key.endswith("bias"))
        assert apart(held.double(), wanted.double()) < 1e-6


FULL = 'target linear "**.{q,v}_proj" {\n  pre  diagonal()\n  add  low_rank(2)\n  post orthogonal(rank = 2)\n}'


def test_a_full_update_needs_a_rank(tmp_path: Path) -> None:
    surgeon = operated(Demo("llama"), FULL)
    with pytest.raises(SurgeryError, match=r"no-peft-form\]: .*would need the rank 64 at(.|\n)*--rank K"):
        surgery.export_peft(surgeon, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_error_of_a_truncated_lora_is_that_of_the_best_one(tmp_path: Path) -> None:
    demo = Demo("llama")
    surgeon = operated(demo, FULL)
    found, error = through_peft(demo, surgeon, tmp_path / "out", rank=16)
    assert (found.rank, found.exact, error > 1e-3) == (16, False, True)
    base, tensors = demo.model(), tensors_of(tmp_path / "out")
    for name, adapter in surgeon.adapters.items():
        module = surgeon.model.get_submodule(name)
        delta = (adapter.weights(module)[0] - base.get_submodule(name).weight).detach().double()
        b, a = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        values = torch.linalg.svdvals(delta)
        assert float((delta - b @ a).norm() / delta.norm()) == pytest.approx(found.errors[name], rel=1e-3)
        assert found.errors[name] == pytest.approx(float(values[16:].norm() / values.norm()), rel=1e-3)


def test_a_rank_as_large_as_the_weight_leaves_nothing_out(tmp_path: Path) -> None:
    demo = Demo("llama")
    found, error = through_peft(demo, operated(demo, FULL), tmp_path / "out", rank=64)
    assert found.exact and error <= SAME


def test_any_method_can_be_written_as_a_lora(tmp_path: Path) -> None:
    demo = Demo("llama")
    surgeon = operated(demo, 'target linear "**.q_proj" {\n  add  low_rank(2)\n  post magnitude()\n}')
    assert through_peft(demo, surgeon, tmp_path / "own")[0].peft_type == "LORA"
    assert config_of(tmp_path / "own")["use_dora"] is True
    found, error = through_peft(demo, surgeon, tmp_path / "lora", rank=64)
    assert found.exact and "use_dora" not in config_of(tmp_path / "lora") and error <= SAME


def test_a_method_is_told_by_its_formula_and_not_by_its_parameters(tmp_path: Path) -> None:
    demo = Demo("llama")
    text = """spec mine(width: int = 2)
    target linear "**.q_proj" { add low_rank(width + 1, 2 * width) }
    target linear "**.layers.{0,-1}.**.v_proj" { add low_rank(alpha = 5, rank = 4) }"""
    found, error = through_peft(demo, operated(demo, text), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert found.rank is None and error <= SAME
    assert (config["r"], config["lora_alpha"]) == (3, 4)
    assert set(config["rank_pattern"].values()) == {4} and set(config["alpha_pattern"].values()) == {5}


def turned(model: nn.Module, names: str, dtype: torch.dtype = torch.float32) -> Surgeon:
    """PSOFT on some layers, what it trains moved."""
    surgeon = surgery.apply(model, surgery.load("psoft", rank=6).retarget(names), dtype=dtype)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter += (0.2 * torch.randn(parameter.shape, generator=draw)).to(dtype)
    return surgeon


def test_a_rotation_between_singular_vectors_is_written_for_those_that_peft_finds(tmp_path: Path) -> None:
    """PEFT decomposes W in float32 and saves none of it, we in float64: the signs of the vectors differ."""
    demo = Demo("llama")
    surgeon = turned(demo.model(), "**.{q,k,down}_proj")
    found, error = through_peft(demo, surgeon, tmp_path / "own")
    assert found.peft_type == "PSOFT" and error <= 1e-5 < 0.02 < apart(demo.says(surgeon.model), demo.plain)
    narrow = turned(demo.model(), "**.q_proj", torch.bfloat16)
    found, error = through_peft(demo, narrow, tmp_path / "narrow")
    assert found.peft_type == "PSOFT" and error <= torch.finfo(torch.bfloat16).eps / 4
    # of equal singular values the vectors are anyone's, and a rotation between ours is none between PEFT's
    base = surgeon.remove()
    with torch.no_grad():
        for layer in base.model.layers:
            nn.init.orthogonal_(layer.self_attn.q_proj.weight)
    demo.model = lambda: deepcopy(base)
    found, error = through_peft(demo, turned(demo.model(), "**.q_proj"), tmp_path / "lora")
    assert (found.peft_type, found.rank, found.exact) == ("LORA", 6, True) and error <= SAME


def test_a_surgery_that_does_nothing_is_no_adapter_of_pefts(tmp_path: Path) -> None:
    """PEFT refuses a configuration without modules."""
    with pytest.warns(surgery.SurgeryWarning, match="dead-name"):
        surgeon = surgery.apply(Demo("llama").model(), "bitfit")
    with pytest.raises(SurgeryError, match="no-peft-form.*trains nothing"):
        surgery.export_peft(surgeon, tmp_path / "out")


# -------------------------------------------------------------------------------------------------- trained beside it

QUERIES = 'target linear "**.query" {\n  add low_rank(2)\n}'
TRAINED = {
    "a norm and a head": ("bert", f'{QUERIES}\ntrain "**.LayerNorm.*", "classifier.*"'),
    "one parameter of a module": ("bert", f'{QUERIES}\ntrain "**.LayerNorm.weight"'),
    "biases": ("bert", f'{QUERIES}\ntrain "**.{{query,key}}.bias"'),
    "a tied embedding": ("gpt2", 'target linear "**.c_attn" {\n  add low_rank(2)\n}\ntrain "**.wte.weight"'),
    "an embedding with many names": ("t5", 'target linear "**.q" {\n  add low_rank(2)\n}\ntrain "shared.weight"'),
    "a token": ("vit", 'target linear "**.{query,q_proj}" {\n  add low_rank(2)\n}\ntrain "**.cls_token"'),
    "nothing else": ("bert", 'train "**.bias"'),
}


@pytest.mark.parametrize("name, text", TRAINED.values(), ids=TRAINED)
def test_what_is_trained_goes_along(name: str, text: str, tmp_path: Path) -> None:
    demo = Demo(name)
    found, error = through_peft(demo, operated(demo, text), tmp_path / "out")
    assert found.exact and error <= SAME


REFUSED = {
    "a stack's own bias": (
        "mixtral", 'target linear "**.experts.down_proj" {\n  add low_rank(2)\n}\ntrain "**.experts.gate_up_proj"',
        "it belongs to `model.layers.0.mlp.experts`, which is operated on"),
    "a bias that PEFT does not keep": (
        "bert", 'target linear "**.query" {\n  pre diagonal() with bias\n}\ntrain "**.query.bias"', "PEFT cannot save"),
    "what holds an operated module": (
        "vit", 'target conv "**.projection" {\n  add low_rank(2)\n}\ntrain "**.cls_token"', "PEFT would leave out"),
}


@pytest.mark.parametrize("name, text, words", REFUSED.values(), ids=REFUSED)
def test_what_has_no_form_in_peft_is_said(name: str, text: str, words: str, tmp_path: Path) -> None:
    surgeon = operated(Demo(name), text)
    with pytest.raises(SurgeryError, match=rf"\[no-peft-form\]: .*{words}"):
        surgery.export_peft(surgeon, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_update_that_is_not_finite(tmp_path: Path) -> None:
    surgeon = operated(Demo("llama"), EXACT["llama, low rank in two parts"][1])
    next(surgeon.parameters()).data[0] = torch.nan
    with pytest.raises(SurgeryError, match="is not finite"):
        surgery.export_peft(surgeon, tmp_path / "out")


def test_the_mode_of_the_model_does_not_count(tmp_path: Path) -> None:
    steps = "low_rank(2)\n  add low_rank(1)\n  add shift()"
    surgeon = operated(Demo("bert"), TRAINED["biases"][1].replace("low_rank(2)", steps))
    wanted = written(surgeon, tmp_path / "operated")
    with surgeon.disabled():
        assert same(written(surgeon, tmp_path / "base"), wanted)
    surgeon.merge()
    assert same(written(surgeon, tmp_path / "merged"), wanted)


def written(surgeon: Surgeon, folder: Path) -> dict[str, Tensor]:
    surgery.export_peft(surgeon, folder)
    return dict(tensors_of(folder))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("surgery") / "saved"
    operated(Demo("llama"), FULL).save(out, base_model="demo:llama")
    return out


def test_the_command_prints_the_error_of_each_module(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, "--to", "peft", "-o", tmp_path / "out", "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "LoRA of rank 4: of 8 modules only the nearest update of that rank" in result.output
    assert "model.layers.{0..3}.self_attn.q_proj" in result.output
    words = "export", folder, "--to", "peft", "-o", tmp_path / "out", "--rank", 64, "--force", "--json"
    found = json.loads(run(*words).stdout)
    assert (found["rank"], found["exact"], len(found["relative_errors"])) == (64, True, 8)


def test_the_command_says_that_a_rank_is_needed(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, "--to", "peft", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "error[no-peft-form]" in result.stderr
    assert run("export", folder, "-o", tmp_path / "out").exit_code == 2  # to whom?


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    surgeon = surgery.apply(Plain(), surgery.parse('target linear "layer" {\n  add low_rank(2)\n}'))
    perturb(surgeon.model)
    assert surgery.export_peft(surgeon, tmp_path / "out").rank is None
    back = surgery.import_peft(Plain(), tmp_path / "out")
    assert same(dict(back.state()), dict(surgeon.state()))
