"""The zoo in the dtypes that people train in: the frozen weight narrow, the adapter in float32, autocast,
torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from each import in_turns, of_some
from functorch.compile import make_boxed_func
from layers import LAYOUTS, Layout, Operated, assert_close, assert_starts, gradients, operated, perturb
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from zoo import CASES

on_every_case = pytest.mark.parametrize("case", CASES, ids=str)

# Relative errors of outputs and of gradients, a few roundings of each dtype.
TOLERANCES = {torch.float32: (5e-6, 1e-4), torch.bfloat16: (2e-2, 6e-2), torch.float16: (3e-3, 1e-2)}


def of_layout(name: str, first: int) -> list:
    """The layer in each dtype, from the so manieth on: cases take these in turn, and so each layer in another dtype."""
    dtypes = [*TOLERANCES]
    return [(LAYOUTS[name], dtype) for dtype in (*dtypes[first:], *dtypes[:first])]


def compare(op: Operated, y: torch.Tensor, mine: dict[str, torch.Tensor], tolerances: tuple[float, float]) -> None:
    """An output and its gradients against the oracle's, in float64 from the same rounded weight,
    input and parameters."""
    x, leaves = op.input(), op.leaves()
    x = {"x": x["x"].detach().double().requires_grad_()} if op.x.is_floating_point() else x
    expected = op.oracle(x["x"], leaves)
    assert_close(y, expected, tolerances[0], "the output")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    actual = gradients(y, direction, {**mine, **op.parameters})
    for key, gradient in gradients(expected, direction.double(), {**x, **leaves}).items():
        assert_close(actual[key], gradient, tolerances[1], f"the gradient of {key}")


@in_turns(3)
@on_every_case
@of_some("layout dtype", [], of_layout("linear 12x18", 0), of_layout("Conv2d 12x18", 1), of_layout("Embedding 18x12", 2))
def test_a_narrow_weight_with_a_float32_adapter(case, layout, dtype):
    op = operated(case, layout, dtype, noise=0.0, adapter=torch.float32)
    if dtype == torch.float32:
        assert_starts(op)
    perturb(op.model)
    mine = op.input()
    y = op.model(mine["x"])
    assert y.dtype == dtype and {p.dtype for p in op.surgeon.parameters()} == {torch.float32}
    compare(op, y, mine, TOLERANCES[dtype])


@in_turns(3)
@on_every_case
def test_a_merge_rounds_once(case):
    """W' in bfloat16 is the exact W' rounded to nearest: no further than half a unit in the last place."""
    op = operated(case, LAYOUTS["linear 12x18"], torch.bfloat16, adapter=torch.float32)
    op.surgeon.merge()
    exact = case.formula(op.weight, op.p)
    half = torch.finfo(torch.bfloat16).eps / 2
    assert ((op.layer.weight.double() - exact).abs() <= half * exact.abs() * 1.01 + 1e-6).all()


@in_turns(3)
@on_every_case
def test_under_autocast_only_products_with_activations_are_narrow(case):
    op = operated(case, LAYOUTS["linear 12x18"], torch.float32)
    mine = op.input()
    with torch.autocast("cpu", torch.bfloat16):
        y = op.model(mine["x"])
    assert y.dtype == torch.bfloat16
    compare(op, y, mine, TOLERANCES[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16):
        op.surgeon.merge()
    assert_close(op.layer.weight, case.formula(op.weight, op.p), 2e-6, "the merged weight")


@in_turns(3)
@on_every_case
def test_a_wide_weight_makes_the_adapter_wide(case):
    op = operated(case, LAYOUTS["linear 12x18"], torch.float64, adapter=torch.float32)
    y = op.model(op.x)
    assert y.dtype == torch.float64
    assert_close(y, op.oracle(op.x, op.leaves()), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [0.0, 1.0, 100.0])
def test_a_narrow_layer_is_as_exact_as_the_same_formula_by_torchs_own_operations(bias, dtype):
    """x Wᵀ + b + 5/3 (x Aᵀ) Bᵀ, the factors rounded to the activations' dtype as autocast does, against float64: a large
    bias rounds the output of both, and what is small beside it."""
    op = operated(next(case for case in CASES if case.name == "lora"),
                  Layout("linear 64x64", lambda: nn.Linear(64, 64), lambda: torch.randn(200, 64)), dtype, adapter=torch.float32)
    held = op.layer.get_parameter("bias")
    with torch.no_grad():
        held.mul_(bias)
    w, (x, *leaves) = op.base.weight.detach(), ({**op.input(), **op.parameters}).values()
    direction = torch.randn(200, 64, generator=torch.Generator().manual_seed(5)).to(dtype)

    def results(run: Callable[..., torch.Tensor], narrow: torch.dtype, wide: torch.dtype) -> list[torch.Tensor]:
        given = [t.detach().to(d).requires_grad_() for t, d in zip((x, *leaves), (narrow, wide, wide))]
        y = run(*given)
        return [y.detach(), *torch.autograd.grad(y, given, direction.to(y.dtype))]

    def form(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        thin = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return F.linear(x, w.to(x.dtype), held.detach().to(x.dtype)) + 5 / 3 * thin

    exact, plain = results(form, torch.float64, torch.float64), results(form, dtype, torch.float32)
    y = op.model(x)
    for found, other, wanted in zip([y.detach(), *torch.autograd.grad(y, [x, *leaves], direction)], plain, exact):
        off, most = ((each.double() - wanted).norm() / wanted.norm() for each in (found, other))
        assert off <= 1.15 * most, f"off by {off:.2e}, where torch's own form is by {most:.2e}"


ROTATIONS = [case for case in CASES if case.name in ("rotation on in", "oft", "mirrors on in", "expm on in")]


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_a_rotation_under_autocast_stays_one(case, noise):
    """x T Wᵀ has the norm of x T for an orthogonal W, up to a rounding of the activations."""
    op = operated(case, LAYOUTS["linear 12x12"], torch.float32, noise)
    with torch.no_grad():
        op.layer.weight.copy_(torch.linalg.qr(torch.randn(12, 12)).Q)
        op.layer.bias.zero_()
        op.parameters.get("add_low_rank.B", torch.zeros(1)).zero_()
    x = torch.randn(50, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = op.model(x)
    assert (y.float().norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 1.5e-2


COMPILED = [case for case in CASES
            if case.name in ("dora", "sora", "oft", "everything", "loha", "expm of a low-rank skew")]


def surveyed(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """The backend `aot_eager`, which fails where torch 2.13's own would forget a factor: it makes `addmm` of
    `add(y, mm, alpha=c)`, without the c."""
    return aot_autograd(fw_compiler=_survey, bw_compiler=_survey)(graph, inputs)


def _survey(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    aten = torch.ops.aten
    for node in graph.graph.nodes:
        if node.target in (aten.add.Tensor, aten.add_.Tensor) and node.kwargs.get("alpha", 1) != 1:
            products = [a for a in node.all_input_nodes if a.target is aten.mm.default and len(a.users) == 1]
            assert not products, f"{node.format_node()} is compiled without its factor"
    return make_boxed_func(graph.forward)


@in_turns(2)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_it_compiles_as_one_graph(case):
    torch.compiler.reset()
    op = operated(case, LAYOUTS["linear 12x18"])
    mine = op.input()
    y = torch.compile(op.model, fullgraph=True, backend=surveyed)(mine["x"])
    compare(op, y, mine, (1e-10, 1e-10))
