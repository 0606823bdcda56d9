"""Operations at their corners: singular values that are equal or zero, bounds that are met, what has no inverse."""

from __future__ import annotations

import math

import pytest
import torch

from surgery.diagnostics import SurgeryError
from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.ir.sizes import symbol
from surgery.language.parser import parse_expression
from surgery.semantics.evaluate import evaluate

MATRICES = {"zero": torch.zeros(4, 6), "the identity": torch.eye(4, 6), "tall": torch.randn(6, 4),
            "of rank one": torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 7.0)), "negative": -torch.eye(4),
            "in halves": torch.randn(4, 6).half()}

PARTS = ("left_singular", "singular", "right_singular")


def value(text: str, **tensors: torch.Tensor) -> torch.Tensor:
    names = {name: Expr("param", (), name, tuple(t.shape)) for name, t in tensors.items()}
    return dense(evaluate(parse_expression(text), names), {"weight": tensors["A"], **tensors})


@pytest.mark.parametrize("a", MATRICES.values(), ids=MATRICES)
def test_both_sides_and_the_values_make_the_best_matrix_of_a_rank(a):
    k = min(a.shape)
    parts = f"left_singular(A, {k}) @ diag(singular(A, {k})) @ right_singular(A, {k})"
    near = 1e-2 if a.dtype is torch.half else 1e-5
    assert torch.allclose(value(parts, A=a), a, atol=near)
    left, right = f"left_singular(A, {k})", f"right_singular(A, {k})"
    for gram in (f"{left}.T @ {left}", f"{right} @ {right}.T"):
        assert torch.allclose(value(gram, A=a), torch.eye(k, dtype=a.dtype), atol=near)
    least = value("left_singular(A, 2) @ diag(singular(A, 2)) @ right_singular(A, 2)", A=a) - a
    assert torch.allclose(least.float().norm(), value(f"singular(A, {k})", A=a).float()[2:].norm(), atol=4 * near)


@pytest.mark.parametrize("text", [f"{part}(A, 2)" for part in PARTS])
@pytest.mark.parametrize("a", list(MATRICES.values())[:5], ids=list(MATRICES)[:5])
def test_no_gradient_of_a_singular_part_is_nan(text, a):
    a = a.double().requires_grad_()
    made = value(text, A=a)
    (found,) = torch.autograd.grad((made * torch.randn(made.shape, dtype=torch.float64)).sum(), a)
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 3)])
def test_gradients_of_singular_parts_are_those_of_differences_twice(shape):
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def parts(a):
        return [value(f"{part}(A, {k})", A=a) for part in PARTS for k in (2, 3)]

    assert torch.autograd.gradcheck(parts, a)
    assert torch.autograd.gradgradcheck(parts, a)


def test_singular_parts_are_those_of_each_matrix_of_a_stack():
    stack = torch.randn(3, 4, 6, dtype=torch.float64)
    found = torch.vmap(lambda a: value("right_singular(A, 2)", A=a))(stack)
    gradients = torch.vmap(torch.func.grad(lambda a: value("right_singular(A, 2)", A=a).sum()))(stack)
    for a, rows, gradient in zip(stack, found, gradients):
        a = a.clone().requires_grad_()
        made = value("right_singular(A, 2)", A=a)
        assert torch.allclose(rows, made)
        assert torch.allclose(gradient, torch.autograd.grad(made.sum(), a)[0])


@pytest.mark.parametrize("text, wanted", [("relu(A)", [0, 0, 0, 1, 1]), ("sign(A)", [0, 0, 0, 0, 0]),
                                          ("clamp(A, -1, 1)", [0, 1, 1, 1, 0]),
                                          ("clamp(0.5, A, 5)", [0, 0, 0, 1, 1])])
def test_a_corner_has_the_gradient_that_the_reference_says(text, wanted):
    a = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    made = value(text, A=a)
    found = torch.autograd.grad(made.sum(), a)[0] if made.requires_grad else torch.zeros(5)
    assert found.tolist() == pytest.approx(wanted)


def test_what_has_no_inverse_is_no_number():
    assert not value("inverse(A)", A=torch.ones(3, 3)).isfinite().all()


def test_numbers_of_compile_time_have_the_same_functions():
    for text, wanted in {"pi": math.pi, "sign(-3)": -1, "relu(-2)": 0, "relu(2.5)": 2.5, "clamp(7, 0, 5)": 5,
                         "clamp(if 2 > 1 then 3 else 4, 3, 5)": 3}.items():
        assert evaluate(parse_expression(text), {}) == wanted
    assert evaluate(parse_expression("pi"), {"pi": 3}) == 3  # a name of the spec's own goes first
    assert str(evaluate(parse_expression("clamp(n, 1, 8)"), {"n": symbol("n")})) == "clamp(n, 1, 8)"


@pytest.mark.parametrize("text", ["stacked(A, v)", "stacked(A, A.T)", "inverse(A)", "singular(A, 5)",
                                  "right_singular(v, 1)", "clamp(A, v, 1)"])
def test_shapes_that_do_not_fit_are_told(text):
    with pytest.raises(SurgeryError) as told:
        value(text, A=torch.ones(4, 6), v=torch.ones(6))
    assert told.value.diagnostics[0].code == "shape-mismatch"
    assert told.value.diagnostics[0].message.startswith(f"`{text.partition('(')[0]}` ")
