"""A forward pass proves that an operation starts as the model was, that every adapter acts, and that merged it is the
same; everything is put back."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from interrupted import LORA, interrupted_everywhere, looks
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import demo_inputs, load_demo
from surgery.models.loading import load_with_head
from surgery.rewrite.prove_identity import starts_as_weight, starts_bit_for_bit

FAMILIES = ("llama", "bert", "gpt2", "t5", "mixtral", "vit", "resnet")


def spec_of(family: str) -> surgery.Spec:
    return surgery.parse(f'target {"conv" if family == "resnet" else "linear"} {{ add low_rank(rank = 2) }}')


def everything(model: nn.Module) -> list:
    return [(name, type(m), m.training) for name, m in model.named_modules()] + [
        (name, t.clone(), t.requires_grad, id(t)) for name, t in [*model.named_parameters(), *model.named_buffers()]]


def assert_same(found: list, wanted: list) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other)), one[0]


class Reads(nn.Module):
    """Its second layer's weight is read in a way of its own."""

    def __init__(self, read):
        super().__init__()
        self.first, self.second, self.last, self.read = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3), read

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), self.read(self.second))))


class Copied(Reads):
    """It remembers the weight that it had when it was made."""

    def __init__(self):
        super().__init__(lambda module: self.copy)
        self.copy = self.second.weight.detach().clone()


ALL = surgery.parse("target linear { add low_rank(rank = 2) }")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_demo_is_proven_and_left_as_it_was(family):
    model = load_demo(family).train(family != "resnet")
    surgeon = surgery.apply(model, spec_of(family), check=False)
    before, states = everything(model), (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    proof = surgeon.prove()
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert proof.adapters == len(surgeon.plan.placed) and not proof.silent and proof.merged < 1e-4
    assert all(p.grad is None for p in model.parameters())
    assert surgery.apply(load_demo(family), spec_of(family)).proof.start < 1e-5


@pytest.mark.parametrize("name, read", [
    ("the parameter itself", lambda module: module._parameters["weight"]),
    ("its data", lambda module: module._parameters["weight"].data)])
def test_a_weight_that_is_read_past_the_adapter_is_named(name, read):
    model = Reads(read).eval()
    before = looks(model)
    with pytest.raises(SurgeryError, match="second.weight") as error:
        surgery.apply(model, ALL, example=torch.randn(4, 5))
    assert error.value.diagnostics[0].code == "dead-adapter" and "first" not in str(error.value)
    assert looks(model) == before
    surgery.apply(model, ALL, example=torch.randn(4, 5), check=False).remove()
    exempt = surgery.parse('target linear except "second" { add low_rank(rank = 2) }')
    assert not surgery.apply(model, exempt, example=torch.randn(4, 5)).proof.silent


def test_a_weight_that_is_read_as_an_attribute_acts():
    proof = surgery.apply(Reads(lambda module: module.weight).eval(), ALL, example=torch.randn(4, 5)).proof
    assert not proof.silent and proof.merged < 1e-4


def test_a_weight_that_is_not_read_at_all_is_named():
    model = Copied().eval()
    with pytest.warns(surgery.SurgeryWarning, match="dead-adapter.*second") as told:
        surgeon = surgery.apply(model, ALL, example=torch.randn(4, 5))
    assert [Path(each.filename).name for each in told] == [Path(__file__).name]  # where it was asked for
    assert surgeon.proof.silent == ("second",) and surgeon.proof.adapters == 3
    assert [w.code for w in surgeon.plan.warnings] == ["dead-adapter"]
    assert "`second`" in surgeon.plan.warnings[0].message
    surgeon.remove()
    with pytest.raises(SurgeryError, match="dead-adapter"):
        surgery.apply(model, ALL, example=torch.randn(4, 5), strict=True)
    assert not any("_surgery" in name for name in model.state_dict())


def test_what_a_spec_probably_does_not_mean_is_told_and_may_be_made_an_error():
    stuck = surgery.parse("""update stuck() { param A[2, in] = 0 param B[out, 2] = 0 return B @ A }
        target linear { add stuck() }""")
    model = Copied().eval()
    for operate in (lambda: surgery.apply(model, stuck), lambda: surgery.Surgeries(model).add("a", stuck)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", surgery.SurgeryWarning)
            with pytest.raises(surgery.SurgeryWarning, match="never-trains"):
                operate()
        assert not any("_surgery" in name for name in model.state_dict())


@pytest.mark.parametrize("example", [torch.randn(4, 5), (torch.randn(4, 5),), {"x": torch.randn(4, 5)}])
def test_an_example_in_every_form(example):
    proof = surgery.apply(Reads(lambda module: module.weight if False else module(torch.eye(5)).mT).eval(), ALL,
                          example=example).proof
    assert proof.start is not None and proof.merged is not None and not proof.silent


def test_without_a_batch_it_says_so():
    surgeon = surgery.apply(nn.Sequential(nn.Linear(4, 4)), "lora")
    assert "no batch for a Sequential" in str(surgeon.proof) and surgeon.proof.start is None
    with pytest.raises(SurgeryError, match="no batch for a Sequential"):
        surgeon.prove()
    with pytest.raises(RuntimeError):
        surgeon.prove(torch.randn(2, 5))  # the model's own error
    assert surgeon.prove(torch.randn(2, 4)).adapters == 1


def test_a_large_model_is_not_run_backwards_unasked(monkeypatch):
    monkeypatch.setattr("surgery.runtime.proof.LARGEST", 10)
    surgeon = surgery.apply(load_demo("llama"), "lora")
    assert "too many to be run backwards unasked" in str(surgeon.proof) and surgeon.proof.start is not None
    assert surgeon.proof.merged is None and surgeon.prove().merged is not None


def test_batch_norm_and_dropout_are_left_alone():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 5)).train()
    x = torch.randn(8, 5)
    before, state = everything(model), torch.get_rng_state()
    surgery.apply(model, "lora", example=x).remove()
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_seed_is_given_to_devices_that_the_model_is_not_on(monkeypatch):
    """torch.manual_seed gives it to all of them, later where CUDA is not in use yet: a user's own seed would be lost."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device is seeded"))
    state = torch.get_rng_state()
    assert surgery.apply(load_demo("bert"), "lora").proof.merged is not None
    load_with_head("demo:bert", 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_leaves_everything_as_it_was():
    torch.manual_seed(0)
    x = torch.randn(4, 3)

    def make() -> surgery.Surgeon:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
        return surgery.apply(model, LORA, check=False)

    interrupted_everywhere(make, lambda surgeon: surgeon.prove(x), stride=11)


def test_layers_that_are_only_called_are_proven_without_a_merge():
    from packed import Int8Linear

    model = nn.Sequential(Int8Linear(6, 4), nn.Linear(4, 6)).eval()
    proof = surgery.apply(model, ALL, example=torch.randn(3, 6)).proof
    assert proof.adapters == 2 and not proof.silent and proof.merged is not None


@pytest.mark.parametrize("read", [
    lambda module: module.weight.float() * module.scale,
    lambda module: torch.mul(other=module.scale, input=module.weight),
    lambda module: module(torch.eye(5)).mT + 0 * torch.cat([module.weight, module.weight])[:5],
], ids=["alone", "by name", "beside a call"])
def test_what_a_layer_without_a_plain_weight_stores_is_not_read_past_its_adapter(read):
    """A packed weight is codes, and no W' can stand in its place."""
    from packed import Int8Linear

    model = Reads(read)
    model.second = Int8Linear(5, 5, bias=False)
    with pytest.raises(SurgeryError, match="second.weight") as error:
        surgery.apply(model.eval(), ALL, example=torch.randn(4, 5))
    assert error.value.diagnostics[0].code == "dead-adapter" and not any("_surgery" in n for n in model.state_dict())


def test_what_a_tensor_is_like_may_be_asked():
    from packed import Int8Linear

    def read(module: nn.Module) -> Tensor:
        assert module.weight.dtype == torch.int8 and module.weight.shape == torch.zeros_like(module.weight).shape
        return module(torch.eye(5)).to(module.scale).type_as(module.scale).mT

    model = Reads(read)
    model.second = Int8Linear(5, 5, bias=False)
    proof = surgery.apply(model.eval(), ALL, example=torch.randn(4, 5)).proof
    assert proof.adapters == 3 and not proof.silent


def test_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for family in ("llama", "bert"):
            proof = surgery.apply(load_demo(family).to(dtype), "dora").proof
            assert not proof.silent and proof.merged is not None


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_tokens_of_a_users_own(family):
    model = load_demo(family)
    assert surgery.apply(model, spec_of(family), example=demo_inputs(model, seed=3)).proof.merged is not None


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96))


@pytest.mark.parametrize("name", ["lora", "hira", "loha", "oft", "vera", "fourierft", "polar", "svf", "red"])
def test_a_start_that_follows_to_the_bit_is_one(name):
    """Where nothing is computed because the formula says so, W' would be W bit for bit."""
    surgeon = surgery.apply(one_layer(), surgery.load(name).retarget("**"), check=False)
    (placed,) = surgeon.plan.placed
    assert starts_bit_for_bit(placed.formula)
    weights = surgeon.adapters[placed.site.name].weights(placed.site.module)
    assert all(torch.equal(made, own) for made, own in zip(weights, placed.site.module.parameters()))


UP = 'update up() {{ param A[2, in] = {}  param B[out, 2] = 0  return B @ A }}\ntarget "**" {{ add up() }}'


def test_a_start_that_floating_point_may_miss_is_computed():
    """One that takes away what it has added, one whose tensor overflows in its dtype, and a W that is not finite."""
    taken = surgery.parse('update up() { frozen param F[out, in] ~ normal(0, 1)  param k = 1  return k * F - F }\n'
                          'target "**" { add up() }')
    (placed,) = surgery.plan(one_layer(), taken).placed
    assert starts_as_weight(placed.formula) and not starts_bit_for_bit(placed.formula)
    (placed,) = surgery.plan(one_layer(), surgery.parse(UP.format("7e4"))).placed
    assert starts_bit_for_bit(placed.formula)
    surgery.apply(one_layer(), surgery.parse(UP.format("7e4")), check=False)
    with pytest.raises(SurgeryError, match="not-identity.*not finite"):
        surgery.apply(one_layer(), surgery.parse(UP.format("7e4")), check=False, dtype=torch.float16)
    for broken in (torch.nan, torch.inf):
        model = one_layer()
        with torch.no_grad():
            model.get_parameter("0.weight")[3, 4] = broken
        with pytest.raises(SurgeryError, match="not-identity.*not finite"):
            surgery.apply(model, surgery.parse(UP.format("1")), check=False)
