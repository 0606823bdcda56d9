"""Sums of terms with maps on both sides: in training, in its gradients and merged, a layer is its dense formula."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
import sums
import torch
from layers import Tower, assert_close
from torch import nn

from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.runtime.surgeon import apply

CASES = sorted((Path(__file__).parents[1] / "data" / "sums").glob("*.surg"))
# What the suite runs: eighteen seeds, and eighteen of the week. SURGERY_EXAMPLES=3000 runs so many others.
EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", 0))
WEEK = 1000 * (date.today().toordinal() // 7)
SEEDS = range(10**9, 10**9 + EXAMPLES) if EXAMPLES else (*range(18), *range(WEEK, WEEK + 18))
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
    best = adapter._programs[True]
    for program in dict.fromkeys((best, *best.over, *(each for _, each in best.up_to))):
        adapter._programs[True] = program
        y = layer.train()(x)
        assert_close(y, wanted, 1e-9, f"the output by {program.strategy}")
        for key, found, gradient in zip(("x", *leaves), torch.autograd.grad(y, of, up), gradients):
            assert_close(found, gradient, 1e-9, f"the gradient of {key} by {program.strategy}")
    adapter._programs[True] = best
    surgeon.merge()
    assert_close(layer.weight, wanted_weight, 1e-9, "the merged weight")
    assert_close(layer(x), wanted, 1e-9, "the merged output")


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_spec_that_was_wrong_once(case):
    for sizes in (SIZES[0], SIZES[2]):  # without a bias, and with one
        agrees(case.read_text(encoding="utf-8"), *sizes)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_sum(seed):
    agrees(sums.text(seed), *SIZES[seed % len(SIZES)])
