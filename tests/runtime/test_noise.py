"""`noise`: drawn anew in every training step, its mean otherwise; values and gradients are those of the dense formula with
the same draw."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diagnosed import errors_of
from layers import Tower
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.ir.dense import dense
from surgery.ir.sizes import known_shape
from surgery.language.to_python import python_text
from surgery.models.demo import load_demo
from surgery.runtime.noise import drawn

DROPPED = """spec drop_ranks(rank: int = 3, p: float = 0.5)

update dropped_ranks(rank: int = 3, p: float = 0.5) {
  param A[rank, in] ~ kaiming_uniform(a = sqrt(5))
  param B[out, rank] = 0
  noise m[rank] ~ bernoulli(p)
  return B @ diag(m) @ A
}

target "layers.0" {
  add dropped_ranks(rank, p)
}
"""
BODIES = {
    "ranks": "param A[3, in] ~ normal() param B[out, 3] = 0 noise m[3] ~ bernoulli(0.5) return B @ diag(m) @ A",
    "the whole update": "param A[3, in] ~ normal() param B[out, 3] = 0 noise m ~ bernoulli(0.7) return m * (B @ A)",
    "entries": "param D[out, in] = 0 noise e[out, in] ~ normal(mean = 1, std = 0.3) return e * D",
    "a posterior": "param A[3, in] ~ normal() param s[3, in] = 0.1 param B[out, 3] = 0 "
                   "noise e[3, in] ~ normal() return B @ (A + s * e)",
    "two": "param A[3, in] ~ normal() param B[out, 3] = 0 noise u[3] ~ uniform(low = 0.5, high = 1.5) "
           "noise v[out] ~ bernoulli(p = 0.4) return diag(v) @ B @ diag(u) @ A",
}
STEPS = {
    "a rotation": "transform r() on n { param K[n, n] = 0 noise m[n, n] ~ bernoulli(0.5) return expm(skew(m * K)) } "
                  'target any "layers.0" { post r() with bias }',
    "a bias": "update b_() on bias { param c[out] = 0 noise m[out] ~ bernoulli(0.5) return m * c } "
              'target any "layers.0" { add b_() }',
    "with dropout": f"update u() {{ {BODIES['ranks']} }} target any \"layers.0\" {{ add u() dropout(0%) post magnitude() }}",
}
SPECS = {name: f'update u() {{ {body} }} target any "layers.0" {{ add u() }}' for name, body in BODIES.items()} | STEPS
LAYERS = {"linear": (lambda: nn.Linear(6, 8), (5, 6)), "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
          "embedding": (lambda: nn.Embedding(7, 6), None)}


def fresh(layer: str = "linear") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    x = torch.randn(shape, dtype=torch.float64) if shape else torch.tensor([[0, 3, 6], [3, 3, 1]])
    return Tower(build().double()), x


def operated(spec: str, layer: str = "linear") -> tuple[nn.Module, surgery.Surgeon, Tensor]:
    model, x = fresh(layer)
    surgeon = surgery.apply(model, surgery.parse(spec), dtype=torch.float64, example=x)
    with torch.no_grad():
        for p in surgeon.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.train(), surgeon, x


def by_hand(model: nn.Module, surgeon: surgery.Surgeon, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """The layer with W' and b' of the dense formula."""
    (placed,), (adapter,) = surgeon.plan.placed, surgeon.adapters.values()
    site, formula = placed.site, adapter.formula
    values = {"weight": site.layout.matrix(site.read()), **leaves}
    if site.bias is not None:
        values["bias"] = site.bias.detach()
    made = {"weight": site.layout.unmatrix(dense(formula.weight, values), site.stored_shape)}
    if site.bias is not None:
        made["bias"] = dense(formula.bias, values)
    plain = deepcopy(site.module)
    plain.__class__ = {"Linear": nn.Linear, "Conv2d": nn.Conv2d, "Embedding": nn.Embedding}[type(plain).__name__]
    plain._modules.clear()
    return torch.func.functional_call(plain, made, (x,))


def leaves_of(surgeon: surgery.Surgeon) -> dict[str, Tensor]:
    (adapter,) = surgeon.adapters.values()
    return {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in adapter.values().items()}


def same_draw(surgeon: surgery.Surgeon, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    (adapter,) = surgeon.adapters.values()
    return {key: t.double() for key, t in drawn(adapter.compiled.noises, torch.device("cpu")).items()}


# --------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SPECS)
def test_training_is_the_dense_formula_with_the_same_draw(name: str, layer: str) -> None:
    if name == "a bias" and layer == "embedding":
        return  # it has none
    model, surgeon, x = operated(SPECS[name], layer)
    leaves = leaves_of(surgeon)
    noise = same_draw(surgeon, 7)
    assert noise and any(t.numel() == 1 or len(t.unique()) > 1 for t in noise.values())
    wanted = by_hand(model, surgeon, x, {**leaves, **noise})
    torch.manual_seed(7)
    y = model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)
    direction = torch.randn(y.shape, dtype=y.dtype)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    (adapter,) = surgeon.adapters.values()
    for key, tensor in adapter.tensors().items():
        if tensor.requires_grad:
            expected = leaves[key].grad
            torch.testing.assert_close(tensor.grad, expected if expected is not None else torch.zeros_like(tensor),
                                       rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SPECS)
def test_evaluation_and_merging_are_the_dense_formula_with_the_mean(name: str, layer: str) -> None:
    if name == "a bias" and layer == "embedding":
        return
    model, surgeon, x = operated(SPECS[name], layer)
    model.eval()
    (adapter,) = surgeon.adapters.values()
    means = {n.data.key: torch.full(known_shape(n.shape), n.data.mean, dtype=torch.float64) for n in adapter.compiled.noises}
    wanted = by_hand(model, surgeon, x, {**leaves_of(surgeon), **means})
    assert torch.equal(by_hand(model, surgeon, x, leaves_of(surgeon)), wanted)
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-11)
    model.train()
    surgeon.merge()
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-11)


def test_each_step_draws_anew_and_each_module_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    text = "update u() { param D[out, in] = 0 noise m[out, in] ~ bernoulli(0.5) return m * D } target linear { add u() }"
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    frozen = [layer.weight.detach().clone() for layer in layers]
    surgeon = surgery.apply(model, surgery.parse(text), check=False)
    with torch.no_grad():
        for p in surgeon.parameters():
            p.fill_(1)
    (one, two), eye = layers, torch.eye(4)
    first, again, other = one(eye), one(eye), two(eye)
    assert not torch.equal(first, again)
    masks = [(y - (w + 0.5).T).sign() for y, w in zip((first, other), frozen)]
    assert not torch.equal(*masks)  # each entry has moved by 0 or by 1
    model.eval()
    assert torch.equal(one(eye), one(eye))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_sees_the_same_draw(reentrant: bool) -> None:
    found = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=reentrant)):
        model, surgeon, x = operated(SPECS["two"])
        torch.manual_seed(3)
        y = run(model, x.requires_grad_())
        torch.manual_seed(99)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in surgeon.parameters())])
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)


def test_a_compiler_traces_it_in_one_graph() -> None:
    model, surgeon, x = operated(SPECS["two"])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(5)
        wanted = model(x)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-10, atol=1e-12)


def test_fused_experts_draw_for_each_matrix_in_training() -> None:
    model = load_demo("mixtral:num_hidden_layers=1")
    text = """update u() { param D[out, in] = 0 noise m ~ bernoulli(0.5) return m * D }
    target any "**.experts.gate_up_proj" { add u() }"""
    surgeon = surgery.apply(model, surgery.parse(text), check=False)
    (adapter,), (placed,) = surgeon.adapters.values(), surgeon.plan.placed
    with torch.no_grad():
        for p in surgeon.parameters():
            p.fill_(1)
    module, weight = placed.site.module, placed.site.weight.detach()
    drawn = [adapter.noise(module.train(), weight.device) for _ in range(6)]
    draws = [(adapter.substitutes(module, noise)["gate_up_proj"] - weight).mean((1, 2)) for noise in drawn]
    for draw in draws:
        torch.testing.assert_close(draw, draw.round(), rtol=0, atol=1e-3)  # each matrix moved by 0 or by 1
    draws = [tuple(draw.round().tolist()) for draw in draws]
    assert len(set(draws)) > 1 and any(0 < sum(draw) < len(draw) for draw in draws)
    torch.testing.assert_close(adapter.substitutes(module)["gate_up_proj"], weight + 0.5)
    torch.manual_seed(1)
    tokens = torch.tensor([[1, 2, 3]])
    one, two = (model.train()(tokens).logits for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)


# ------------------------------------------------------------------------------------------------ language and verbs


def test_it_is_one_thing_in_text_json_and_python() -> None:
    spec = surgery.parse(DROPPED)
    assert spec.to_surg() == DROPPED
    assert surgery.Spec.model_validate_json(spec.model_dump_json()) == spec
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
    assert surgery.check(spec) == []


def test_its_word_is_a_name_elsewhere() -> None:
    text = ("update u(noise: float = 1) { noise noise_[out] ~ normal() let x = noise noise y ~ bernoulli(0.5) "
            "param D[out, in] = 0 return noise * y * diag(noise_) @ D }")
    assert [s.name for s in surgery.parse(text).definitions[0].body] == ["noise_", "x", "y", "D"]


@pytest.mark.parametrize(("body", "code", "says"), [
    ("noise m[out, in] ~ orthogonal() return m * W", "wrong-kind", "has no mean that could stand for it"),
    ("noise m[4] ~ integers(below = 3) return W", "wrong-kind", "has no mean"),
    ("noise m[out, in] ~ cauchy() return m * W", "unknown-distribution", "cauchy"),
    ("noise m ~ bernoulli(2) return m * W", "bad-value", "bernoulli needs 0 <= p and p <= 1"),
    ("noise m ~ bernoulli() return m * W", "missing-argument", "needs an argument `p`"),
    ("noise m[out, in] = 1 return m", "syntax", "expected"),
    ("frozen noise m ~ normal() return m * W", "syntax", "expected"),
    ("noise m ~ normal() noise m ~ normal() return m * W", "duplicate-name", "`m` stands twice"),
    ("noise W ~ normal() return W * ones(out, in)", "duplicate-name", "`W`"),
])
def test_what_noise_cannot_be(body: str, code: str, says: str) -> None:
    found = errors_of(f"update u() {{ {body} }} target linear shifted {{ add u() }}",
                      lambda text: surgery.apply(Tower(nn.Linear(4, 4)), surgery.parse(text), check=False))
    assert found[0].code == code and says in found[0].message


def test_a_start_that_reads_noise_sees_its_mean() -> None:
    text = """update u() { noise m[out, in] ~ normal(mean = 2) param A[out, in] = m return A }
    target linear shifted { add u() }"""
    surgeon = surgery.apply(Tower(nn.Linear(4, 4)), surgery.parse(text), check=False)
    (start,) = surgeon.state().values()
    assert torch.equal(start, torch.full((4, 4), 2.0))


def test_unused_noise_is_a_warning() -> None:
    text = "update u() { noise m ~ normal() param D[out, in] = 0 return D } target linear { add u() }"
    assert [d.message for d in surgery.check(surgery.parse(text))] == ["noise `m` is never used"]


def test_bernoulli_draws_a_parameter_too() -> None:
    text = ("update u() { frozen param m[out, in] ~ bernoulli(p = 0.25) param D[out, in] = 0 return m * D } "
            "target linear { add u() }")
    model = nn.Sequential(nn.Linear(50, 40))
    surgeon = surgery.apply(model, surgery.parse(text), check=False)
    mask = next(t for n, t in surgeon.named_tensors().items() if n.endswith(".m"))
    assert set(mask.unique().tolist()) == {0.0, 1.0} and 0.2 < mask.mean() < 0.3


def test_saved_it_is_attached_and_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    model, surgeon, x = operated(DROPPED)
    assert {n.rpartition(".")[2] for n in surgeon.named_tensors()} == {"A", "B"}
    surgeon.save(tmp_path / "a")
    other, _ = fresh()
    surgery.attach(other, tmp_path / "a")
    assert torch.equal(other.eval()(x), model.eval()(x))
    torch.manual_seed(2)
    ours = model.train()(x)
    torch.manual_seed(2)
    assert torch.equal(other.train()(x), ours)
    assert torch.equal(deepcopy(model).eval()(x), model.eval()(x))


def test_of_several_surgeries_each_draws_its_own_and_those_below_have_the_mean() -> None:
    torch.manual_seed(0)
    model = Tower(nn.Linear(6, 8).double())
    surgeries = surgery.Surgeries(model)
    for name in ("one", "two"):
        surgeries.add(name, surgery.parse(DROPPED), dtype=torch.float64, seed=len(name))
    mixed = surgeries.mix({"one": 1.0, "two": 0.5})
    assert mixed is not None
    (adapter,) = mixed.adapters.values()
    assert {n.data.key for n in adapter.compiled.noises} == {"one:add_dropped_ranks.m", "two:add_dropped_ranks.m"}
    stacked = surgeries.use("one", "two")
    assert stacked is not None
    (adapter,) = stacked.adapters.values()
    assert {n.data.key for n in adapter.compiled.noises} == {"two:add_dropped_ranks.m"}
