"""Dropout acts on the input of its update alone, in training alone: y = T (W x + U drop(x)) for a post T."""

from __future__ import annotations

import oracle as o
import pytest
import torch
from dropout import METHODS, P, by_hand, shipped
from layers import LAYOUTS, Tower, assert_close, gradients, operated, perturb
from torch.nn import functional as F

from surgery.codegen import masks
from surgery.codegen.supposed_device import steps_of
from surgery.language.library import parse
from surgery.runtime.apply import apply

LAYOUT = LAYOUTS["linear 12x18"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("device, drawn", [("cpu", masks.mask), ("cuda", masks.number)])
def test_training_with_a_known_mask(name, device, drawn):
    """By the step of a CPU, and by that of a GPU in plain operations."""
    op = operated(shipped(name), LAYOUT, dropout=P)
    mine, x, leaves = op.input(), op.input(), op.leaves()
    torch.manual_seed(11)
    with steps_of(device):
        y = op.model(mine["x"])
    torch.manual_seed(11)
    kept = masks.masked(torch.ones_like(op.x), drawn(op.x, P))
    expected = by_hand(op, x["x"], x["x"] * kept / (1 - P), leaves)
    assert_close(y, expected, 1e-10)
    direction = torch.randn_like(y)
    actual = gradients(y, direction, {**mine, **op.parameters})
    for key, gradient in gradients(expected, direction, {**x, **leaves}).items():
        assert_close(actual[key], gradient, 1e-10, key)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
def test_evaluation_drops_nothing(name, layout):
    op = operated(shipped(name), layout, dropout=P)
    op.model.eval()
    assert_close(op.model(op.x), op.oracle(op.x, op.leaves()), 1e-10)
    op.model.train()
    assert any(not torch.equal(op.model(op.x), op.model(op.x)) for _ in range(5))
    op.surgeon.merge()
    assert_close(op.model(op.x), op.oracle(op.x, op.leaves()), 1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_over_masks_is_the_evaluated_output(name):
    op = operated(shipped(name), LAYOUT, dropout=P)
    x = torch.randn(18, dtype=torch.float64).expand(20_000, 18)
    samples = op.model(x)
    error = (samples.mean(0) - op.model.eval()(x[0])).abs()
    assert (error < 5 * samples.std(0) / len(x) ** 0.5).all() and (samples.std(0) > 1e-3).all()


def test_convolution_drops_entries_of_its_input():
    op = operated(shipped("lora"), LAYOUTS["Conv2d 12x18"], dropout=P)
    torch.manual_seed(11)
    y = op.model(op.x)
    torch.manual_seed(11)
    update = o.convolution(masks.masked(op.x, masks.mask(op.x, P)) / (1 - P), o.low_rank(op.p, 3, 5), None)
    assert_close(y, o.convolution(op.x, op.weight, op.bias) + update, 1e-10)


def test_an_embedding_drops_whole_tokens():
    op = operated(shipped("lora"), LAYOUTS["Embedding 18x12"], dropout=P)
    ids = torch.arange(18).repeat(40)
    share = (op.model(ids) - op.weight[ids]) / o.low_rank(op.p, 3, 5)[ids]
    kept = share.mean(1)
    assert (share.std(1) < 1e-9).all() and set(kept.mul(1e6).round().div(1e6).tolist()) == {0.0, round(1 / (1 - P), 6)}
    assert abs((kept > 0).double().mean() - (1 - P)) < 0.1


def test_each_update_has_its_own_mask():
    """Two updates that cancel, but for their masks; and a third that has none."""
    text = ('spec s()\n'
            'target linear "**" { add low_rank(2) dropout(40%)  add low_rank(2) dropout(0.4)  add low_rank(2) }')
    model = Tower(torch.nn.Linear(18, 12)).double()
    tensors = apply(model, parse(text), dtype=torch.float64).adapters["layers.0"].tensors()
    perturb(model)
    with torch.no_grad():
        tensors["add_low_rank_2.A"].copy_(tensors["add_low_rank.A"])
        tensors["add_low_rank_2.B"].copy_(-tensors["add_low_rank.B"])
    x = torch.randn(18, dtype=torch.float64).expand(20_000, 18)
    whole = model.layers[0].get_parameter("weight") + 8 * tensors["add_low_rank_3.B"] @ tensors["add_low_rank_3.A"]
    noise = model(x) - F.linear(x, whole, model.layers[0].bias)
    assert (noise.std(0) > 1e-2).all() and (noise.mean(0).abs() < 5 * noise.std(0) / len(x) ** 0.5).all()
    with torch.no_grad():
        tensors["add_low_rank.B"].zero_(), tensors["add_low_rank_2.B"].zero_()
    assert_close(model(x), F.linear(x, whole, model.layers[0].bias), 1e-10, "the third alone")
