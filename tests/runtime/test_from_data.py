"""Methods that start from data (examples/from_data), against what their authors' code computes of the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import surgery

FOLDER = Path(__file__).parents[2] / "examples" / "from_data"
OUT, IN, RANK, ALPHA = 9, 12, 3, 6


def lora_ga(w: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Direction ArB2r, scale `stable` with γ = 16 (code: Outsider565/LoRA-GA, layer.py)."""
    u, _, v = torch.svd(g)
    return v.T[:RANK] * OUT**0.25 / 16**0.5, u[:, RANK:2 * RANK] * OUT**0.25 / 16**0.5


def eva(w: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors of XᵀX are the right singular vectors of X (code: ml-jku/EVA, svd.py, without a mean)."""
    return torch.linalg.eigh(c)[1].flip(1)[:, :RANK].T, torch.zeros(OUT, RANK, dtype=w.dtype)


def corda(w: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """code: iboing/CorDA, decomposition.py, with sigma_fuse `UV`, of a covariance whose mean diagonal is 1, and with
    alpha / rank taken out of the singular values, as PEFT's has it."""
    covariance = c / c.diagonal().mean()
    covariance = covariance + torch.diag(torch.ones(IN, dtype=w.dtype) * covariance.diagonal().mean() * 0.01)
    u, s, v = torch.linalg.svd(w @ covariance, full_matrices=False)
    v, s = v @ torch.linalg.inv(covariance), s[:RANK] / (ALPHA / RANK)
    return v[:RANK] * s.sqrt().view(-1, 1), u[:, :RANK] * s.sqrt()


@pytest.mark.parametrize("start", [lora_ga, eva, corda])
def test_it_starts_where_the_authors_code_does(start: Callable) -> None:
    file = FOLDER / f"{start.__name__}.surg"
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    batches = [(torch.randn(20, IN, generator=draw).double(), torch.randn(20, OUT, generator=draw).double())
               for _ in range(3)]
    x, y = (torch.cat(each) for each in zip(*batches))
    w = model[0].weight.detach().clone()
    g = 2 * (x @ w.T + model[0].bias.detach() - y).T @ x / y.numel()
    spec = surgery.load(file, rank=RANK, alpha=ALPHA)
    assert surgery.check(file) == []
    surgeon = surgery.apply(model, spec, data=batches, loss=lambda m, b: mse_loss(m(b[0]), b[1]), dtype=torch.float64)
    assert surgeon.proof.start is None or surgeon.proof.start < 1e-6
    found = {key.rpartition(".")[2]: t for key, t in surgeon.adapters["0"].values().items()}
    for own, wanted in zip((found["A"], found["B"]), start(w, g, x.T @ x)):
        torch.testing.assert_close(own.detach().abs(), wanted.abs())  # whose vectors have no sign of their own
    if "A0" in found:
        torch.testing.assert_close((found["B0"] @ found["A0"]).detach(), (found["B"] @ found["A"]).detach())
    lines = [line for line in file.read_text().splitlines() if line.strip() and line[0] != "#"]
    assert len(lines) <= 15
