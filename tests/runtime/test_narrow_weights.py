"""A layer in bfloat16 or float16 is about as exact as the dense formula in that dtype, where a rounding decides or is
multiplied up."""

from __future__ import annotations

import dense_formula
import pytest
import torch
from dense_formula import Operated, lowered, meant, operated
from torch import nn

from surgery.language.library import parse
from surgery.runtime.frozen_layers import FrozenLinear

NARROW = [torch.bfloat16, torch.float16]
MOST = 3.5  # times what the dense formula is off by: activations are rounded between thin products, W' is rounded once


def on_linear(monkeypatch: pytest.MonkeyPatch, text: str, out: int, in_: int, dtype: torch.dtype) -> Operated:
    """An update of this body on a linear layer, its parameters in float32."""
    layer = (lambda: nn.Linear(in_, out, bias=False), lambda: torch.randn(40, in_))
    monkeypatch.setitem(dense_formula.LAYERS, "a layer", layer)
    return operated(parse(f'update own(r: int = 16) {{ {text} }} target any "**" shifted {{ add own() }}'), "a layer",
                    dtype, torch.float32)


def assert_as_exact(op: Operated, dtype: torch.dtype) -> None:
    plain, exact = meant(op, torch.float32, dtype), meant(op, torch.float64, torch.float64)
    for what, found in lowered(op).items():
        off, allowed = ((each[what].double() - exact[what]).norm() / exact[what].norm()
                        for each in ({what: found}, plain))
        assert off <= MOST * allowed, f"{what} is off by {off:.1e}, the dense formula by {allowed:.1e}"


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("text", [
    "param A[r, out] ~ normal(std = 0.3) param B[out, r] = 0 return B @ relu(A @ W)",
    "param A[r, in] ~ normal(std = 0.3) param B[r, in] = 0 return abs(W @ A.T) @ B",
    "param A[r, out] ~ normal(std = 0.3) param B[out, r] = 0 return B @ max(tanh(A @ W), 0.2)",
    "param A[r, out] ~ normal(std = 0.3) param B[out, r] = 0 return B @ (clamp(A @ W, -0.3, 0.4) + A @ W)"])
def test_which_entries_a_jump_leaves_is_decided_by_the_weight_as_it_is(text, dtype, monkeypatch):
    """Of a product that is rounded to the weight's dtype, some entries are on the other side."""
    op = on_linear(monkeypatch, text, 320, 300, dtype)
    assert_as_exact(op, dtype)
    with op.surgeon.batched_setups():
        assert_as_exact(op, dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_exact_products_with_a_weight_are_made_of_parts_of_it(dtype, monkeypatch):
    monkeypatch.setattr("surgery.runtime.frozen_layers.PART", 100)
    torch.manual_seed(0)
    layer = FrozenLinear.__new__(FrozenLinear)
    layer.weight = torch.randn(17, 30).to(dtype)
    wide = layer.weight.double()
    for product, other in ((layer.frozen_exact, wide.mT), (layer.frozen_back_exact, wide)):
        rows = torch.randn(5, other.shape[0], dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(product(rows), rows @ other)
        for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert order(product, rows)


@pytest.mark.parametrize("dtype", [*NARROW, None])
@pytest.mark.parametrize("text", [
    "param A[r, in] ~ normal(std = 0.3) param B[out, r] ~ normal(std = 0.3) param a = 30 param g = 1 "
    "let V = g * W + a * (B @ A) return V @ diag(1 / col_norm(V))",
    "param A[r, in] ~ normal(std = 0.3) param B[out, r] ~ normal(std = 0.3) param a = 30 "
    "let V = W + a * (B @ A) return diag(1 / row_norm(V)) @ V"])
def test_a_number_that_a_norm_takes_away_again_has_one_gradient(text, dtype, monkeypatch):
    """The parts that come by the norm and beside it are near each other's negative: rounded each by itself, they left
    their roundings. In autocast too (None)."""
    op = on_linear(monkeypatch, text, 96, 80, dtype or torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        assert_as_exact(op, dtype or torch.float32)


@pytest.mark.parametrize("sizes", [(320, 300), (300, 320)])
@pytest.mark.parametrize("training", [True, False])
def test_a_large_gain_between_thin_factors_goes_to_the_one_that_acts_last(sizes, training, monkeypatch):
    """What the first factor gives would be without end in float16, and nothing times that is no number."""
    op = on_linear(monkeypatch, "param A[r, in] ~ normal(std = 0.05) param B[out, r] = 0 "
                                "return B @ diag(4 / max(col_norm(B), 1e-4)) @ A", *sizes, torch.float16)
    (adapter,) = op.surgeon.adapters.values()
    with torch.no_grad():
        adapter.tensors()["add_own.B"].zero_()
    layer = op.surgeon.model.train(training)
    for x in (3 * op.x, 3 * op.x[:1]):
        assert torch.equal(layer(x), op.base(x))
