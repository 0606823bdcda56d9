"""Sums of terms with maps on both sides: in training, in its gradients and merged, a layer is its dense formula."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
import sums
import torch
from each import of_some
from layers import Tower, assert_close
from torch import nn

from surgery.codegen.program_text import step_text
from surgery.codegen.supposed_device import runs_as_on, steps_of
from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.runtime.apply import apply

CASES = sorted((Path(__file__).parents[1] / "data" / "sums").glob("*.surg"))
# What the suite runs: twelve seeds, and twelve of the week. SURGERY_EXAMPLES=3000 runs so many others.
EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", 0))
WEEK = 1000 * (date.today().toordinal() // 7)
SEEDS = range(10**9, 10**9 + EXAMPLES) if EXAMPLES else (*range(12), *range(WEEK, WEEK + 12))
SIZES = ((64, 128, 24), (96, 48, 200), (40, 40, 7))


def agrees(text: str, out: int, in_: int, tokens: int) -> None:
    """Every program of the layer gives the output and gradients of x W'ᵀ + b', and W' merged the output."""
    torch.manual_seed(out)
    layer = nn.Linear(in_, out, bias=out == 40).double()
    base = {name: p.detach().clone() for name, p in layer.named_parameters()}
    surgeon = apply(Tower(layer), parse(text).retarget("**"), dtype=torch.float64)
    (adapter,) = surgeon.adapters.values()
    leaves = {key: tensor.requires_grad_() for key, tensor in adapter.tensors().items()}
    x, up = torch.randn(tokens, in_).double().requires_grad_(), torch.randn(tokens, out).double()
    wanted_weight = dense(adapter.formula.weight, {**leaves, "weight": base["weight"]})
    wanted = x @ wanted_weight.mT + base.get("bias", 0)
    of = [x, *leaves.values()]
    gradients = torch.autograd.grad(wanted, of, up, retain_graph=True)
    running = adapter.programs((runs_as_on("cpu"), torch.float64))
    best = running[True]
    for program in dict.fromkeys((best, *best.over, *(each for _, each in best.up_to))):
        running[True] = program
        y = layer.train()(x)
        assert_close(y, wanted, 1e-9, f"the output by {program.strategy}")
        for key, found, gradient in zip(("x", *leaves), torch.autograd.grad(y, of, up), gradients):
            assert_close(found, gradient, 1e-9, f"the gradient of {key} by {program.strategy}")
    running[True] = best
    surgeon.merge()
    assert_close(layer.weight, wanted_weight, 1e-9, "the merged weight")
    assert_close(layer(x), wanted, 1e-9, "the merged output")


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
@of_some("sizes", [], [(SIZES[0],), (SIZES[2],)])  # without a bias, and with one
def test_a_spec_that_was_wrong_once(case, sizes):
    agrees(case.read_text(encoding="utf-8"), *sizes)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_sum(seed):
    device = ("cpu", "cuda", "xpu")[seed % 3]  # the frozen product summed last, with one-pass kernels or without
    with steps_of(device):
        agrees(sums.text(seed), *SIZES[seed % len(SIZES)])


JOINED = """spec joined
update mixed() {
  param B[out, 2] ~ normal(std = 0.1)
  param A[2, in] ~ normal(std = 0.1)
  param d[out] ~ normal(std = 1)
  param P[out, 3] ~ normal(std = 0.1)
  param Q[3, in] ~ normal(std = 0.1)
  return FORMULA
}
target linear shifted { add mixed() }
"""


@pytest.mark.parametrize("formula", [
    "diag(d) @ (W + B @ A) - 2 * P @ Q",
    "(W + 3 * B @ A) @ (I(in) + Q.T @ Q) + diag(d) @ (I(out) + P @ P.T) @ W",
    "diag(d) @ W - 2 * (I(out) + P @ P.T) @ (W + B @ A @ (I(in) + Q.T @ Q))",
])
def test_thin_products_are_joined(formula):
    """Of one activation, or into one value: one product, in both passes."""
    text = JOINED.replace("FORMULA", formula)
    agrees(text, 96, 64, 11)
    compiled = apply(Tower(nn.Linear(96, 64, bias=False)), parse(text).retarget("**")).plan.placed[0].compiled
    plan = next(each for each in compiled.candidates() if each.strategy == "activations")
    step = step_text(plan.written, plan.needs)
    assert step is not None
    assert [step.source.count(product) for product in ("thin(x, ", "thin(grad, ", "outer(grad, ")] == [1, 1, 1]
