"""A program that has W' as one matrix for the value and the input's gradient, and its other gradients by activations:
where it may run, and what it saves."""

from __future__ import annotations

import pytest
import torch
from formulas import formula
from torch import nn

import surgery
from surgery.codegen.candidates import Candidate
from surgery.codegen.compiled import Compiled
from surgery.codegen.kernels_permute import add_circulant
from surgery.codegen.program_text import step_text
from surgery.ir.operations import OPERATIONS
from surgery.language.library import load
from surgery.planning.machines import machine

SIZES = 256, 256


@pytest.fixture
def layer():
    """A layer that c3a operates on, and its adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*SIZES)).requires_grad_(False)
    surgeon = surgery.apply(model, load("c3a"))
    return model.train(), next(iter(surgeon.adapters.values()))


def candidates(name: str, dtype: str = "float32") -> tuple[Candidate, ...]:
    """The programs of a shipped spec for a step of 512 tokens, the one that runs first."""
    compiled = Compiled.supposed(formula(load(name), 1024, 1024))
    return compiled.candidates(tokens=512, machine=machine("cpu", dtype))


def test_a_product_with_the_whole_weight_takes_the_place_of_the_update():
    plan = candidates("c3a")[0]
    step = step_text(plan.written, plan.needs)
    assert plan.at_once is not None and step is not None
    forward, backward = step.source.split("\n\n")
    assert forward.count(" @ ") == backward.count(" @ ") == 1 and "frozen" not in step.source
    assert not any(word in forward for word in ("circulate", "spectrum")) and backward.count("circulate_dot(") == 1


def test_a_gain_between_two_bases_goes_into_the_one_that_trains():
    plan = candidates("randlora")[0]
    step = step_text(plan.written, plan.needs)
    # x W', and backwards g W', the bases' gradient from g B: four products for seven
    assert step is not None and step.source.count(" @ ") == 3 and step.source.count("outer(") == 1
    assert "column_dot" not in step.source


def test_where_the_set_up_is_rounded_a_small_update_is_no_part_of_the_weight():
    assert all(each.at_once is None for dtype in ("bfloat16", "float16") for each in candidates("c3a", dtype))


@pytest.mark.parametrize("name", ["lora", "sora", "dora", "hra", "loha", "boft"])
def test_thin_factors_and_what_trains_through_the_weight_are_left_to_activations(name):
    assert all(each.at_once is None for each in candidates(name))


def test_it_runs_for_steps_in_one_dtype_that_nobody_looks_into(layer):
    model, adapter = layer
    frozen = adapter.frozen(model[0])
    assert adapter.program(frozen, 2048).plan.at_once is not None
    assert adapter.program(frozen, 2048, torch.bfloat16).plan.at_once is None  # under autocast
    model[0].weight.requires_grad_()  # as `train` has it: its own gradient comes from the layer's map
    assert adapter.program(adapter.frozen(model[0]), 2048).plan.at_once is None
    model[0].weight.requires_grad_(False)
    model.eval()
    assert adapter.program(frozen, 2048).plan.at_once is None


@pytest.mark.parametrize("p, q, b", [(1, 1, 1), (2, 3, 1), (3, 2, 5), (1, 4, 8), (4, 1, 2)])
def test_circulant_blocks_are_added_as_they_are(p, q, b):
    a, c = torch.randn(q * b, p * b).double().T, torch.randn(p, q, b).double()
    assert torch.equal(add_circulant(a, c), a + OPERATIONS["circulant"].value(None, [c], c))
