"""Norms in parts: where terms take each other away the sum of their squares is no norm."""

import pytest
import torch
from torch import Tensor

from surgery.ir.dense import dense
from surgery.ir.expression import Expr, walk
from surgery.ir.operations import make
from surgery.language.parser import parse_expression
from surgery.rewrite.cheaper_forms import cheapest
from surgery.semantics.evaluate import evaluate

LEAVES = {"W": Expr("weight", (), "weight", (9, 7)), **{name: Expr("param", (), name, shape) for name, shape in (
    ("B", (9, 2)), ("A", (2, 7)), ("d", (7,)), ("e", (9,)), ("g", ()), ("X", (7, 7)), ("Y", (7, 7)), ("S", (3, 3, 3)))}}


def values_of(expr: Expr) -> list[Tensor]:
    """Its value, and its gradients in all leaves, in float32."""
    torch.manual_seed(0)
    leaves = {leaf.data: torch.randn(leaf.shape, requires_grad=True) for leaf in LEAVES.values()}
    value = dense(expr, leaves)
    return [value, *torch.autograd.grad(value.sum() + sum(0 * each.sum() for each in leaves.values()), [*leaves.values()])]


def expression(text: str) -> Expr:
    return evaluate(parse_expression(text), {**LEAVES})


@pytest.mark.parametrize("norm", ["norm", "row_norm", "col_norm"])
@pytest.mark.parametrize("inner", [
    "W + B @ A - detach(W + B @ A)", "detach(W + B @ A) - B @ A - W", "2 * (W + B @ A) - 2 * detach(W) - 2 * detach(B @ A)",
    "(W + B @ A - detach(W + B @ A)) @ diag(d)", "g * (W + B @ A) - g * detach(W + B @ A)",
    "W - detach(W) + B @ A", "W + B @ A + 3 * (B @ A - detach(B) @ A)", "(W + B @ A) - (W + B @ A)", "(W - 0.3) - (W - 0.3)",
    "2 * (W + B @ A - B @ A) - 2 * (W - 0.3) - 0.6", "((W + B @ A) - (W + B @ A)) @ diag(d)"])
def test_what_takes_itself_away_is_squared_as_a_whole(norm, inner):
    """In parts ‖x - detach(x)‖ is the root of a rounding: 1e-3 of ‖x‖ in float32, with a gradient of any direction."""
    expr = expression(f"{norm}({inner})")
    for found, wanted in zip(values_of(cheapest(expr)), values_of(expr), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("inner", ["W + B @ A", "W - B @ A", "W + B @ A + detach(B @ A)", "detach(W) + B @ A"])
def test_other_norms_are_made_in_parts(inner):
    assert cheapest(make("row_norm", expression(inner))).op == "root"


@pytest.mark.parametrize("inner", ["W + 3 * B @ A", "W - 3 * B @ A", "W + g * B @ A"])
def test_products_with_the_rows_of_one_factor_are_summed_before_they_are_multiplied(inner):
    """‖w + c b A‖² = ‖w‖² + c ⟨b, c A Aᵀ b + 2 A w⟩: two products of rows and not three, where c is known."""
    expr = expression(f"row_norm({inner})")
    assert len([node for node in walk(cheapest(expr)) if node.op == "row_dot"]) == (3 if "g" in inner else 2)
    for found, wanted in zip(values_of(cheapest(expr)), values_of(expr), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("norm", ["norm", "row_norm"])
@pytest.mark.parametrize("inner", [
    "W @ {} + W @ {}", "W @ diag(d) @ {} + W @ diag(d) @ {}", "diag(e) @ W @ {} + diag(e) @ W @ {}",
    "diag(e) @ W @ {} - diag(e) @ W @ {} + B @ A", "block_diag(S) @ (W @ {} + W @ {})",
    "block_diag(S) @ (W @ diag(d) @ {} + W @ diag(d) @ {})"])
def test_two_terms_with_the_same_squares_are_both_counted(norm, inner):
    """After a rotation ‖x‖ is what it was, so that two parts of the sum are one expression; some are no products of
    rows, with which they were summed."""
    expr = expression(f"{norm}({inner.format('cayley(skew(X))', 'cayley(skew(Y))')})")
    for found, wanted in zip(values_of(cheapest(expr)), values_of(expr), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
