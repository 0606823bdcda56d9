"""Checkpoints of an operated model hold the adapter alone, resume exactly and are read by `attach`; what an optimiser
gets; a model that is merged for good is a plain one."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import logits, perturbed
from packed import Int8Linear
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.models.demo import demo_inputs, load_demo
from surgery.runtime.saved_format import REMADE

SMALL = "llama:num_hidden_layers=2,hidden_size=32,intermediate_size=64"
SPECS = ["lora", "unilora", "delora", "sora"]
TUNED = surgery.parse("""spec tuned(rank: int = 2)
target linear "**.q_proj" { add low_rank(rank) post magnitude() }
train "**.*norm.weight", "**.embed_tokens.weight" """)
UNTIED = surgery.parse('spec s\ntarget embedding "**.wte" untie { add low_rank(2) }')


def trainer(model: nn.Module, folder: Path, groups: list | None = None, **more) -> Trainer:
    draw = torch.Generator().manual_seed(3)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 256, (12, 6), generator=draw)]
    arguments = TrainingArguments(folder, per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=0.05,
                                  save_strategy="steps", report_to=[], use_cpu=True, logging_steps=1, seed=1,
                                  disable_tqdm=True, eval_steps=2, **more)
    optimiser = (torch.optim.AdamW(groups), None) if groups else (None, None)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], optimizers=optimiser)


@pytest.mark.parametrize("name", [*SPECS, "tuned"])
def test_a_trainer_checkpoints_the_adapter_alone_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    spec = TUNED if name == "tuned" else name
    model = load_demo(SMALL)
    surgeon = surgery.apply(model, spec, check=False)
    trainer(model, tmp_path / "a").train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    made = set(surgeon.made)  # which is not held, and is told by what stands in its place
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(surgeon.named_tensors()) - made | ({REMADE} if made else set())
    assert not (checkpoint / "config.json").exists()
    other = load_demo(SMALL)
    again = surgery.apply(other, spec, check=False, seed=0 if made else 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(other, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))
    resumed = again.state()
    assert all(torch.equal(t, resumed[n]) for n, t in surgeon.state().items() if t.is_floating_point())
    third = load_demo(SMALL)
    attached = surgery.attach(third, tmp_path / "a" / "checkpoint-4")
    assert torch.equal(logits(third), logits(model.eval())) and attached.spec == surgeon.spec


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    model = load_demo(SMALL)
    surgeon = surgery.apply(model, "unilora", check=False)
    run = trainer(model, tmp_path, load_best_model_at_end=True, eval_strategy="steps",
                  metric_for_best_model="eval_loss", greater_is_better=True)  # an early one is then the best
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(t, best[n]) for n, t in surgeon.state().items() if n not in surgeon.made)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_an_operated_model_saves_itself(way: str, tmp_path: Path) -> None:
    model = load_demo(SMALL)
    perturbed(model, "vera", check=False)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    other = deepcopy(model) if way == "deepcopy" else torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * p.requires_grad
    other.save_pretrained(tmp_path / "a")
    third = load_demo(SMALL)
    surgery.attach(third, tmp_path / "a")
    assert torch.equal(logits(third), logits(other)) and not torch.equal(logits(third), logits(model))


def test_what_is_merged_or_switched_off_is_saved_as_a_plain_model(tmp_path: Path) -> None:
    model = load_demo(SMALL)
    names, base = model.state_dict().keys(), logits(model)
    surgeon = perturbed(model, "vera", check=False)
    with surgeon.disabled():
        model.save_pretrained(tmp_path / "base")
    surgeon.merge()
    model.save_pretrained(tmp_path / "merged")
    for folder, wanted in (("base", base), ("merged", logits(model))):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert found.state_dict().keys() == names and torch.equal(logits(found), wanted)
    surgeon.unmerge()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # nothing that reads as a base with random weights
    with pytest.warns(UserWarning, match="start its weights at random"):
        model.save_pretrained(tmp_path / "base")


def test_a_save_that_would_lose_the_adapter_says_so(tmp_path: Path) -> None:
    model = load_demo(SMALL)
    surgeon = perturbed(model, "lora", check=False)
    base = {n: t for n, t in model.state_dict().items() if "surgery" not in n}
    with pytest.raises(surgery.SurgeryError, match="state_dict that was given lacks"):
        model.save_pretrained(tmp_path / "a", state_dict=base)
    with pytest.raises(surgery.SurgeryError, match="not pushed"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    surgeon.save(tmp_path / "b")
    with pytest.raises(surgery.SurgeryError, match=r"holds an adapter that save\(\) wrote"):
        model.save_pretrained(tmp_path / "b")
    surgeon.remove()
    surgeries = surgery.Surgeries(model)
    surgeries.add("one", "lora")
    surgeries.use("one")
    with pytest.raises(surgery.SurgeryError, match=r"surgeries.save\(name, folder\)"):
        model.save_pretrained(tmp_path / "a")
    surgeries.remove()
    assert type(model) is LlamaForCausalLM and not (tmp_path / "a").exists()


def test_the_model_within_an_operated_one_is_no_adapter_to_save(tmp_path: Path) -> None:
    model = load_demo(SMALL)
    kinds, names = [*map(type, model.modules())], model.model.state_dict().keys()
    surgeon = perturbed(model, "vera", check=False)
    for saved in (model.model, deepcopy(model).model):
        with pytest.raises(surgery.SurgeryError, match="a part of a LlamaForCausalLM that was operated on"):
            saved.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    surgeon.merge()
    model.model.save_pretrained(tmp_path / "merged")
    found = AutoModel.from_pretrained(tmp_path / "merged")
    ids = demo_inputs(model)["input_ids"]
    assert found.state_dict().keys() == names
    assert torch.equal(found(ids).last_hidden_state, model.model(ids).last_hidden_state)
    surgeon.unmerge()
    surgeon.remove()
    assert [*map(type, model.modules())] == kinds and not hasattr(model.model, "_surgery")


def test_the_trainer_takes_an_operated_quantised_model_as_it_takes_pefts(tmp_path: Path) -> None:
    model = load_demo(SMALL)
    for part in [m for layer in model.model.layers for m in (layer.self_attn, layer.mlp)]:
        for name, linear in [(n, m) for n, m in part.named_children() if isinstance(m, nn.Linear)]:
            part.add_module(name, Int8Linear.of(linear))
    model.is_quantized = True  # as transformers marks one that it loads so
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    surgeon = surgery.apply(model, "lora", check=False)
    trainer(model, tmp_path).train()
    assert all(t.abs().max() > 0 for n, t in surgeon.state().items() if n.endswith(".B"))
    other = surgery.attach(load_demo(SMALL), tmp_path / "checkpoint-4")
    loaded = other.state()
    assert all(torch.equal(t, loaded[n]) for n, t in surgeon.state().items())
    surgeon.remove()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)


def test_a_state_lacks_nothing_if_it_holds_the_adapter_alone() -> None:
    model = load_demo(SMALL)
    surgeon = perturbed(model, "vera", check=False)
    state = {n: t.clone() for n, t in surgeon.state().items()}
    found = model.load_state_dict({n: t + 1 for n, t in state.items()})
    assert found.missing_keys == [] == found.unexpected_keys
    now = surgeon.state()
    assert all(torch.equal(now[n], t + 1) for n, t in state.items())
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=first.rpartition(".")[2]):
        model.load_state_dict({n: t for n, t in state.items() if n != first})


# ------------------------------------------------------------------------------------------------------- optimisers


def test_groups_hold_each_parameter_once_and_spare_what_starts_elsewhere_than_0() -> None:
    model = load_demo(SMALL)
    surgeon = surgery.apply(model, TUNED, check=False)
    groups = surgeon.parameter_groups(lr=1e-3, lr_B=0.016, weight_decay=0.1)
    name_of = {id(p): n for n, p in model.named_parameters()}
    found = {name_of[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == {name_of[id(p)] for p in surgeon.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(found)
    wanted = {"A": (1e-3, 0.1), "B": (0.016, 0.1), "m": (1e-3, 0.0)}
    for name, given in found.items():
        if "surgery" in name:
            assert given == wanted[name.rpartition(".")[2]]
        else:
            assert given == (1e-3, 0.1 if "embed" in name else 0.0)


@pytest.mark.parametrize("name", ["pre_diag", "ia3", "delora", "vera", "pissa", "dora"])
def test_decay_alone_moves_no_gain_and_no_factor_of_w(name: str) -> None:
    model = load_demo(SMALL)
    surgeon = surgery.apply(model, name, check=False)
    before = logits(model)
    optimiser = torch.optim.AdamW(surgeon.parameter_groups(lr=0.1, weight_decay=0.5))
    for p in surgeon.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(5):
        optimiser.step()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_rate_of_no_parameter_is_an_error() -> None:
    surgeon = surgery.apply(load_demo(SMALL), "lora", check=False)
    for wrong in ({"lr_C": 1.0}, {"momentum": 0.9}):
        with pytest.raises(surgery.SurgeryError, match="lr_A, lr_B"):
            surgeon.parameter_groups(lr=1e-3, **wrong)
    for wrong in (-1e-3, float("inf"), float("nan")):
        with pytest.raises(surgery.SurgeryError, match="from 0 on"):
            surgeon.parameter_groups(lr=wrong)


# -------------------------------------------------------------------------------------------------- merged for good


@pytest.mark.parametrize("name", [*SPECS, "tuned", "merged already"])
def test_merged_and_removed_it_is_a_plain_model(name: str, tmp_path: Path) -> None:
    model = load_demo(SMALL)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    surgeon = perturbed(model, TUNED if name == "tuned" else name if name in SPECS else "lora", check=False)
    operated = logits(model)
    if name == "merged already":
        surgeon.merge()
    assert surgeon.merge_and_remove() is model
    assert list(model.state_dict()) == names and [p.requires_grad for p in model.parameters()] == flags
    assert type(model) is LlamaForCausalLM and all("surgery" not in type(m).__module__ for m in model.modules())
    torch.testing.assert_close(logits(model), operated, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert list(found.state_dict()) == names and torch.equal(logits(found), logits(model))
    with pytest.raises(surgery.SurgeryError, match="given back"):
        surgeon.merge()
    surgery.apply(model, "lora", check=False)


def test_what_was_untied_stays_apart(tmp_path: Path) -> None:
    model = load_demo("gpt2")
    perturbed(model, UNTIED).merge_and_remove()
    model.save_pretrained(tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(found), logits(model)) and not found.config.tie_word_embeddings


@pytest.mark.parametrize("number, why", [(float("nan"), "W' of .*q_proj is not finite"),
                                         (1e300, "does not fit bfloat16.*wider dtype")])
def test_a_merge_that_fails_removes_nothing(number: float, why: str) -> None:
    model = load_demo(SMALL).bfloat16()
    surgeon = perturbed(model, "lora", check=False, dtype=torch.float64)
    with torch.no_grad():
        next(surgeon.parameters()).fill_(number)
    before = list(model.state_dict())
    with pytest.raises(surgery.SurgeryError, match=f"(?s)merge-error.*{why}"):
        surgeon.merge_and_remove()
    assert list(model.state_dict()) == before and not surgeon.merged
