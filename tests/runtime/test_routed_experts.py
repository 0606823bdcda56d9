"""Fused experts act on the tokens that are routed to them, and give what W' of all of them gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import gradients, perturb
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import surgery
from surgery import SurgeryError
from surgery.runtime import adapter, expert_maps
from surgery.runtime import operated as operated_module

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "out x in": lambda: MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=5)),
    "in x out": lambda: GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=12, num_local_experts=5))}
WAYS = ("eager", "batched_mm", "grouped_mm")
STEPS = {
    "low rank": "add low_rank(2)", "magnitude": "add low_rank(2) post magnitude()",
    "three steps": "pre diagonal() add low_rank(2) post orthogonal(rank = 2)",
    "rotation": "post orthogonal(rank = 2) on in", "each number": "add gate()", "noise": "add doubt()",
    "shared": "add tied()", "shared and turned": "add tied() post orthogonal(rank = 2)"}
HEAD = """update tied() {
  shared param S[2, in] ~ normal()
  param B[out, 2] = 0
  return B @ S
}
update gate() { param v[out, in] = 0 return v * W }
update doubt() { param D[out, in] = 0 noise m ~ bernoulli(0.5) return m * D }
"""


class Model(nn.Module):
    experts: Any

    def __init__(self, build: Callable[[], nn.Module]):
        super().__init__()
        self.experts = build()

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        return self.experts(x, experts, shares)


def operated(build: Callable[[], nn.Module], steps: str,
             dtype: torch.dtype = torch.float64) -> tuple[Model, surgery.Surgeon]:
    torch.manual_seed(0)
    model = Model(build)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.to(dtype).requires_grad_(False)
    surgeon = surgery.apply(model, surgery.parse(f'{HEAD} target linear "experts.*" {{ {steps} }}'), check=False)
    perturb(model, 0.2)
    return model.to(dtype), surgeon


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Seven tokens with two experts each; the fourth has none."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, 8, generator=draw, dtype=dtype).requires_grad_()
    experts = torch.tensor([[0, 2], [2, 4], [4, 0], [1, 2], [2, 0], [4, 1], [0, 1]])
    return x, experts, torch.rand(7, 2, generator=draw, dtype=dtype)


def results(model: Model, way: str) -> dict[str, Tensor]:
    model.experts.config._experts_implementation = way
    torch.manual_seed(3)
    x, *rest = tokens()
    y = model(x, *rest)
    leaves = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return {"y": y.detach(), **gradients(y, direction, leaves)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", BUILDS)
def test_values_and_gradients_are_those_of_the_whole_weight(name, steps, training, monkeypatch):
    model, _ = operated(BUILDS[name], STEPS[steps])
    model.train(training)
    with monkeypatch.context() as patch:
        patch.setattr(operated_module, "runs_by_torch", lambda module: False)
        wanted = results(model, "eager")
    assert any(g.abs().max() > 0 for key, g in wanted.items() if "surgery" in key)
    monkeypatch.setattr(adapter.Adapter, "substitutes", None)  # W' of all is not made
    for way in WAYS:  # in float64, which torch's own grouped product does not know
        for key, value in results(model, way).items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9, msg=lambda m: f"{way} {key}: {m}")


@pytest.mark.parametrize("steps", ["low rank", "magnitude", "shared"])
def test_each_choice_of_what_takes_a_gradient(steps):
    model, _ = operated(BUILDS["out x in"], STEPS[steps])
    model.experts.config._experts_implementation = "grouped_mm"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, *rest = tokens()
    direction = torch.randn(7, 8, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    leaves = {"x": x, **trained}
    wanted = gradients(model(x, *rest), direction, leaves)
    for chosen, leaf in leaves.items():
        for each in leaves.values():
            each.requires_grad_(each is leaf)
        found = gradients(model(x, *rest), direction, {chosen: leaf})
        torch.testing.assert_close(found, {key: wanted[key] for key in found}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_no_other_expert_than_those_with_tokens_is_set_up(way, monkeypatch):
    model, _ = operated(BUILDS["out x in"], STEPS["three steps"])
    model.experts.config._experts_implementation, ran = way, set()
    single, many = adapter.Adapter.run, adapter.Adapter.set_ups
    monkeypatch.setattr(adapter.Adapter, "run", lambda self, *a: (ran.add(a[-1]), single(self, *a))[1])
    monkeypatch.setattr(adapter.Adapter, "set_ups", lambda self, *a: (ran.update(a[-1]), many(self, *a))[1])
    model(*tokens())
    assert ran == {0, 1, 2, 4}


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_kept_while_serving_is_of_each_expert(name):
    for steps in ("three steps", "low rank", "magnitude"):
        model, surgeon = operated(BUILDS[name], STEPS[steps])
        model.eval()
        x, experts, shares = tokens()
        with torch.no_grad():
            wanted = model(x, experts, shares)
            with surgeon.serving():
                for at in (slice(0, 2), slice(2, 7), slice(0, 7)):  # each with experts that are new
                    torch.testing.assert_close(model(x[at], experts[at], shares[at]), wanted[at], rtol=1e-9, atol=1e-9)
        with pytest.raises(SurgeryError, match="changed-tensor"), torch.no_grad(), surgeon.serving():
            model(x, experts, shares)
            next(iter(surgeon.parameters())).data[4] += 1


class Own(nn.Module):
    """Experts with a forward that also does what no expert alone can answer."""

    num_experts, is_transposed, has_bias = 3, False, False

    def __init__(self) -> None:
        super().__init__()
        self.config = MixtralConfig()
        self.config._experts_implementation = "eager"
        self.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        one = nn.functional.linear(x, self.up[1], bias=torch.ones(6, dtype=x.dtype)) + x @ self.up[-1].T
        batch = x.expand(3, -1, -1)
        each = (self.up @ batch.mT).mT + torch.bmm(batch, self.up.mT) + torch.matmul(x, self.up.transpose(1, 2))
        assert self.up.shape == (3, 6, 8) and self.up[experts % 3].shape == (7, 2, 6, 8)
        assert self.up.requires_grad == torch.is_grad_enabled() and self.up[experts[:, 0] % 3].dtype == x.dtype
        rest = torch.einsum("eoi,ti->to", self.up, x) + self.up[0, :, :1].sum() + x @ self.up[1:].mean(0).T
        if not torch.is_grad_enabled():
            self.up.mul_(2)  # W' is then this one
        return one + each.sum(0) + rest + self.up[2] @ x[0] + nn.functional.linear(x, self.up[0])


def test_any_other_use_of_the_weight_is_answered_by_the_whole(monkeypatch):
    model, _ = operated(Own, STEPS["magnitude"])
    with monkeypatch.context() as patch:
        patch.setattr(operated_module, "runs_by_torch", lambda module: False)
        wanted, before = results(model, "eager"), model.experts.get_parameter("up").clone()
        with torch.no_grad():
            wanted["written"] = model(*tokens())
    found = results(model, "eager")
    with torch.no_grad():
        found["written"] = model(*tokens())
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)
    assert torch.equal(model.experts.get_parameter("up"), before)


def test_a_forward_that_may_run_kernels_gets_the_weight_itself(monkeypatch):
    model, _ = operated(BUILDS["out x in"], STEPS["low rank"])
    monkeypatch.setattr(operated_module, "routed_weight", None)
    model.experts.config._experts_implementation = "sonicmoe"
    found = operated_module._in_place(model.experts.get_submodule("gate_up_proj_surgery"), model.experts)
    assert type(found["gate_up_proj"]) is Tensor
    model.experts.config._experts_implementation = "eager"
    replaced = copy.deepcopy(model)
    replaced.experts.forward = lambda x, *rest: x @ replaced.experts.gate_up_proj.sum((0, 1))
    assert replaced(*tokens()).shape == (7,)


def test_dropout_drops_entries_of_the_tokens():
    model, _ = operated(BUILDS["out x in"], "add low_rank(2) dropout(0.5)")
    torch.manual_seed(0)
    one, two = (model.train()(*tokens()) for _ in range(2))
    assert not torch.equal(one, two) and torch.equal(model.eval()(*tokens()), model(*tokens()))


def test_autocast_gives_what_it_gives_to_the_whole_weight(monkeypatch):
    model, _ = operated(BUILDS["out x in"], STEPS["three steps"], torch.float32)
    for way in WAYS:
        model.experts.config._experts_implementation = way
        with torch.autocast("cpu", torch.bfloat16):
            x, experts, shares = tokens(torch.float32)
            found = model(x, experts, shares)
            with monkeypatch.context() as patch:
                patch.setattr(operated_module, "runs_by_torch", lambda module: False)
                wanted = model(x, experts, shares)
        assert found.dtype == wanted.dtype
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        ours, theirs = ([y, *torch.autograd.grad(y.float().square().sum(), trained)] for y in (found, wanted))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("name", BUILDS)
def test_experts_are_one_node_which_sees_changes_and_leaves_rows_of_none_at_zero(name):
    model, surgeon = operated(BUILDS[name], STEPS["shared"])
    adapter, stored = surgeon.adapters["experts.down_proj"], model.experts.get_parameter("down_proj")
    maps = expert_maps.ExpertMaps(adapter, adapter.frozen(model.experts), {})
    x = torch.randn(6, maps.layer.width, dtype=torch.float64, requires_grad=True)
    y = maps.grouped([0, 1, 3], [2, 0, 3], x)
    assert y.grad_fn.next_functions[0][0].name() == "_GroupedNodeBackward"  # beside the rows of no expert
    assert torch.equal(y, torch.cat([maps.one(0, x[:2]), maps.one(3, x[2:5]), torch.zeros_like(y[:1])]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert (gradient.abs().sum(1) > 0).tolist() == [True] * 5 + [False]
    with torch.no_grad():
        stored.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_computed_at_once_is_what_each_alone_gives(monkeypatch):
    for steps in ("three steps", "low rank", "shared"):
        model, _ = operated(BUILDS["in x out"], STEPS[steps])
        wanted = results(model, "grouped_mm")
        with monkeypatch.context() as patch:
            patch.setattr(expert_maps.ExpertMaps, "_many", lambda self, experts, counts, x: torch.cat(
                [*map(self.one, experts, x.split(counts))]))
            for key, value in results(model, "grouped_mm").items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)
