"""Weights with rows and columns of zeros, as padding leaves them: where something is divided by its norm, W' starts as
W there, nothing is ever NaN, and the layer is the dense formula: values, gradients, forward differentiation, merge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from each import in_turns
from layers import LAYOUTS, Layout, Tower, assert_close, gradients, perturb
from torch import Tensor, nn
from torch.autograd import forward_ad
from zoo import CASES, SHIPPED

from surgery.diagnostics import SurgeryError
from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.language.tree import Spec
from surgery.runtime.apply import apply
from surgery.runtime.surgeon import Surgeon

LINEAR, TABLE = LAYOUTS["linear 12x18"], LAYOUTS["Embedding 18x12"]
BY_NAME = {case.name: case for case in CASES}
# Relative, for outputs and gradients against the dense formula in float64.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 8e-2}


def target(steps: str, definitions: str = "", flag: str = "") -> Spec:
    return parse(f'{definitions}\nspec s()\ntarget any "layers.0" {flag} {{\n{steps}\n}}\n')


# Norms that are divided by, in every way that specs have.
DIVIDED = {
    "a magnitude with its gradient": "transform own() on n { param m[n] = row_norm(W)\n return diag(m / row_norm(W)) }",
    "a magnitude by its inverse": "transform own() on n { param m[n] = row_norm(W)\n"
                                  " return diag(m) @ diag(1 / row_norm(W)) }",
    "mirrors": "transform own() on n { param U[n, 2] = columns(W @ W.T, 2)\n param V[n, 2] = U\n"
               " return reflect(U) @ reflect(V).T }",
    "one mirror after another": "transform own() on n { param U[n, 1] = columns(W @ W.T, 1)\n param V[n, 1] = U\n"
                                " return reflect(U) @ reflect(V) }",
    "many mirrors": "transform own() on n { param U[n, n] = W @ W.T\n param V[n, n] = U\n"
                    " return reflect(U) @ reflect(V).T }",
    "a projection along W": "transform own() on n { param g[n] = 0\n"
                            " let N = diag(1 / row_norm(W)) @ ROWS\n return I(n) + diag(g) @ N @ N.T }",
    "one norm for all": "transform own() on n { param m = norm(W)\n return (m / norm(W)) * I(n) }",
}


def specs() -> Iterator[tuple[str, Spec, Layout]]:
    for case in (*SHIPPED, BY_NAME["order of steps"], BY_NAME["everything"]):
        if not case.shifted:
            yield case.name, case.spec(), LINEAR
    yield "dora on an embedding", BY_NAME["dora"].spec(), TABLE
    for name, text in DIVIDED.items():
        yield name, target("  add low_rank(2)\n  post own() on out", text.replace("ROWS", "W")), LINEAR
        yield f"{name}, on the columns", target("  add low_rank(2)\n  post own() on in", text.replace(
            "row_norm(W)", "col_norm(W)").replace("W @ W.T", "W.T @ W").replace("ROWS", "W.T")), LINEAR


ROWS = [pytest.param(spec, layout, id=name) for name, spec, layout in specs()]
ZEROS = {"rows": lambda w: w.index_fill(0, torch.tensor([0, 3]), 0),
         "rows and columns": lambda w: w.index_fill(0, torch.tensor([0, 3]), 0).index_fill(1, torch.tensor([0, 4]), 0),
         "all of it": torch.zeros_like}


def operated(spec: Spec, layout: Layout, zeros: str, dtype: torch.dtype) -> tuple[Tower, Surgeon, nn.Module, Tensor]:
    """The model, its surgeon, the layer as it was, and an input."""
    torch.manual_seed(1)
    layer, base = layout.build().to(dtype), layout.build().to(dtype)
    with torch.no_grad():
        layer.weight.copy_(ZEROS[zeros](torch.randn(layer.weight.shape)))
        base.load_state_dict(layer.state_dict())
    model, x = Tower(layer), layout.inputs()
    wide = torch.promote_types(dtype, torch.float32)
    return model, apply(model, spec, seed=3, dtype=wide), base, x.to(dtype) if x.is_floating_point() else x


def compare(model: Tower, surgeon: Surgeon, base: nn.Module, x: Tensor, layout: Layout, tolerance: float) -> None:
    """The layer's output and gradients are finite, and those of the dense formula in float64."""
    (adapter,), formula = surgeon.adapters.values(), surgeon.plan.placed[0].formula
    mine = x.clone().requires_grad_(x.is_floating_point())
    tensors = adapter.tensors()
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for k, t in tensors.items()}
    frozen = {"weight": layout.matrix(base.weight.detach().double())}
    if getattr(base, "bias", None) is not None:
        frozen["bias"] = base.bias.detach().double()
    theirs = x.detach().double().requires_grad_() if x.is_floating_point() else x
    bias = dense(formula.bias, {**frozen, **exact}) if "bias" in frozen else None
    wanted = layout.run(theirs, dense(formula.weight, {**frozen, **exact}), bias)
    y = model(mine)
    assert y.isfinite().all()
    assert_close(y, wanted, tolerance, "the output")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    found = gradients(y, direction, {"x": mine, **tensors})
    for key, gradient in gradients(wanted, direction.double(), {"x": theirs, **exact}).items():
        assert found[key].isfinite().all(), key
        assert_close(found[key], gradient, tolerance, f"the gradient of {key}")


@in_turns(3)
@pytest.mark.parametrize("spec, layout", ROWS)
@pytest.mark.parametrize("zeros", ZEROS)
def test_zeros_start_as_they_are_and_stay_finite(spec, layout, zeros):
    model, surgeon, base, x = operated(spec, layout, zeros, torch.float64)  # which is refused where W' is not W
    assert_close(model(x), base(x), 1e-5, "the start")
    compare(model, surgeon, base, x, layout, TOLERANCES[torch.float64])
    y = model.eval()(x)
    surgeon.merge()
    assert_close(model(x), y, 1e-9, "merged")
    surgeon.unmerge()
    perturb(model.train())
    compare(model, surgeon, base, x, layout, TOLERANCES[torch.float64])


NORMED = [row for row in ROWS if row.id in ("dora", "dora on an embedding", "psoft", "delora", "pissa", "coft", "hra",
                                            *DIVIDED)]


@in_turns(3)
@pytest.mark.parametrize("spec, layout", NORMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_narrow_dtypes(spec, layout, dtype):
    model, surgeon, base, x = operated(spec, layout, "rows and columns", dtype)
    compare(model, surgeon, base, x, layout, TOLERANCES[dtype])
    surgeon.merge()
    assert layout.matrix(model.layers[0].weight).isfinite().all()
    surgeon.unmerge()
    perturb(model)
    compare(model, surgeon, base, x, layout, TOLERANCES[dtype])


@in_turns(3)
@pytest.mark.parametrize("spec, layout", NORMED)
def test_under_forward_differentiation(spec, layout):
    """The tangent is finite, and it is the transpose of the gradient: <J v, g> = <v, Jᵀ g>."""
    model, surgeon, _, x = operated(spec, layout, "rows", torch.float64)
    for _ in range(2):
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        directions = {name: torch.randn_like(p) for name, p in names.items()}
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p.detach(), directions[name]) for name, p in names.items()}
            y, tangent = forward_ad.unpack_dual(torch.func.functional_call(model, duals, (x,)))
        assert_close(y, model(x), 1e-12)
        g = torch.randn_like(y)
        back = torch.autograd.grad((model(x) * g).sum(), list(names.values()))
        assert tangent.isfinite().all()
        terms = [(directions[name] * b).sum() for name, b in zip(names, back)]
        assert abs((tangent * g).sum() - sum(terms)) <= 1e-10 * (1 + sum(map(abs, terms)))
        perturb(model)


@pytest.mark.parametrize("body", ["param m[n] = 1\n return diag(m / row_norm(W))",
                                  "param m[n] = 1\n return diag(1 / row_norm(W)) @ diag(m)",
                                  "param m[n] = 1\n return diag(m / detach(row_norm(W)))",
                                  "param m = 1\n return (m / norm(W - W)) * I(n)"])
def test_shifted_targets_are_never_nan(body):
    """A magnitude that does not start as the norm: a row of zeros has no direction, so it stays one of zeros."""
    spec = target("  add low_rank(2)\n  post own()", f"transform own() on n {{ {body} }}", "shifted")
    model, surgeon, base, x = operated(spec, LINEAR, "rows", torch.float64)
    compare(model, surgeon, base, x, LINEAR, 1e-10)
    assert not (model(x) - base.bias)[..., [0, 3]].any()
    surgeon.merge()
    assert not model.layers[0].weight[[0, 3]].any()


def test_a_tensor_over_a_zero_that_is_known_is_a_mistake():
    with pytest.raises(SurgeryError, match="divides by zero"):
        apply(Tower(nn.Linear(4, 4)), target("  add own()", "update own() { param A[out, in] = 0\n return A / 0 }"))


def test_training_past_a_row_of_zeros():
    """DoRA's rows of zeros stay as they are, and the others learn."""
    model, surgeon, base, x = operated(BY_NAME["dora"].spec(), LINEAR, "rows", torch.float32)
    optimiser = torch.optim.AdamW(surgeon.parameters(), lr=1e-2, weight_decay=0.1)
    wanted, losses = torch.randn(base(x).shape), []
    for _ in range(5):
        loss = (model(x) - wanted).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in surgeon.parameters())
    assert torch.equal(model(x)[..., [0, 3]], base(x)[..., [0, 3]])
