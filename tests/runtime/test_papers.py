"""Methods against W' as the paper or the authors' code has it: outputs and gradients in float64, with a bias and
without, on a layer that is wider and on one that is taller than it is long."""

from __future__ import annotations

import pytest
import torch
from layers import LAYOUTS, Tower, assert_close, compare, operated, perturb
from papers import PAPERS
from torch import nn

from surgery.language.library import load
from surgery.runtime.surgeon import apply

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
