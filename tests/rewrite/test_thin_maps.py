"""Maps of thin factors are in float32 as exact as the dense formula, whatever the lengths and directions of columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.language.parser import parse_expression
from surgery.rewrite.cheaper_forms import cheapest
from surgery.semantics.evaluate import evaluate

N, R = 40, 3
NAMES = {"n": N, **{name: Expr("param", (), f"own.{name}", (N, R)) for name in "xy"},
         "c": Expr("param", (), "own.c", ())}
MAPS = ("cayley(x @ y.T - y @ x.T)", "expm(x @ y.T - y @ x.T)", "cayley(2.5 * (x @ y.T - y @ x.T))",
        "cayley(c * (x @ y.T - y @ x.T))", "cayley(x @ y.T)", "expm(x @ y.T)", "inverse(I(n) + x @ y.T)")
APART = torch.logspace(-1.5, 1.5, R)
LYING: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "as drawn": lambda x, y: (x, y),
    "one short": lambda x, y: (x, 1e-4 * y),
    "each pair apart in another way": lambda x, y: (x * APART, y / APART),
    "columns apart": lambda x, y: (x * APART, y),
    "columns apart by 1e6": lambda x, y: (x * APART**2, y / 10),
    "columns alike": lambda x, y: (x[:, :1] + 1e-3 * x, y[:, :1] + 1e-3 * y),
    "as it starts": lambda x, y: (x, x.clone()),
    "near each other": lambda x, y: (3 * x, 3 * x + 1e-2 * y),
    "a column of zeros": lambda x, y: (x * torch.tensor([1.0, 0, 1]), y),
    "one of zeros": lambda x, y: (x, 0 * y),
    # whose squares float32 has no numbers for
    "one nearly nothing": lambda x, y: (1e-30 * x, y),
    "one endless, one nearly nothing": lambda x, y: (1e25 * x, 1e-25 * y),
    "endless and nearly nothing in turn": lambda x, y: (x * torch.tensor([1e25, 1, 1e-25]),
                                                        y * torch.tensor([1e-25, 1, 1e25])),
    "a column of zeros beside an endless one": lambda x, y: (x * torch.tensor([1.0, 0, 1]),
                                                             y * torch.tensor([1, 1e25, 1])),
}


def results(expr: Expr, leaves: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The value and its gradients in a direction."""
    given = {key: t.to(dtype).requires_grad_() for key, t in leaves.items()}
    value = dense(expr, {**given, "weight": torch.zeros(1, 1, dtype=dtype)})
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    used = {key: t for key, t in given.items() if key in {node.data for node in NAMES.values() if node != N}}
    found = torch.autograd.grad(value, list(used.values()), direction, allow_unused=True)
    return {"the value": value.detach(), **{f"the gradient of {key}": g for key, g in zip(used, found) if g is not None}}


def off(found: Tensor, wanted: Tensor, size: Tensor | float) -> float:
    return ((found.double() - wanted).norm() / (wanted.norm() + size)).item()


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("text", MAPS)
def test_a_map_of_thin_factors_is_as_exact_as_the_dense_formula(text, lying):
    torch.manual_seed(0)
    x, y = LYING[lying](*torch.randn(2, N, R) / N**0.5)
    leaves = {"own.x": x, "own.y": y, "own.c": torch.tensor(0.7)}
    expr = evaluate(parse_expression(text), NAMES)
    wanted, plain = results(expr, leaves, torch.float64), results(expr, leaves, torch.float32)
    for what, value in results(cheapest(expr), leaves, torch.float32).items():
        size = 1e-9  # where nothing is wanted
        most = 3 * off(plain[what], wanted[what], size) + 3e-6
        error = off(value, wanted[what], size)
        assert error <= most, f"{what} is off by {error:.1e}, {most:.1e} is allowed"


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_thin_exponential_is_exact_however_far_it_turns(size):
    """The dense one is off by 5e-5 of 100 radians: k is divided by a power of two, and what comes of it squared as
    often."""
    torch.manual_seed(0)
    leaves = {"own.x": torch.randn(N, R) * (size / N)**0.5, "own.y": torch.eye(N)[:, :R] * size**0.5}
    expr = evaluate(parse_expression("expm(x @ y.T - y @ x.T)"), NAMES)
    wanted = results(expr, leaves, torch.float64)
    for what, value in results(cheapest(expr), leaves, torch.float32).items():
        assert off(value, wanted[what], 0.0) < 3e-6
