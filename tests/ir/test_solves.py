"""Rotations with a gradient of their own: autograd's values and gradients, and no more held than the result."""

import pytest
import torch
from torch import Tensor

from surgery.codegen.kernels_row_sums import weighted_dot
from surgery.ir import orthogonal_maps
from surgery.ir.orthogonal_maps import (
    cayley,
    centred,
    expm,
    mirrored,
    over_root,
    resolvent,
    root,
    rotation,
    skew,
    skew_core,
)


def plain(k: Tensor) -> Tensor:
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    return torch.linalg.solve(eye - k / 2, eye + k / 2)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4), (0, 2, 2), (1, 1)])
def test_cayley_has_the_gradients_of_the_formula(shape):
    torch.manual_seed(0)
    k = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cayley(k), plain(k))
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(cayley, k)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4), (2, 3, 4, 4), (0, 2, 2), (1, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_rotation_has_the_gradients_of_the_formula(shape, turned):
    """And that of a parameter that is seen turned lies in memory as the parameter does, so that torch takes it as it
    is."""
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(a: Tensor) -> Tensor:
        return rotation(a.mT if turned else a)

    torch.testing.assert_close(f(a), plain(a.mT - a if turned else a - a.mT))
    assert not a.numel() or torch.autograd.grad(f(a).sum(), a)[0].stride() == a.stride()
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(f, a)


@pytest.mark.parametrize("traced", [False, True])
def test_a_turn_of_thin_factors_has_the_gradients_of_the_formula(traced, monkeypatch):
    """For any t, which takes no gradient; where a graph has no solvers, too."""
    torch.manual_seed(0)
    x, y = (torch.randn(7, 2, dtype=torch.float64, requires_grad=True) for _ in "xy")
    monkeypatch.setattr(orthogonal_maps, "is_traced", lambda: traced)

    def turned(x: Tensor, y: Tensor) -> Tensor:
        columns = centred(x, y, torch.tensor([0.5, 3.0], dtype=x.dtype))
        return torch.eye(7, dtype=x.dtype) + columns @ skew_core(columns, -1.5) @ columns.mT

    wanted = plain(3 * (x @ y.mT - y @ x.mT))
    torch.testing.assert_close(turned(x, y), wanted)
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(turned, (x, y))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch.testing.assert_close(turned(x, y), wanted)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4), (0, 2, 2), (1, 1)])
def test_an_exponential_has_the_gradients_of_the_formula(shape):
    torch.manual_seed(0)
    k = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(expm(k), torch.linalg.matrix_exp(k))
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(expm, k)
    assert not k.numel() or not torch.autograd.grad(expm(k), k, torch.zeros_like(k))[0].any()


def off(f, formula, a: Tensor, direction: Tensor) -> tuple[float, float]:
    """How far the value of f and its gradient are in float32 from those of a formula in float64."""
    found, exact = a.clone().requires_grad_(), a.double().requires_grad_()
    value, wanted = f(found), formula(exact)
    pairs = [(value, wanted), (*torch.autograd.grad(value, found, direction),
                               *torch.autograd.grad(wanted, exact, direction.double()))]
    return tuple(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e7, 1e25])
def test_an_exponential_has_exact_gradients_however_large_those_of_its_value_are(size):
    """A loss that is scaled for float16, or summed over tokens, has large ones."""
    torch.manual_seed(0)
    a, direction = torch.randn(2, 3, 16, 16)
    assert max(off(expm, torch.linalg.matrix_exp, 0.1 * skew(a), size * direction)) < 1e-6


@pytest.mark.parametrize("n", [6, 7])
def test_a_rotation_by_far_is_as_exact_as_the_formula(n):
    torch.manual_seed(0)
    a, direction = torch.randn(2, n, n)

    def formula(a: Tensor) -> Tensor:
        return plain(a - a.mT)

    for f in (rotation, lambda a: cayley(skew(a))):
        for found, allowed in zip(off(f, formula, 1e3 * a, direction), off(formula, formula, 1e3 * a, direction)):
            assert found <= 3 * allowed


def test_a_rotation_of_what_is_no_number_is_none():
    a = torch.zeros(3, 3)
    a[1, 1] = torch.nan  # which a - aᵀ would have on its diagonal
    assert rotation(a).isnan().any() and skew(a).isnan().any()


def test_resolvent_has_the_gradients_of_the_formula():
    torch.manual_seed(0)
    m = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(resolvent(m), torch.linalg.inv(torch.eye(4, dtype=m.dtype) - m / 2))
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(resolvent, m)


def test_skew_has_the_gradients_of_the_formula():
    torch.manual_seed(0)
    a = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(skew(a), a - a.mT)
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(skew, a)


@pytest.mark.parametrize(("f", "formula"), [
    (cayley, plain), (skew, lambda a: a - a.mT), (rotation, lambda a: plain(a - a.mT))],
    ids=["cayley", "skew", "rotation"])
def test_under_transforms(f, formula):
    torch.manual_seed(0)
    k, direction = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f: torch.vmap(torch.func.jacrev(f))):
        torch.testing.assert_close(transform(f)(k), transform(formula)(k))
    found, wanted = (torch.func.jvp(each, (k,), (direction,))[1] for each in (f, formula))
    torch.testing.assert_close(found, wanted)


def test_cayley_holds_its_result_alone():
    k, saved = torch.randn(3, 4, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotation = cayley(k)
    assert {t.untyped_storage().data_ptr() for t in saved} == {rotation.untyped_storage().data_ptr()}


def test_weighted_sums_of_rows_under_transforms():
    torch.manual_seed(0)
    a, b, d = torch.randn(40, 5), torch.randn(40, 5), torch.randn(5)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(weighted_dot, 2)(a, b, d), a * b)
    each = torch.vmap(weighted_dot, in_dims=(0, 0, None))(a.view(4, 10, 5), b.view(4, 10, 5), d)
    torch.testing.assert_close(each.flatten(), weighted_dot(a, b, d))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 1), (4, 0)])
@pytest.mark.parametrize("zero", [False, True])
def test_mirrors_have_the_gradients_of_the_formula(shape, zero, monkeypatch):
    torch.manual_seed(0)
    u = torch.randn(shape, dtype=torch.float64)
    u[:, :int(zero)] = 0.0  # a column of zeros is no mirror
    u.requires_grad_()
    values, (gradient,) = mirrored(u), torch.autograd.grad(mirrored(u).square().sum(), u)
    monkeypatch.setattr(orthogonal_maps, "is_traced", lambda: True)
    torch.testing.assert_close(values, mirrored(u))
    torch.testing.assert_close(gradient, *torch.autograd.grad(mirrored(u).square().sum(), u))
    product = torch.eye(len(u), dtype=u.dtype)
    for column in u.detach().mT:
        product -= 2 * torch.outer(product @ column, column) / (column @ column).clamp_min(1e-300)
    torch.testing.assert_close(torch.eye(len(u), dtype=u.dtype) - 2 * u.detach() @ values.detach(), product)


def test_mirrors_and_roots_have_second_derivatives():
    torch.manual_seed(0)
    u = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    a = torch.rand(7, dtype=torch.float64, requires_grad=True)
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(mirrored, u) and order(root, a)


def test_a_root_is_flat_where_rounding_leaves_less_than_nothing():
    a = torch.tensor([4.0, 0.0, -1.0, torch.nan], requires_grad=True)
    (first,) = torch.autograd.grad(root(a).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    # what is no number stays none, and is not taken for less than nothing
    for values, expected in ((root(a), (2.0, 0.0, 0.0)), (first, (0.25, 0.0, 0.0)), (second, (-1 / 32, 0.0, 0.0))):
        torch.testing.assert_close(values, torch.tensor([*expected, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("traced", [False, True])
def test_a_quotient_by_a_root_is_none_where_rounding_leaves_less_than_nothing(traced, monkeypatch):
    monkeypatch.setattr(orthogonal_maps, "is_traced", lambda: traced)
    a = torch.full((4,), 6.0, requires_grad=True)
    s = torch.tensor([4.0, 0.0, -1.0, torch.nan], requires_grad=True)
    of_a, of_s = torch.autograd.grad(over_root(a, s).sum(), (a, s))
    for values, expected in ((over_root(a, s), (3.0, 0.0, 0.0)), (of_a, (0.5, 0.0, 0.0)), (of_s, (-0.375, 0.0, 0.0))):
        torch.testing.assert_close(values, torch.tensor([*expected, torch.nan]), equal_nan=True)
