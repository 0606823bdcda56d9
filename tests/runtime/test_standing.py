"""Every verb first looks whether what it operates on still stands in the model; moves of the model are followed."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from each import in_turns
from models import perturbed
from torch import nn

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import demo_inputs, load_demo

EMBEDDING = surgery.parse('spec e()\ntarget embedding "**" { add low_rank(rank = 2) }')
HEAD = surgery.parse('spec h()\ntarget linear "**.lm_head", "lm_head" untie { add low_rank(rank = 2) }')
EVERY = surgery.parse('spec all()\ntarget linear "**" untie { add low_rank(rank = 2) }')


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**demo_inputs(model), return_dict=True).values()))


def replace_a_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128, bias=False)


def cut_layers(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:2]


def take_layers_from_the_front(model: nn.Module) -> None:
    model.model.layers = model.model.layers[1:]


def lose_the_class(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = nn.Linear


def lose_an_adapter(model: nn.Module) -> None:
    del model.model.layers[0].mlp.up_proj.weight_surgery


CHANGES = {
    "an embedding resized": ("llama", EMBEDDING, lambda m: m.resize_token_embeddings(300), "300, 64"),
    "a head resized": ("gpt2", HEAD, lambda m: m.resize_token_embeddings(300), "`lm_head`|lm_head.weight"),
    "tied again": ("gpt2", HEAD, lambda m: m.tie_weights(), "is tied to `transformer.wte.weight`"),
    "T5 tied again": ("t5", EVERY, lambda m: m.tie_weights(), "`lm_head.weight` is tied to"),
    "a layer replaced": ("llama", "lora", replace_a_layer, "`model.layers.1.mlp.up_proj` is another module now"),
    "layers cut": ("llama", "lora", cut_layers, "there is no module `model.layers.2.self_attn.q_proj`"),
    "layers moved": ("llama", "lora", take_layers_from_the_front, "`model.layers.0.self_attn.q_proj` is another"),
    "no operated class": ("llama", "lora", lose_the_class, "`model.layers.0.mlp.up_proj` has lost its adapter"),
    "no adapter": ("llama", "lora", lose_an_adapter, "`model.layers.0.mlp.up_proj` has lost its adapter"),
    "a trained head replaced": (
        "bert", surgery.parse('spec h()\ntarget linear "**.query" { add low_rank(rank = 2) }\ntrain "classifier.**"'),
        lambda m: setattr(m, "classifier", nn.Linear(64, 3)), "`classifier` is another module now"),
    "experts replaced": ("mixtral", "lora", lambda m: setattr(m.model.layers[0].mlp, "experts", nn.Identity()),
                         "`model.layers.0.mlp.experts` is another module now"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("merged", [False, True])
def test_every_verb_says_what_does_not_stand_any_more(name, merged, tmp_path):
    family, spec, change, said = CHANGES[name]
    model = load_demo(family)
    surgeon = perturbed(model, spec)
    state = surgeon.state()
    if merged:
        surgeon.merge()
    change(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    verbs = {"state": surgeon.state, "report": surgeon.report, "save": lambda: surgeon.save(tmp_path / "out"),
             "remove": surgeon.remove, "disabled": lambda: surgeon.disabled().__enter__(),
             **({"unmerge": surgeon.unmerge} if merged else
                {"merge": surgeon.merge, "load": lambda: surgeon.load(state)})}
    for verb in verbs.values():
        with pytest.raises(SurgeryError, match=said) as error:
            verb()
        assert error.value.diagnostics[0].code == "changed-model" and error.value.diagnostics[0].helps
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert surgeon.merged == merged and not (tmp_path / "out").exists()
    surgeon.remove(partly=True)
    assert not any("_surgery" in key for key in model.state_dict())
    assert not any(hasattr(type(module), "base") for module in model.modules())
    surgery.apply(model, "lora") if family == "llama" and not isinstance(spec, surgery.Spec) else None


@pytest.mark.parametrize("size", [300, 200])
def test_a_forward_pass_of_a_resized_weight_says_that_it_was_resized(size):
    """It was said that a part of the weight were here, as under tensor parallelism."""
    model = load_demo("llama")
    perturbed(model, EMBEDDING)
    model.resize_token_embeddings(size)
    with pytest.raises(SurgeryError, match=rf"changed-model.*is \[{size}, 64\] now, and was \[256, 64\]"):
        logits(model)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("how", ["a step", "evaluation", "serving", "merge"])
def test_a_bias_that_comes_or_goes_is_told(how, has_bias):
    """A program that was made without one left it out, and merged it acted."""
    model, x = nn.Sequential(nn.Linear(8, 6, has_bias), nn.ReLU()).train(how == "a step"), torch.randn(3, 8)
    surgeon = perturbed(model, "lora")
    bias = None if has_bias else nn.Parameter(torch.ones(6))
    with torch.no_grad(), surgeon.serving() if how == "serving" else nullcontext():
        model(x)
        model(x)  # a call of one that serves is ready
        model[0].bias = bias
        with pytest.raises(SurgeryError, match="changed-model.*`0`.*" + ("no bias|lost its" if has_bias else "a bias")):
            surgeon.merge() if how == "merge" else model(x)
    surgeon.remove(partly=True)
    assert not any(name.endswith("_surgery") for name in model[0]._modules)


def test_what_still_stands_is_given_back_bit_for_bit():
    model, base = load_demo("llama"), load_demo("llama").state_dict()
    surgeon = perturbed(model, "lora")
    surgeon.merge()
    replace_a_layer(model)
    surgeon.remove(partly=True)
    now = model.state_dict()
    assert [key for key in base if not torch.equal(now[key], base[key])] == ["model.layers.1.mlp.up_proj.weight"]
    assert surgeon.remove() is model


def test_a_module_that_is_added_is_no_obstacle():
    model, base = load_demo("llama"), load_demo("llama")
    surgeon = perturbed(model, "lora")
    model.value_head = nn.Linear(64, 1)
    model.model.layers[0].mlp.register_parameter("gain", nn.Parameter(torch.ones(3)))
    model.value_head.weight.requires_grad_(False)
    surgeon.merge()
    surgeon.remove()
    assert not model.value_head.weight.requires_grad and model.value_head.bias.requires_grad
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.named_parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "value_head.weight")


def test_surgeries_look_too():
    model = load_demo("llama")
    surgeries = surgery.Surgeries(model)
    surgeries.add("a", "lora")
    surgeries.add("b", "lora")
    surgeries.use("a")
    replace_a_layer(model)
    for verb in (lambda: surgeries.use("b"), lambda: surgeries.use(), lambda: surgeries.add("c", "lora"),
                 surgeries.remove):
        with pytest.raises(SurgeryError, match="another module now"):
            verb()
        assert surgeries.active == ("a",) and surgeries.names == ("a", "b")
    surgeries.remove(partly=True)
    assert not any("_surgery" in key for key in model.state_dict())


def test_a_surgery_that_is_not_in_use_looks_when_it_is_used():
    surgeries = surgery.Surgeries(load_demo("llama"))
    surgeries.add("a", "lora")
    replace_a_layer(surgeries.model)
    with pytest.raises(SurgeryError, match="another module now"):
        surgeries.use("a")
    assert surgeries.surgeon is None and not any("_surgery" in key for key in surgeries.model.state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_a_strict_or_assigned_checkpoint_is_no_change(family):
    """What the model's own loading does to parameters is none of a surgery's business."""
    model = load_demo(family)
    surgeon = perturbed(model, "lora")
    y = logits(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.tie_weights()
    surgeon.state(), surgeon.report()
    assert torch.equal(logits(model), y)
    surgeon.merge()
    surgeon.unmerge()
    assert torch.equal(logits(model), y)


# ------------------------------------------------------------------------------------------------------------- moves


@in_turns(2)
@pytest.mark.parametrize("family, spec", [
    ("llama", "dora"), ("gpt2", HEAD), ("t5", EVERY), ("mixtral", "lora"),
    ("bert", surgery.parse('spec h()\ntarget linear "**.query" { add low_rank(rank = 2) }\ntrain "classifier.**"'))],
    ids=["llama", "gpt2", "t5", "mixtral", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("merged", [False, True])
def test_what_is_kept_follows_the_model_to_another_dtype(family, spec, dtype, merged):
    if family == "mixtral" and dtype == torch.float64:
        return  # its experts run in no dtype wider than float32
    model, base = load_demo(family), load_demo(family).to(dtype)
    before = logits(base)
    surgeon = perturbed(model, spec)
    if merged:
        surgeon.merge()
    model.to(dtype)
    with surgeon.disabled():
        assert torch.equal(logits(model), before)
    assert {t.dtype for t in surgeon.state().values() if t.is_floating_point()} == {dtype}
    if merged:
        surgeon.unmerge()
    surgeon.merge()
    with surgeon.disabled():
        assert torch.equal(logits(model), before)
    surgeon.remove()
    assert {p.dtype for p in model.parameters()} == {dtype} and torch.equal(logits(model), before)


def test_surgeries_follow_the_model_to_another_dtype():
    model = load_demo("bert")
    base = deepcopy(model).double()
    surgeries = surgery.Surgeries(model)
    surgeries.add("a", surgery.parse('spec h()\ntarget linear "**.query" { add low_rank(rank = 2) }\n'
                                     'train "classifier.**"'))
    surgeries.use("a")
    model.double()
    surgeries.use()
    assert torch.equal(logits(model), logits(base))
    surgeries.use("a")
    assert torch.equal(logits(model), logits(base)) and {p.dtype for p in model.parameters()} == {torch.float64}


# --------------------------------------------------------------------------------------------------- without numbers


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "resnet"])
def test_a_skeleton_is_planned_and_not_operated_on(family, tmp_path):
    with torch.device("meta"):
        skeleton = type(load_demo(family))(load_demo(family).config)
    spec = surgery.parse('spec a()\ntarget any untie { add low_rank(rank = 2) }')
    assert surgery.plan(skeleton, spec).placed
    surgery.apply(load_demo(family), spec).save(tmp_path / "saved")
    for verb in (lambda: surgery.apply(skeleton, spec), lambda: surgery.attach(skeleton, tmp_path / "saved"),
                 lambda: surgery.Surgeries(skeleton).add("a", spec)):
        with pytest.raises(SurgeryError, match="no numbers yet"):
            verb()
        assert not any("_surgery" in key for key in skeleton.state_dict())


def test_a_part_without_numbers_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    surgery.apply(model, surgery.parse('target linear "0" { add low_rank(rank = 2) }')).remove()
    for spec in ('target linear "*" { add low_rank(rank = 2) }',
                 'spec t()\ntarget linear "0" { add low_rank(rank = 2) }\ntrain "1.weight"'):
        with pytest.raises(SurgeryError, match="`1.weight`"):
            surgery.apply(model, surgery.parse(spec))


@pytest.mark.parametrize("copied", [deepcopy, lambda surgeon: pickle.loads(pickle.dumps(surgeon))])
@pytest.mark.parametrize("mode", ["operated", "merged"])
def test_a_copy_of_a_surgeon_operates_the_copy_of_its_model(mode, copied):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), torch.randn(3, 6)
    spec = surgery.parse("""update both() { shared(model) param A[2, in] ~ normal(std = 0.1) param B[out, 2] = 0
        return B @ A }
        target linear { add both() }
        train "1.bias" """)
    surgeon = perturbed(model, spec)
    y = model(x)
    if mode == "merged":
        surgeon.merge()
    other = copied(surgeon)
    for each in (other, surgeon):
        if mode == "merged":
            each.unmerge()
        assert torch.equal(each.model(x), y)
    other.load({name: t + 1 for name, t in other.state().items()})
    assert not torch.equal(other.model(x), y) and torch.equal(model(x), y)
    other.merge_and_remove()
    assert torch.equal(model(x), y) and not any("_surgery" in name for name in other.model.state_dict())


@pytest.mark.parametrize("given", [
    {"seed": -2**63 - 1}, {"seed": 2**64}, {"seed": 1.5}, {"seed": True}, {"dtype": torch.int8}, {"dtype": "float32"}])
def test_a_seed_or_a_dtype_that_cannot_be_is_refused_before_the_model_is_touched(given):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(SurgeryError, match="a seed is a whole number|parameters cannot be"):
        surgery.apply(model, "lora", **given)
    assert type(model[0]) is nn.Linear and [*model.state_dict()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("seed", [-2**63, 2**64 - 1])
def test_the_least_and_the_largest_seed_are_taken(seed):
    surgery.apply(nn.Sequential(nn.Linear(3, 3)), "lora", seed=seed)
