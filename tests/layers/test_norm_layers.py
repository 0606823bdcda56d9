"""`target norm`: the gains of a norm layer as a column [n, 1], and which modules are norm layers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diagnosed import errors_of
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import surgery
from surgery.layers.norm_probe import is_norm
from surgery.models.demo import load_demo

SPEC = """spec gains()

update more() {
  param g[out, in] = 0
  return g
}

update moved() on bias {
  param s[out] = 0
  return s
}

target norm "**.norm" {
  pre diagonal()
  add more()
  add moved()
}
"""


class Centred(nn.Module):
    """A norm that nobody calls one."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x / x.abs().amax(-1, keepdim=True)


class Scaled(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class OverTokens(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-2, keepdim=True)


class AllByOne(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.sum() * x / x.norm(dim=-1, keepdim=True)


class Fails(Centred):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this device")


NORMS = {"LayerNorm": lambda: nn.LayerNorm(6), "LayerNorm without bias": lambda: nn.LayerNorm(6, bias=False),
         "RMSNorm": lambda: nn.RMSNorm(6), "Llama": lambda: LlamaRMSNorm(6), "T5": lambda: T5LayerNorm(6),
         "Gemma 2, which scales by 1 + w": lambda: Gemma2RMSNorm(6), "another": lambda: Centred(6),
         "one feature less": lambda: nn.LayerNorm(2)}
OTHERS = {"linear": lambda: nn.Linear(6, 6), "PReLU": lambda: nn.PReLU(6), "batch": lambda: nn.BatchNorm1d(6),
          "groups": lambda: nn.GroupNorm(2, 6), "no gains": lambda: nn.LayerNorm(6, elementwise_affine=False),
          "two axes": lambda: nn.LayerNorm([3, 6]), "a scale": lambda: Scaled(6), "over tokens": lambda: OverTokens(6),
          "one gain": lambda: AllByOne(6), "fails": lambda: Fails(6), "a container": lambda: nn.Sequential(nn.LayerNorm(6)),
          "an embedding": lambda: nn.Embedding(6, 6)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*NORMS, *OTHERS])
def test_a_norm_layer_is_told_by_what_it_does(name: str, device: str) -> None:
    module = {**NORMS, **OTHERS}[name]()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    assert is_norm(deepcopy(module).to(device) if device == "meta" else module) is (name in NORMS)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


class Model(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def operated(name: str) -> tuple[Model, surgery.Surgeon, Model, Tensor]:
    torch.manual_seed(0)
    model, x = Model(NORMS[name]()).double(), torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        for p in model.norm.parameters():
            p += 0.3 * torch.randn_like(p)
    base = deepcopy(model)
    surgeon = surgery.apply(model, surgery.parse(SPEC), dtype=torch.float64, example=x)
    with torch.no_grad():
        for p in surgeon.parameters():
            p += 0.3 * torch.randn_like(p)
    return model, surgeon, base, x


ALIKE = [name for name in NORMS if name != "one feature less"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALIKE)
def test_values_and_gradients_are_those_of_the_gains_by_hand(name: str, training: bool) -> None:
    model, surgeon, base, x = operated(name)
    model.train(training)
    (adapter,) = surgeon.adapters.values()
    leaves = {k: t.detach().clone().requires_grad_() for k, t in adapter.values().items()}
    w, b = base.norm.get_parameter("weight").detach(), base.norm._parameters.get("bias")
    made = {"norm.weight": leaves["pre_diagonal.d"] * w + leaves["add_more.g"][:, 0]}
    if b is not None:
        made["norm.bias"] = b.detach() + leaves["add_moved.s"]
    wanted, y = torch.func.functional_call(base, made, (x,)), model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    for key, tensor in adapter.tensors().items():
        torch.testing.assert_close(tensor.grad, leaves[key].grad, rtol=1e-10, atol=1e-12)
    assert set(leaves) == {"pre_diagonal.d", "add_more.g"} | ({"add_moved.s"} if b is not None else set())


@pytest.mark.parametrize("name", ALIKE)
def test_merging_is_exact_and_saving_holds(name: str, tmp_path: Path) -> None:
    model, surgeon, base, x = operated(name)
    wanted = model(x)
    surgeon.save(tmp_path / "a")
    assert set(surgeon.merge().values()) <= {0.0}
    assert torch.equal(model(x), wanted) and model.norm.get_parameter("weight").shape == (6,)
    surgeon.unmerge()
    assert torch.equal(model(x), wanted)
    other = deepcopy(base)
    surgery.attach(other, tmp_path / "a")
    assert torch.equal(other(x), wanted)
    surgeon.remove()
    assert torch.equal(model(x), base(x)) and type(model.norm) is type(base.norm)


def test_any_kind_takes_no_norm_layer() -> None:
    model = Model(nn.LayerNorm(6))
    plan = surgery.plan(model, surgery.parse('target any "**" { add low_rank(2) }'))
    assert [p.site.name for p in plan.placed] == ["first", "last"]
    plan = surgery.plan(model, surgery.parse('target any "**" { add low_rank(2) } target norm { pre diagonal() }'))
    assert [(p.site.name, p.site.kind, p.site.out, p.site.in_) for p in plan.placed] == [
        ("first", "linear", 6, 5), ("norm", "norm", 6, 1), ("last", "linear", 4, 6)]


def test_a_plan_needs_no_numbers() -> None:
    model = nn.Module.to(load_demo("llama"), "meta")
    plan = surgery.plan(model, surgery.parse('target norm "**" { pre diagonal() }'))
    assert len(plan.placed) == 9 and plan.trainable == 9 * 64


def test_it_is_explained_and_what_is_none_is_told() -> None:
    model = Model(nn.LayerNorm(6))
    said = surgery.explain(model, surgery.parse(SPEC), "norm")
    assert said.startswith("`norm` (norm, 6 x 1)") and "is taken by" in said
    (fault,) = errors_of("", lambda _: surgery.plan(model, surgery.parse('target norm "**.first" { pre diagonal() }')))
    assert fault.code == "no-match" and "norm layer" in fault.message
    (fault,) = errors_of("", lambda _: surgery.plan(Model(nn.PReLU(6)), surgery.parse("target norm { pre diagonal() }")))
    assert fault.code == "no-match" and "has no norm layer" in fault.message


def test_dropout_of_a_gain_is_refused() -> None:
    text = SPEC.replace("add more()", "add more() dropout(10%)")
    (fault,) = errors_of("", lambda _: surgery.plan(Model(nn.LayerNorm(6)), surgery.parse(text)) and
                         surgery.apply(Model(nn.LayerNorm(6)), surgery.parse(text), check=False))
    assert fault.code == "unsupported-module" and "a gain has none" in fault.message


def test_check_tries_it_on_columns() -> None:
    assert surgery.check(surgery.parse(SPEC)) == []
    wrong = "update u() { param A[out, 2] = 0 return A } target norm { add u() }"
    assert [d.code for d in surgery.check(surgery.parse(wrong))][:1] == ["shape-mismatch"]
    started = "update u() { param g[out, in] = 1 return g } target norm { add u() }"
    assert [d.code for d in surgery.check(surgery.parse(started))] == ["not-identity"]


def test_on_a_model_it_is_proven() -> None:
    model = load_demo("bert")
    surgeon = surgery.apply(model, surgery.parse('target norm "**" { pre diagonal() with bias }'))
    assert str(surgeon.proof).startswith("the logits are unchanged")
    assert f"{len(surgeon.plan.placed)} of {len(surgeon.plan.placed)} adapters act" in str(surgeon.proof)
