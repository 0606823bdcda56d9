"""Methods against W' as the paper or the authors' code has it: outputs and gradients in float64, with a bias and
without, on a layer that is wider and on one that is taller than it is long."""

from __future__ import annotations

import math

import pytest
import torch
from case import Case
from layers import LAYOUTS, Tower, assert_close, compare, operated, perturb
from papers import PAPERS
from torch import nn

from surgery.language.library import load
from surgery.runtime.apply import apply

EXACT = 1e-10


@pytest.mark.parametrize("layout", ["linear 12x18", "linear 18x12 without bias"])
@pytest.mark.parametrize("case", PAPERS, ids=str)
def test_a_method_is_its_papers(case, layout):
    op = operated(case, LAYOUTS[layout])
    x, leaves = op.input(), op.leaves()
    compare(op, op.oracle(x["x"], leaves), x, leaves)
    if op.bias is not None:
        assert sum(p.numel() for p in op.surgeon.parameters()) == case.count(*op.weight.shape)
    assert len(op.adapter.formula.claims) == case.claims


def starts(name, out, in_):
    """What a method's parameters start at, by their own names."""
    model = Tower(nn.Linear(in_, out)).double()
    surgeon = apply(model, Case(name, "", None, None).spec(), dtype=torch.float64, check=False)
    return {key.rpartition(".")[2]: value.detach() for key, value in surgeon.adapters["layers.0"].values().items()}


def test_mora_turns_by_the_angles_of_its_code():
    inv_freq = 1.0 / (10000 ** (torch.arange(0, 16, 2).double() / 16))
    freqs = torch.outer(torch.arange(2).double(), inv_freq)
    angles = torch.cat((freqs, freqs), dim=-1).flatten()
    start = starts("mora_rope", 32, 48)  # of whose three groups of inputs two are kept
    assert_close(start["c"], angles.cos(), EXACT)
    assert_close(start["s"], angles.sin(), EXACT)


def test_loca_has_orthonormal_cosine_waves():
    start = starts("loca", 40, 48)
    for tensor in (start["C"], start["D"]):
        n = len(tensor)
        waves = [[math.sqrt((1 + (k > 0)) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)]
                 for k in range(n)]
        assert_close(tensor, torch.tensor(waves, dtype=torch.float64), EXACT)


def test_s2ft_trains_the_same_channels_of_up_and_down():
    """The code adds a run of outputs to up's and reads a run of down's inputs."""
    model = Tower(nn.Linear(6, 8), nn.Linear(8, 6)).double()
    up, down = (layer.weight.detach().clone() for layer in model.layers)
    spec = load("s2ft", count=3)
    surgeon = apply(model, spec.retarget("layers.0", at=1).retarget("layers.1", at=2), dtype=torch.float64)
    perturb(model)
    (rows,), (columns,) = (list(adapter.values().values()) for adapter in surgeon.adapters.values())
    surgeon.merge()
    up[:3] += rows
    down[:, :3] += columns
    assert_close(model.layers[0].weight, up, EXACT)
    assert_close(model.layers[1].weight, down, EXACT)
