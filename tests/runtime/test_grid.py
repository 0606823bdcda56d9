"""The grid of placements and transformations in examples/grid: all of it is there, and each is the W' that its name says."""

from __future__ import annotations

import pytest
import torch
from grid import FOLDER, specs
from layers import Tower, assert_close, perturb
from torch import Tensor, nn

from surgery.cli.options import opened_together
from surgery.language.library import parse
from surgery.runtime.apply import apply


def test_the_folder_is_the_grid() -> None:
    """`python tests/grid.py` writes it; a folder is all its specs where several are taken."""
    assert {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.surg")} == specs()
    assert len(specs()) == 2 * 2 * 7 and list(opened_together([str(FOLDER)], (), ())) == sorted(specs())


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _cayley(k: Tensor) -> Tensor:
    return torch.linalg.solve(_eye(k.shape[-1]) - k / 2, _eye(k.shape[-1]) + k / 2)


def _mirrors(*vectors: Tensor) -> Tensor:
    q = _eye(len(vectors[0]))
    for v in vectors:
        q = q - 2 * torch.outer(q @ v, v) / v.dot(v)
    return q


# The matrix of n rows that a transformation makes; `x` is what it acts on, its rows those of the side.
MATRICES = {
    "diagonal": lambda x, d: torch.diag(d),
    "scale": lambda x, g: g * _eye(len(x)),
    "orthogonal": lambda x, C, D: _cayley(C @ D.T - D @ C.T),
    "skew": lambda x, C, D: _eye(len(x)) + min(1, 1 / (C.norm() + D.norm() + 1e-6)) * (D @ C.T - C @ D.T),
    "block": lambda x, Q: torch.block_diag(*_cayley(Q - Q.mT)),
    "householder": lambda x, U, V: _mirrors(*U.T, *V.T.flip(0)),
    "magnitude": lambda x, m: torch.diag(m / x.norm(dim=1)),
}


@pytest.mark.parametrize("name", specs())
def test_a_spec_is_what_its_name_says(name: str) -> None:
    placement, transformation, side = name.split("_")
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    surgeon = apply(Tower(layer), parse(specs()[name]).retarget("layers.0"), dtype=torch.float64)
    perturb(surgeon.model)
    values = {tuple(key.split(".")): value.detach() for key, value in surgeon.adapters["layers.0"].values().items()}
    update = 2 * values.pop(("add_low_rank", "B")) @ values.pop(("add_low_rank", "A"))
    x = weight + update if placement == "post" else weight
    of_side = x if side == "out" else x.T
    matrix = MATRICES[transformation](of_side, **{key: value for (_, key), value in values.items()})
    turned = matrix @ x if side == "out" else x @ matrix
    surgeon.merge()
    assert_close(layer.weight, turned + update * (placement == "pre"), 1e-10)
    assert torch.equal(layer.bias, bias)
