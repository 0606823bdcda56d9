"""Corners that plausible mistakes were put into, and that no other test looked at: each is red on its mistake."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense_formula import Experts
from layers import Tower, assert_close, gradients, perturb
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from surgery.analysis.spectra.spectrum import Spectrum, of_factors
from surgery.diagnostics import SurgeryError, SurgeryWarning
from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.layers.opaque_linear import is_plain
from surgery.planning.check import check
from surgery.runtime.apply import apply
from surgery.runtime.atomic_folders import replacing_file
from surgery.runtime.noise import drawn
from surgery.runtime.save import save
from surgery.runtime.surgeon import Surgeon

EXACT = 1e-10


def spec(steps: str, definitions: str = "", flag: str = "", more: str = ""):
    return parse(f'{definitions}\nspec s()\ntarget any "**" {flag} {{\n{steps}\n}}\n{more}')


def operated(layer: nn.Module, *what: str, moved: bool = True, **how) -> tuple[Tower, Surgeon]:
    torch.manual_seed(1)
    model = Tower(layer.to(torch.float64))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    surgeon = apply(model, spec(*what, **how), seed=3, dtype=torch.float64)
    if moved:
        perturb(model)
    return model, surgeon


# ------------------------------------------------------------------------------------------- a layer's own parameters


UNFROZEN = {"a linear layer": (lambda: nn.Linear(6, 12), lambda x, w, b: F.linear(x, w, b), (5, 6)),
            "Conv1D": (lambda: Conv1D(12, 6), lambda x, w, b: F.linear(x, w, b), (5, 6)),
            "a convolution": (lambda: nn.Conv1d(2, 12, 3), lambda x, w, b: F.conv1d(x, w.unflatten(1, (2, 3)), b),
                              (3, 2, 5))}


@pytest.mark.parametrize("kind", UNFROZEN)
@pytest.mark.parametrize("steps", ["add low_rank(2)", "add low_rank(2)\n post magnitude()", "pre diagonal() with bias",
                                   "add shift(2)", "add low_rank(2)\n post orthogonal(1) with bias",
                                   "pre block_orthogonal(3)"])
def test_a_layers_own_bias_trains_where_train_names_it(kind, steps):
    build, run, shape = UNFROZEN[kind]
    model, surgeon = operated(build(), steps, more='train "layers.0.bias"')
    layer, (placed,), (adapter,) = model.layers[0], surgeon.plan.placed, surgeon.adapters.values()
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    assert set(own) == {"bias"}
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    leaves = {"weight": placed.site.layout.matrix(layer.get_parameter("weight")), **own, **adapter.tensors()}
    wanted = run(x, dense(placed.formula.weight, leaves), dense(placed.formula.bias, leaves))
    direction = torch.randn_like(y)
    found = gradients(y, direction, {**own, **adapter.tensors()})
    for key, gradient in gradients(wanted, direction, {**own, **adapter.tensors()}).items():
        assert_close(found[key], gradient, EXACT, f"the gradient of {key}")


def test_what_train_does_not_name_has_no_gradient_and_an_operated_weight_cannot():
    model, _ = operated(nn.Linear(6, 12), "add low_rank(2)")
    model(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert model.layers[0].bias.grad is None and model.layers[0].weight.grad is None
    with pytest.raises(SurgeryError, match="overlap"):
        operated(nn.Linear(6, 12), "add low_rank(2)", more='train "layers.0.weight"')


# ---------------------------------------------------------------------------------------------------- biases that start


@pytest.mark.parametrize("steps, definitions", [
    ("add own()", "update own() on bias { param v[out] = 1\n return v }"),
    ("add low_rank(2)\n add own()", "update own() on bias { param v[out] = 0.5\n return v * b }"),
    ("add own()\n add own()", "update own() on bias { param v[in] ~ normal()\n return W @ v }"),
], ids=["ones", "a share of b", "what the weight gives"])
def test_a_bias_that_starts_elsewhere_is_refused(steps, definitions):
    with pytest.raises(SurgeryError, match="not-identity"):
        operated(nn.Linear(6, 12), steps, definitions)
    assert "not-identity" in {d.code for d in check(spec(steps, definitions)) if d.severity == "error"}
    operated(nn.Linear(6, 12), steps, definitions, "shifted")


def test_a_bias_that_a_turn_of_no_weight_moves_is_refused():
    """W' = W = 0, and b' is 2 b."""
    model = Tower(nn.Linear(6, 12))
    nn.init.zeros_(model.layers[0].weight)
    with pytest.raises(SurgeryError, match="not-identity"):
        apply(model, spec("pre own() with bias", "transform own() on n { param d[n] = 2\n return diag(d) }"))


# ------------------------------------------------------------------------------------------------------ fused experts


def test_every_expert_draws_for_itself():
    steps = ("add own()", """update own() {
  param A[2, in] ~ normal()
  frozen param F[out, 2] ~ uniform()
  frozen param at[5] ~ sample(of = out * in)
  shared param S[2, in] ~ normal()
  param m[out] = row_norm(W)
  return 0 * (F @ A + F @ S + diag(m) @ scatter(take(W, at), at, out, in))
}""")
    model, surgeon = operated(Experts(12, 18, False), *steps, moved=False)
    tensors = {key.split(".")[1]: t.detach() for key, t in surgeon.adapters["layers.0.weight"].tensors().items()}
    for name in ("A", "F", "at"):
        one, other = tensors[name]
        assert one.shape == other.shape and not torch.equal(one, other), name
    assert abs(torch.corrcoef(tensors["A"].flatten(1))[0, 1]) < 0.6
    assert tensors["S"].shape == (2, 18)
    assert_close(tensors["m"], model.layers[0]._parameters["weight"].detach().norm(dim=-1), EXACT)


# -------------------------------------------------------------------------------------------------------- padding_idx


@pytest.mark.parametrize("padding", [3, -1])
@pytest.mark.parametrize("steps", ["add low_rank(2)", "add low_rank(2)\n post magnitude()", "pre diagonal()",
                                   "pre diagonal() on in", "add low_rank(2)\n post orthogonal(1) on in"])
def test_the_padding_of_an_embedding_learns_nothing(padding, steps):
    """Values are those of all rows; no gradient comes from where the padding stands, as in torch's own."""
    model, surgeon = operated(nn.Embedding(18, 12, padding_idx=padding), steps)
    (placed,), (adapter,), ids = surgeon.plan.placed, surgeon.adapters.values(), torch.randint(18, (4, 9))
    ids[:, ::2] = padding % 18
    y, tensors = model(ids), adapter.tensors()
    direction = torch.randn_like(y)
    weight = dense(placed.formula.weight, {"weight": model.layers[0].get_parameter("weight").detach(), **tensors})
    assert_close(y, F.embedding(ids, weight), EXACT)
    kept = torch.where((ids == padding % 18)[..., None], 0.0, direction)
    found, wanted = (gradients(out, d, tensors) for out, d in ((y, direction), (F.embedding(ids, weight), kept)))
    for key, gradient in wanted.items():
        assert_close(found[key], gradient, EXACT, f"the gradient of {key}")


# ------------------------------------------------------------------------------------------- dtypes of weight and bias


@pytest.mark.parametrize("weight, bias", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                          (torch.float16, torch.float64)], ids=str)
@pytest.mark.parametrize("steps", ["add low_rank(2)", "add shift()", "add low_rank(2)\n pre diagonal() with bias"])
def test_weight_and_bias_of_two_dtypes_keep_their_own(weight, bias, steps):
    torch.manual_seed(1)
    layer = nn.Linear(6, 12)
    layer.weight, layer.bias = nn.Parameter(layer.weight.to(weight)), nn.Parameter(layer.bias.to(bias))
    model, frozen = Tower(layer), {"weight": layer.weight.detach().double(), "bias": layer.bias.detach().double()}
    surgeon, x = apply(model, spec(steps)), torch.randn(5, 6)
    for size in (0.0, 0.3):
        perturb(model, size)
        (placed,), (adapter,) = surgeon.plan.placed, surgeon.adapters.values()
        leaves = {**frozen, **{key: t.detach().double() for key, t in adapter.tensors().items()}}
        w, b = dense(placed.formula.weight, leaves), dense(placed.formula.bias, leaves)
        with torch.autocast("cpu", torch.bfloat16):  # without which torch's own layer takes no two dtypes
            assert_close(model(x), F.linear(x.double(), w, b), 2e-2)
        surgeon.merge()
        assert (layer.weight.dtype, layer.bias.dtype) == (weight, bias)
        assert_close(layer.weight, w, torch.finfo(weight).eps)
        assert_close(layer.bias, b, max(torch.finfo(bias).eps, 1e-6))  # to which float32's adapter rounds
        surgeon.unmerge()


@pytest.mark.parametrize("layer, x", [(nn.Linear(6, 12), torch.randn(4, 6)), (nn.Conv1d(2, 12, 3), torch.randn(4, 2, 5))])
def test_an_input_that_the_layer_refuses_is_refused(layer, x):
    """One number is not spread over six features, an imaginary part not left out, and no dtype cast without a word."""
    model, surgeon = operated(layer, "pre diagonal() on in\n add low_rank(2)")
    model.eval()(x.double())
    wrong = [x.double()[..., :1], x.double().repeat(1, *[2] * (x.ndim - 1)), x, x.long(), x.to(torch.complex128), x > 0]
    for each in (wrong if x.ndim == 2 else wrong[2:]):
        for kept in (nullcontext(), surgeon.serving()):
            with torch.no_grad(), kept:
                model(x.double())
                with pytest.raises(RuntimeError):
                    model(each)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert model(x.double()).dtype == torch.float64
        with pytest.raises(RuntimeError):
            model(x.long())


_IMAGE = torch.randn(2, 4, 5, 6)
LYING = {"a narrow layer": (lambda: nn.Linear(64, 4), torch.randn(3, 5, 64)), "rows": (lambda: nn.Linear(64, 4), torch.randn(300, 64)),
         "images": (lambda: nn.Conv2d(4, 6, 3), _IMAGE), "one image": (lambda: nn.Conv2d(4, 6, 3), _IMAGE[0]),
         "images by pixels": (lambda: nn.Conv2d(4, 6, 3), _IMAGE.to(memory_format=torch.channels_last)),
         "ids": (lambda: nn.Embedding(9, 6), torch.randint(9, (2, 4)))}


@pytest.mark.parametrize("kind", LYING)
def test_an_output_lies_in_memory_as_the_layers_own(kind):
    """Models `view` it: what lies by columns cannot be seen in another shape."""
    build, x = LYING[kind]
    x = x.double() if x.is_floating_point() else x
    for steps in ("add low_rank(1)", "post orthogonal(1)", "add low_rank(1)\n post magnitude()"):
        model, surgeon = operated(build(), steps)
        with surgeon.disabled():
            wanted = model(x).stride()
        assert model.train()(x).stride() == model.eval()(x).stride() == wanted
        with torch.no_grad(), surgeon.serving():
            assert [model(x).stride() for _ in range(2)] == [wanted, wanted]


# ------------------------------------------------------------------------------------------ what is set around a call


@contextmanager
def around(what: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype({"float64": torch.float64, "float16": torch.float16}.get(what, before))
        with torch.device("meta") if what == "meta" else torch.autocast("cpu", torch.bfloat16, what == "autocast"):
            yield
    finally:
        torch.set_default_dtype(before)


SEEDED = """update masked() {
  frozen param m[out, in] ~ bernoulli(0.3)
  frozen param R[out, in] = (W @ W.T) @ m
  param X[out, 3] ~ orthogonal() on stiefel
  param A[3, in] = 0
  noise z[out, in] ~ bernoulli(0.001)
  return m * (X @ A) * (1 + 100 * z) + 0 * R
}"""


@pytest.mark.parametrize("what", ["float64", "float16", "meta", "autocast"])
def test_nothing_of_the_users_defaults_is_in_a_start_a_draw_or_a_retraction(what):
    found, wanted = ({}, {})
    for each, start in ((what, found), ("nothing", wanted)):
        torch.manual_seed(2)
        model, x = Tower(nn.Linear(6, 12), nn.LayerNorm(12)), torch.randn(2, 6)
        with around(each):
            surgeon = apply(model, spec("add masked()", SEEDED, more='target norm "**" { pre diagonal() }'), example=x)
        start |= {name: t.detach().clone() for name, t in surgeon.named_tensors().items()}
    assert found.keys() == wanted.keys() and len(found) == 5
    assert all(torch.equal(t, wanted[name]) and t.dtype == wanted[name].dtype for name, t in found.items())
    factor = surgeon.adapters["layers.0"].tensors()["add_masked.X"]
    factor.grad = torch.ones_like(factor)
    with around(what):
        noise = drawn(surgeon.adapters["layers.0"].compiled.noises, torch.device("cpu"))
        torch.optim.SGD([factor], 0.5).step()
    assert {t.dtype for t in noise.values()} == {torch.float32}
    assert_close(factor.mT @ factor, torch.eye(3), 1e-5, "XᵀX")


# --------------------------------------------------------------------------------------------------- norms of nothing


@pytest.mark.parametrize("body", ["diag(ones(n) + norm(B @ A))", "diag(ones(n) + row_norm(B @ A))",
                                  "diag(ones(n) + col_norm(A.T @ B.T))", "(1 + norm(B @ A)) * I(n)",
                                  "diag(ones(n) + norm(B @ A) * norm(B @ A))", "diag(ones(n) + norm(g * A))",
                                  "I(n) + norm(B @ A) * (C @ C.T)", "diag(ones(n) + row_norm(diag(ones(n)) @ B @ A))"])
def test_the_norm_of_a_zero_product_is_zero_with_finite_gradients(body):
    """Where torch's own norm has the gradient 0."""
    names = [line for name, line in {"A": "param A[2, n] ~ normal()", "B": "param B[n, 2] = 0", "g": "param g = 0",
                                     "C": "param C[n, 2] ~ normal()"}.items() if name in body]
    text = f"transform own() on n {{\n{chr(10).join(names)}\nreturn {body} }}"
    model, surgeon = operated(nn.Linear(6, 12), "post own()", text, moved=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    (placed,), (adapter,), base = surgeon.plan.placed, surgeon.adapters.values(), model.layers[0]
    for _ in range(2):
        y, tensors = model(x), adapter.tensors()
        weight = dense(placed.formula.weight, {"weight": base.get_parameter("weight"), **tensors})
        wanted = F.linear(x, weight, base.get_parameter("bias"))
        direction = torch.randn_like(y)
        assert_close(y, wanted, EXACT)
        found = gradients(y, direction, tensors)
        for key, gradient in gradients(wanted, direction, tensors).items():
            assert found[key].isfinite().all()
            assert_close(found[key], gradient, EXACT, f"the gradient of {key}")
        perturb(model)


@pytest.mark.parametrize("trains", [True, False])
def test_several_values_at_one_place_are_their_sum(trains):
    """In the step that adds them onto W and in the one that makes them a matrix of their own."""
    model, _ = operated(nn.Linear(8, 12), "add several()", """update several() {
  param v[9] ~ normal()
  frozen param at[9] ~ integers(below = 5)
  return scatter(v, at, out, in)
}""", "shifted")
    layer = model.train(trains).layers[0]
    v, at = layer.weight_surgery.add_several.v, layer.weight_surgery.add_several.at
    moved = torch.stack([sum((x for x, place in zip(v, at) if place == k), torch.zeros(())) for k in range(96)])
    x = torch.randn(4, 8, dtype=torch.float64)
    wanted = F.linear(x, layer.get_parameter("weight") + moved.reshape(12, 8), layer.bias)
    y, direction = model(x), torch.randn_like(wanted)
    assert_close(y, wanted, EXACT, "the output")
    found, meant = (gradients(each, direction, {"v": v})["v"] for each in (y, wanted))
    assert_close(found, meant, EXACT, "the gradient of v")


def test_forward_differentiation_sees_every_kernel():
    """As `torch.func.jvp` does, inside `dual_level`, where a node of ours has no tangent to give."""
    texts = ["post own()", "transform own() on n { param X[n, n] = 0\n param d[n] = 1\n"
             " return diag(d) @ cayley(skew(X)) }"]
    for steps in (texts, ["add low_rank(2)\n post magnitude()"], ["pre block_orthogonal(3)\n post orthogonal(1)"]):
        model, _ = operated(nn.Linear(6, 12), *steps)
        x, v = torch.randn(2, 4, 6, dtype=torch.float64)
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))
        assert_close(tangent, model(x + v) - model(x), EXACT)


# -------------------------------------------------------------------------------------------- what is kept, and written


@pytest.mark.parametrize("verb", ["merge", "load"])
@pytest.mark.parametrize("steps", ["add low_rank(2)", "add low_rank(2)\n post magnitude()"])
def test_a_backward_pass_after_other_numbers_is_an_error(steps, verb):
    """Its gradients would be of W' in the place of W, or of what was loaded; what was switched off meanwhile, and is on again, gives its own."""
    model, surgeon = operated(nn.Linear(6, 12), steps)
    model.train()
    loss = model(torch.randn(3, 6, dtype=torch.float64, requires_grad=True)).square().sum()
    with surgeon.disabled():
        model(torch.randn(3, 6, dtype=torch.float64))
    loss.backward(retain_graph=True)
    surgeon.merge() if verb == "merge" else surgeon.load({n: 2 * t for n, t in surgeon.state().items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_tensors_may_be_exchanged_when_a_model_moves():
    """As torch can be asked to, in `to`, `float` and `load_state_dict`; it refuses where anything refers to a tensor."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        x = torch.randn(4, 6)
        (model, surgeon), (other, _) = (operated(nn.Linear(6, 12), "add low_rank(2)\n post magnitude()") for _ in "12")
        perturb(other, 0.7)
        for assign in (False, True):
            perturb(other, 0.2)
            model.load_state_dict(other.state_dict(), assign=assign)
            assert_close(model(x.double()), y := other(x.double()), EXACT)
        frozen = F.linear(x, *(p.detach().float() for p in other.layers[0]._parameters.values()))
        model.float()
        for verb in (lambda: None, surgeon.merge, surgeon.unmerge):
            verb()
            assert_close(model(x).double(), y, 1e-6)
        surgeon.remove()
        assert_close(model(x), frozen, 1e-6)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("verb", ["unmerge", "remove"])
def test_a_change_of_what_was_merged_is_told_where_it_is_lost(name, verb):
    model, surgeon = operated(nn.Linear(6, 12), "add low_rank(2)\n add shift()")
    surgeon.merge()
    with surgeon.disabled():
        model.float()
    with warnings.catch_warnings(action="error", category=SurgeryWarning):
        surgeon.unmerge()
        surgeon.merge()
        model.layers[0].get_parameter(name).mul_(2)
        with pytest.raises(SurgeryWarning, match=f"`layers.0.{name}` changed after merge"):
            getattr(surgeon, verb)()
    assert surgeon.merged
    with pytest.warns(SurgeryWarning, match="merge_and_remove"):
        getattr(surgeon, verb)()


@torch.no_grad()
@pytest.mark.parametrize("steps", ["add low_rank(2)\n post magnitude()", "pre orthogonal(1)", "add low_rank(2)"])
def test_after_train_nothing_of_before_is_used(steps):
    model, surgeon = operated(nn.Linear(6, 12), steps)
    x = torch.randn(4, 6, dtype=torch.float64)
    model.eval()(x)
    for name, tensor in [*surgeon.named_tensors().items(), ("weight", model.layers[0].get_parameter("weight"))]:
        tensor.data.mul_(1.5)  # which no version counter of torch's tells of
        fresh = model.train()(x)
        assert_close(model.eval()(x), fresh, EXACT, name)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "figures.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_file(path) as new:
        new.write_text("half of the ne")
        assert path.read_text() == "old" and new != path
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["figures.csv"]
    reader = path.open()
    with replacing_file(path) as new:
        new.write_text("new")
    assert path.read_text() == "new" and reader.read() == "old"  # another file: whoever reads the old one still does
    reader.close()


class Shard(nn.Parameter):
    """A part of a tensor that other processes hold the rest of, as torch.distributed marks one."""

    placements = ("Shard(0)",)


def test_a_shard_is_no_whole_tensor(tmp_path: Path):
    model, surgeon = operated(nn.Linear(6, 12), "add low_rank(2)")
    whole = surgeon.state()
    name = next(iter(whole))
    for part in (Shard(torch.zeros(2, 6)), torch.empty(2, 6, device="meta"), torch.empty(0, 6)):
        with pytest.raises(SurgeryError, match="not here as a whole"):
            save(surgeon, tmp_path / "adapter", state={**whole, name: part})
        assert not (tmp_path / "adapter").exists()
    assert is_plain(Shard(torch.zeros(2, 6))) and not is_plain(type("Own", (nn.Parameter,), {})(torch.zeros(2)))


# ------------------------------------------------------------------------------------------------ small singular values


def steep(size: int, least: float) -> tuple[Tensor, Tensor]:
    """A matrix, and its singular values: from 1 to `least`."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(0, torch.tensor(least).log10().item(), size, dtype=torch.float64)
    return u * values @ v, values


@pytest.mark.parametrize("size", [40, 260])
@pytest.mark.parametrize("least", [1e-4, 1e-6, 1e-8])
def test_small_singular_values_count(size, least):
    a, values = steep(size, least)
    found = Spectrum.of(a)
    assert found.numerical_rank == size
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), values, rtol=1e-5, atol=0)
    rounding = float(values[size // 2]) * 1.0001
    assert Spectrum.of(a, rounding).numerical_rank == size // 2
    if size < 100:
        thin, _ = of_factors(a[:, :5] * values[:5], a[:5])
        assert thin.numerical_rank == 5
