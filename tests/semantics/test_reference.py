"""Every shipped spec, and published methods that do not ship, against a second reading of the language that
shares no code with it: starts, W' and b' merged and unmerged, and the gradients of a training step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layers import Tower, perturb
from reference import Reading, compare_gradients
from torch import nn

from surgery.language.library import load, parse, retarget
from surgery.runtime.apply import apply

HERE = Path(__file__).parents[1]
OUT, IN = 32, 64
FILES = [path for path in sorted([*(HERE.parent / "specs").glob("*.surg"), *(HERE / "methods").glob("*.surg")])
         if "target " in path.read_text(encoding="utf-8")]
# Sizes that divide the sides of the layer, or that are small.
SETTINGS = {"c3a": {"block": 8}, "miss_bat": {"rank": 8}, **{f"road_{n}": {"group": 8} for n in (1, 2, 4)},
            "shira": {"rank": 4}, "vblora": {"length": 16}, "waveft": {"count": 100}, "flora_tucker": {"kernel": 2},
            "fourierft": {"count": 100}, "loca": {"count": 100}, "diablo": {"blocks": 8}, "peanut": {"rank": 8}}
EXACT = 1e-10


def settings_of(path: Path) -> dict:
    found = SETTINGS.get(path.stem, {})
    return {**found, "dropout": 0.0} if "dropout: float" in path.read_text(encoding="utf-8") else found


def numpy_of(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: tensor.detach().numpy().copy() for key, tensor in tensors.items()}


def off(found: torch.Tensor, wanted: np.ndarray) -> float:
    assert tuple(found.shape) == wanted.shape
    return float(np.linalg.norm(found.detach().numpy() - wanted) / (1 + np.linalg.norm(wanted)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_spec_is_what_its_text_says(path):
    settings, text = settings_of(path), path.read_text(encoding="utf-8")
    spec, reading = load(path, **settings), Reading(text, **settings)
    assert len(spec.targets) == len(reading.targets) > 0
    for index, target in enumerate(spec.targets):
        target = target.model_copy(update={"kind": "any", "exclude": (), "override": False})
        torch.manual_seed(1)
        layer = nn.Linear(IN, OUT).double()
        weight, bias, x = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy(), torch.randn(5, IN)
        model = Tower(layer)
        model.config = SimpleNamespace(num_attention_heads=2, head_dim=16)
        draw = torch.Generator().manual_seed(2)
        batches = [(torch.randn(50, IN, generator=draw).double(), torch.randn(50, OUT, generator=draw).double())
                   for _ in range(2)]
        surgeon = apply(model, retarget(spec.model_copy(update={"targets": (target,)}), "layers.0"),
                        dtype=torch.float64, data=batches, loss=lambda m, batch: (m(batch[0]) * batch[1]).sum())
        read, turned = (np.concatenate([each.numpy() for each in side]) for side in zip(*batches))
        data = {"G": turned.T @ read / 2, "C": read.T @ read}
        (adapter,) = surgeon.adapters.values()

        def operated(tensors, starts=None):
            return reading.operated(weight, bias, tensors, index, {"layer": 0, "depth": 0.0, "layers": 1, "kernel": 1, "head_size": 16},
                                    starts, data)

        starts: dict[str, np.ndarray] = {}
        operated(numpy_of(adapter.values()), starts)
        for key, start in starts.items():
            found = adapter.values()[key]
            if "_singular" in text:  # whose vectors have no sign of their own
                found, start = found.abs(), abs(start)
            assert off(found, start) <= EXACT, f"the start of {key}"

        perturb(model)
        model.train("\n  noise " not in text)  # which a training step draws: the reading has its mean
        y, direction = model(x.double()), torch.randn(5, OUT).double()
        tensors = numpy_of(adapter.values())
        wanted = operated(tensors)
        assert off(y, x.numpy() @ wanted[0].T + wanted[1]) <= EXACT
        trained = {key: t for key, t in adapter.tensors().items() if t.requires_grad}
        found = dict(zip(trained, torch.autograd.grad((y * direction).sum(), list(trained.values()))))
        found = {key: g.reshape(tensors[key].shape) for key, g in found.items()}

        def scalar(tensors):
            w, b = operated(tensors)
            return float(((x.numpy() @ w.T + b) * direction.numpy()).sum())

        assert compare_gradients(reading, scalar, tensors, numpy_of(found), 1) >= len(found) / 2
        surgeon.merge()
        assert max(off(layer.weight, wanted[0]), off(layer.bias, wanted[1])) <= EXACT


PRECEDENCE = """
spec s(a: int = 3, share: float = 50%)
# a bias too, and a second step of one name
update own(k: int = 2, c: float = 2) {
  check k >= 1
  param A[out, in] = if k + 1 == 3 and not k > 3 then c - 1 - 1 / 2 else 7
  return -A * 2 / 4 - A @ A.T @ A / in + (if c >= 2 or false then 1 else 0) * A
}
update lift(scale: float = 1) on bias { param v[out] = scale / 4
  return v * b }
transform mix() on n { param g = norm(W) / 10
  param M[n, n] = 0
  return I(n) - g * M - M @ M }
target linear "**" except "x" shifted untie {
  post mix() with bias
  add own(c = a / 2 + 1) dropout(0)
  pre mix() on in
  add own(k = 2 * a - 3)
  add lift(scale = -share)
  pre mix()
}
"""


def test_precedence_order_and_scope():
    """What no shipped spec says: signs, chains of operators, conditions, steps out of order, a norm of the operand."""
    torch.manual_seed(1)
    layer = nn.Linear(2, 2).double()
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    surgeon = apply(Tower(layer), parse(PRECEDENCE), dtype=torch.float64)
    (adapter,) = surgeon.adapters.values()
    for size in (0.0, 0.3):
        perturb(surgeon.model, size)
        starts: dict[str, np.ndarray] = {}
        wanted = Reading(PRECEDENCE).operated(weight, bias, numpy_of(adapter.values()), starts=starts)
        assert all(off(found, value) <= EXACT for found, value in zip(adapter.weights(layer), wanted))
        assert size or all(off(adapter.values()[key], start) <= EXACT for key, start in starts.items())
    assert set(starts) == {"post_mix.g", "post_mix.M", "add_own.A", "pre_mix.g", "pre_mix.M", "add_own_2.A",
                           "add_lift.v",
                           "pre_mix_2.g", "pre_mix_2.M"}
