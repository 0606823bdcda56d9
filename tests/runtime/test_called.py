"""Layers with a packed weight are operated on by calling them: the same map as on the dense layer of their numbers."""

from __future__ import annotations

from copy import deepcopy

import oracle as o
import pytest
import torch
from called import IN, OUT, named, operated
from case import Parameters
from each import of_some
from layers import Tower, assert_close, gradients, perturb
from packed import Int4Linear, Int8Linear, Sealed, SealedLinear
from torch import nn
from zoo import CASES

from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.layers import opaque_linear
from surgery.layers.opaque_linear import matrix, through
from surgery.runtime.apply import apply

EXACT = 1e-10
LAYERS = [Int8Linear, Int4Linear]
# What reads every number of the weight at each step: a copy of it is kept.
READ = {"hira", "glora", "miss_bat", "the singular values of a product"}


def numbers(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES, ids=str)
@of_some("build", [], LAYERS)
def test_a_called_layer_is_the_dense_one(case, build):
    torch.manual_seed(1)
    base = build(IN, OUT, bias=build is Int8Linear)
    model, surgeon = operated(case, deepcopy(base))
    leaves = surgeon.adapters["layers.0"].tensors()
    exact = {key: t.detach().double() if t.is_floating_point() else t for key, t in leaves.items()}
    exact = {key: t.requires_grad_(leaves[key].requires_grad) for key, t in exact.items()}
    p, bias = Parameters.of(exact), None if base.bias is None else base.bias.detach().double()
    x, y = numbers(base).requires_grad_(), numbers(base).requires_grad_()
    wanted = o.linear(y, case.formula(base.dequantised(), p), None if bias is None else case.bias(bias, p))
    found = model(x)
    assert_close(found, wanted, EXACT, "the output")
    direction = torch.randn_like(wanted)
    actual, expected = gradients(found, direction, {"x": x, **leaves}), gradients(wanted, direction, {"x": y, **exact})
    for key, gradient in expected.items():
        assert_close(actual[key], gradient, EXACT, f"the gradient of {key}")
    with torch.no_grad():
        assert_close(model.eval()(x), wanted, EXACT, "the output in evaluation")
    told = {w.code for w in surgeon.plan.warnings}
    assert ("dense-copy" in told) is (case.name in READ), told


# ------------------------------------------------------------------------------------------------- called, not read

UNREAD = ["lora", "dora", "sora", "pre_diag", "post_diag", "oft", "hra", "deft", "gains on both sides", "everything",
          "a projection from W on in"]


@pytest.mark.parametrize("name", UNREAD)
def test_the_packed_weight_is_never_read(name):
    torch.manual_seed(1)
    base = SealedLinear(IN, OUT)
    with pytest.raises(AssertionError, match="the packed weight is read by mul"):
        base.weight * 2
    model, surgeon = operated(named(name), base)
    for _ in range(2):
        y = model(numbers(base).requires_grad_())
        y.sum().backward()
    plain = Tower(nn.Linear(IN, OUT).double())
    Sealed.is_open = True
    plain.layers[0].weight.data = base.dequantised().as_subclass(torch.Tensor)
    plain.layers[0].bias.data = base.bias.data.double()
    Sealed.is_open = False
    dense = apply(plain, named(name).spec(), seed=3, dtype=torch.float64)
    dense.load(surgeon.state())
    assert_close(y, plain(numbers(base)), EXACT)


def test_the_layer_is_called_once_for_each_step_and_its_norms_are_taken_once():
    layer = Int8Linear(IN, OUT)
    model, surgeon = operated(named("dora"), layer)
    layer.rows.clear()
    for _ in range(3):
        model.train()  # as a Trainer says at each step
        model(torch.randn(5, IN, dtype=torch.float64, requires_grad=True)).sum().backward()
    # A row to see the dtype, one to see that the copy has no bias, the identity for ‖w‖²; then W Aᵀ and W x at each step.
    assert layer.rows == [1, 1, IN, 3, 5, 3, 5, 3, 5]
    model.eval()
    layer.rows.clear()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(5, IN, dtype=torch.float64))
        with surgeon.serving():
            for _ in range(3):
                model(torch.randn(5, IN, dtype=torch.float64))
    # The norms are known: without dropout evaluation runs the program that training ran, and no bit of W has changed.
    assert layer.rows == [3, 5, 3, 5, 3, 5, 5, 5]


@pytest.mark.parametrize("name", ["lora", "sora", "oft"])
def test_to_apply_takes_a_few_rows_where_algebra_proves_the_start(name):
    layer = Int8Linear(IN, OUT)
    apply(Tower(layer), named(name).spec())
    assert max(layer.rows) == 4


def test_a_product_with_many_rows_is_called_for_too():
    spec = parse("""
    transform own() on n {
      param F[in, 10] ~ normal()
      param g = 0
      return diag(1 + g * row_norm(W @ F))
    }
    target linear "layers.0" { pre own() }""")
    layer = Int8Linear(IN, OUT)
    model = Tower(layer)
    surgeon = apply(model, spec, dtype=torch.float64)
    perturb(model)
    layer.rows.clear()
    x, p = numbers(layer), surgeon.adapters["layers.0"].tensors()
    gain = 1 + p["pre_own.g"] * (layer.dequantised() @ p["pre_own.F"]).norm(dim=1)
    assert_close(model(x), gain * (x @ layer.dequantised().mT) + layer.bias, EXACT)
    assert layer.rows == [10, 6] and not surgeon.plan.warnings


def test_a_copy_of_the_whole_weight_is_made_once_and_told_of():
    layer = Int8Linear(IN, OUT)
    model, surgeon = operated(named("hira"), layer)
    layer.rows.clear()
    for _ in range(3):
        model(torch.randn(5, IN, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert layer.rows == [1, 1, IN]  # a row to see the dtype, one to see that the copy has no bias
    (told,) = surgeon.plan.warnings
    assert told.code == "dense-copy" and f"dense copies take {4 * OUT * IN} bytes" in told.message
    memory, (packed, scales, bias) = surgeon.report().memory, (OUT * IN, 4 * OUT, 4 * OUT)
    assert memory["dense copies"] == 4 * OUT * IN and memory["base"] == packed + scales + bias
    assert "dense copies" not in operated(named("lora"), Int8Linear(IN, OUT))[1].report().memory
    with pytest.raises(SurgeryError, match="dense-copy"):
        apply(Tower(Int8Linear(IN, OUT)), named("hira").spec(), strict=True)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "sora", "blocks on out with bias"])
def test_a_bias_that_trains_has_its_gradient(name):
    layer = Int8Linear(IN, OUT)
    model, x = Tower(layer), numbers(layer)
    spec = parse(named(name).spec().to_surg() + '\ntrain "layers.0.bias"')
    surgeon = apply(model, spec, seed=3, dtype=torch.float64)
    perturb(model)
    p, bias = Parameters.of(surgeon.adapters["layers.0"].tensors()), layer.bias.detach().double().requires_grad_()
    wanted = o.linear(x, named(name).formula(layer.dequantised(), p), named(name).bias(bias, p))
    direction = torch.randn_like(wanted)
    (found,) = gradients(model(x), direction, {"bias": layer.bias}).values()
    assert_close(found, gradients(wanted, direction, {"bias": bias})["bias"], 1e-6)


@pytest.mark.parametrize("change", ["weight", "scale", "bias"])
def test_a_changed_packed_layer_is_seen(change):
    for keeping in (True, False):
        layer = Int8Linear(IN, OUT)
        model, surgeon = operated(named("dora"), layer)
        x, p = numbers(layer), Parameters.of(surgeon.adapters["layers.0"].tensors())
        with torch.set_grad_enabled(not keeping):
            model(x)
            with torch.no_grad():
                getattr(layer, change).copy_(-getattr(Int8Linear(IN, OUT), change))
            wanted = o.linear(x, named("dora").formula(layer.dequantised(), p), layer.bias.double())
            assert_close(model(x), wanted, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "dora", "sora", "hira"])
def test_activations_and_output_have_the_dtype_that_the_layer_gives(name, dtype):
    torch.manual_seed(1)
    base = Int8Linear(32, 24)
    base.bias.data *= 30  # far larger than W m, whose numbers it must not round away
    model, surgeon = operated(named(name), base, dtype=torch.float32)
    p = Parameters.of({key: t.double() for key, t in surgeon.adapters["layers.0"].tensors().items()})
    x = numbers(base)
    y = model(x.to(dtype).requires_grad_())
    y.sum().backward()
    wanted = o.linear(x, named(name).formula(base.dequantised(), p), base.bias.double())
    assert y.dtype == dtype
    assert_close(y, wanted, 8 * torch.finfo(dtype).eps)
    part, whole = (t.detach().double() - base.bias.double() for t in (y, wanted))
    assert_close(part, whole, 40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_does_not_round_small_products_away(dtype):
    torch.manual_seed(1)
    layer, rows = Int8Linear(32, 24), torch.randn(4, 32).to(dtype) / 100
    layer.bias.data *= 3
    assert_close(through(layer, rows), rows.double() @ layer.dequantised().mT, 4 * torch.finfo(dtype).eps)


class InTwoBytes(Int8Linear):
    """Computes in a dtype of its own whatever comes in, as most quantised layers do."""

    computes_in = torch.bfloat16

    def forward(self, x):
        return super().forward(x.to(self.computes_in)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e2])
def test_rows_and_gradients_of_any_size_pass_a_layer_that_computes_in_two_bytes(size, dtype):
    """As bitsandbytes' do, in float16 or bfloat16 whatever the activations are. A thousandth of a gradient would be nothing in
    float16, and a thousand times a large row infinite."""
    torch.manual_seed(1)
    layer, rows = InTwoBytes(32, 24), (size * torch.randn(4, 32)).requires_grad_()
    layer.computes_in, direction, weight = dtype, torch.randn(4, 24), layer.dequantised(torch.float32)
    y = through(layer, rows)
    assert_close(y, rows @ weight.T, 6 * torch.finfo(dtype).eps)
    for small in (1e-4, 1.0, 3e2):
        (found,) = torch.autograd.grad(y, rows, small * direction, retain_graph=True)
        assert_close(found, small * direction @ weight, 6 * torch.finfo(dtype).eps)
        # the transposed map, whose gradient is the map of a gradient
        given = (size * direction).requires_grad_()
        turned = opaque_linear.back(layer, given)
        assert_close(turned, given @ weight, 6 * torch.finfo(dtype).eps)
        (found,) = torch.autograd.grad(turned, given, small * rows.detach() / size)
        assert_close(found, small * rows.detach() / size @ weight.T, 6 * torch.finfo(dtype).eps)


class WithABiasOfItsOwn(InTwoBytes):
    """Adds what no other hand reaches: a copy that was made when it was packed."""

    def forward(self, x):
        given = self.bias
        self._parameters["bias"] = nn.Parameter(self.packed_bias)
        try:
            return super().forward(x)
        finally:
            self._parameters["bias"] = given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_read_as_exactly_beside_a_large_bias(dtype):
    """Qwen2's keys have biases of some hundreds; such a layer rounded W beside them to a few hundredths."""
    torch.manual_seed(1)
    layer = InTwoBytes(32, 24)
    layer.computes_in, before = dtype, layer.bias.detach().clone() * 400
    layer.bias.data = before.clone()
    found = matrix(layer, torch.float32)
    assert torch.equal(layer.bias, before)
    assert_close(found, layer.dequantised(dtype), 1e-7)
    kept = WithABiasOfItsOwn(32, 24)
    kept.computes_in, kept.packed_bias = dtype, kept.bias.detach().clone()
    assert_close(matrix(kept, torch.float32), kept.dequantised(), 8 * torch.finfo(dtype).eps)


def test_an_output_in_another_dtype_than_the_input_stays_so():
    class Wide(Int8Linear):
        def forward(self, x):
            return super().forward(x.float())

    model, surgeon = operated(named("sora"), Wide(IN, OUT), dtype=torch.float32)
    x = numbers(model.layers[0]).bfloat16()
    with surgeon.disabled():
        assert model(x).dtype == torch.float32
    assert model(x).dtype == torch.float32


def test_under_autocast_and_compiled():
    for name in ("lora", "dora", "hira", "a projection from W on in"):
        model, _ = operated(named(name), Int8Linear(IN, OUT))
        x = torch.randn(5, IN)
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(x)
        assert narrow.dtype == torch.bfloat16
        assert_close(narrow, y, 2e-2)
        if name in ("dora", "hira"):  # the weight is called, and read from a copy
            torch.compiler.reset()
            assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dora", "a projection from W on in", "columns and rows of W"])
def test_a_backward_pass_under_autocast_is_finite_and_near(name, dtype):
    """`loss.backward()` within autocast: calls that a set-up made outside of it are differentiated by calls."""
    model, surgeon = operated(named(name), Int8Linear(IN, OUT), dtype=torch.float32)
    parameters = [*surgeon.parameters()]
    wanted = torch.autograd.grad(model(torch.ones(5, IN)).sum(), parameters)
    y = model(torch.ones(5, IN)).sum()
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(y, parameters)
    for one, other in zip(found, wanted):
        assert_close(one, other, 5e-2)


@pytest.mark.parametrize("quotient", ["norm(B @ A) / norm(B @ A) * W", "diag(row_norm(B @ A) / row_norm(B @ A)) @ W",
                                      "W @ diag(col_norm(B @ A) / col_norm(B @ A))"])
def test_a_norm_that_starts_at_zero_is_no_one(quotient):
    """0 / 0 is 0: the layer would start at nothing. No forward pass is made here that could show it."""
    spec = parse("update u() {\n param A[2, in] ~ normal(std = 1)\n param B[out, 2] = 0\n"
                 f" return {quotient} - W\n}}\ntarget linear {{ add u() }}")
    with pytest.raises(SurgeryError, match="does not start as W"):
        apply(nn.Sequential(Int8Linear(IN, OUT)), spec, check=False)
