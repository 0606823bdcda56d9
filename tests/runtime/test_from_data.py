"""Methods that start from data, against what their authors' code computes of the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import surgery

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


def lora_one(w: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Direction LoRA-One, scale `stable` with γ = 128 (code: YuanheZ/LoRA-One, run_exp.py)."""
    u, s, v = torch.svd(-g)
    b = u[:, :RANK] @ torch.diag(torch.sqrt(s[:RANK])) / torch.sqrt(s[0])
    a = torch.diag(torch.sqrt(s[:RANK])) @ v.T[:RANK] / torch.sqrt(s[0])
    return a / 128**0.5, b / 128**0.5


@pytest.mark.parametrize("start", [lora_ga, eva, corda, lora_one])
def test_it_starts_where_the_authors_code_does(start: Callable) -> None:
    found, w, g, c = started(surgery.load(start.__name__, rank=RANK, alpha=ALPHA))
    a, b = start(w, g, c)
    for own, wanted in ((found["A"], a), (found["B"], b)):
        torch.testing.assert_close(own.detach().abs(), wanted.abs())  # whose vectors have no sign of their own
    if "A0" not in found:  # with B and A of one triple their product has one
        torch.testing.assert_close((found["B"] @ found["A"]).detach(), b @ a)
    if "A0" in found:
        torch.testing.assert_close((found["B0"] @ found["A0"]).detach(), (found["B"] @ found["A"]).detach())


def test_lora_sb_starts_at_the_first_step_of_its_authors_code() -> None:
    """code: CERT-Lab/lora-sb: -lr sign(Σ gradients), transposed and decomposed, R its singular values (α = rank)."""
    found, _, g, _ = started(surgery.load("lora_sb", rank=RANK, step=0.01))
    u, s, v = torch.svd((-0.01 * torch.sign(g)).T)
    a, b, r = u[:, :RANK].T, v[:, :RANK], torch.diag(s[:RANK])
    torch.testing.assert_close(found["R"].detach(), r)
    torch.testing.assert_close((found["B"] @ found["R"] @ found["A"]).detach(), b @ r @ a)


def started(spec: surgery.Spec) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """What a spec's parameters start at on one layer, and the W, G and C of it."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    batches = [(torch.randn(20, IN, generator=draw).double(), torch.randn(20, OUT, generator=draw).double())
               for _ in range(3)]
    x, y = (torch.cat(each) for each in zip(*batches))
    w = model[0].weight.detach().clone()
    g = 2 * (x @ w.T + model[0].bias.detach() - y).T @ x / y.numel()
    surgeon = surgery.apply(model, spec, data=batches, loss=lambda m, b: mse_loss(m(b[0]), b[1]), dtype=torch.float64)
    assert spec.targets[0].shifted or surgeon.proof.start is None or surgeon.proof.start < 1e-6
    return {key.rpartition(".")[2]: t for key, t in surgeon.adapters["0"].values().items()}, w, g, x.T @ x
