"""What the singular values of one matrix say: entropy, ranks, and directions shared with another matrix.

Takes a matrix [m, n], or two factors U [m, r] and V [r, n] of it; gives a `Spectrum` in float64. Promises: a product U
V is never built, two QR factorisations and one SVD [r, r] give its spectrum; what lies at or below a matrix's
`rounding` is no singular value of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Eigenvalues of AᵀA are exact to about eps ‖A‖²: below this share of σ₁ their roots are not to be trusted.
_RESOLVED = 3e-6
_SMALL = 256  # up to this many rows or columns an SVD with vectors costs nothing to speak of
_STEPS = 16


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The singular values σ₁ ≥ σ₂ ≥ ... > 0 of a matrix of `shape` [m, n], and the distribution that they make:

        p_i = σ_i / Σ σ     or, `squared`,     p_i = σ_i² / Σ σ²

    Source: Chang et al., AAAI 2026, arXiv 2511.00051 (entropy: figures 1b and 4; stable rank: figure 1a; the
    distribution: figure 2).
    """

    shape: tuple[int, int]
    values: tuple[float, ...]
    squared: bool = False

    @classmethod
    def of(cls, matrix: Tensor, rounding: float = 0.0, squared: bool = False) -> Spectrum:
        """The spectrum of a matrix [m, n]. Cost: an eigenvalue problem of min(m, n)."""
        m, n = matrix.shape
        return cls((m, n), _kept(singular_values(matrix, rounding), matrix.shape, rounding), squared)

    @property
    def possible(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.shape)

    @cached_property
    def p(self) -> tuple[float, ...]:
        """The normalised distribution; it sums to 1, or is empty for the zero matrix."""
        weights = [v * v for v in self.values] if self.squared else list(self.values)
        total = math.fsum(weights)
        return tuple(w / total for w in weights)

    @property
    def entropy(self) -> float:
        """H = -Σ p log p, in nats: 0 for one direction alone, log(rank) for `rank` equal ones."""
        return -math.fsum(p * math.log(p) for p in self.p if p > 0) + 0.0

    @property
    def normalised_entropy(self) -> float:
        """H / log min(m, n), from 0 to 1: the same scale for all methods, whatever rank they allow themselves."""
        return self.entropy / math.log(self.possible) if self.possible > 1 else 0.0

    @property
    def entropy_by_largest(self) -> float:
        """-Σ q log q of q_i = σ_i / σ₁, which do not sum to 1: the entropy as theorem 1 of the paper has it."""
        return -math.fsum((v / self.values[0]) * math.log(v / self.values[0]) for v in self.values) + 0.0

    @property
    def effective_rank(self) -> float:
        """exp H: how many equal directions would be as spread. Source: Roy & Vetterli, EUSIPCO 2007."""
        return math.exp(self.entropy) if self.values else 0.0

    @property
    def stable_rank(self) -> float:
        """‖A‖_F² / ‖A‖₂²: how many directions as strong as the strongest would hold as much."""
        return math.fsum((v / self.values[0]) ** 2 for v in self.values) if self.values else 0.0

    @property
    def numerical_rank(self) -> int:
        """How many singular values stand out of the rounding."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """‖A‖_F."""
        return math.hypot(*self.values)

    def __repr__(self) -> str:
        return (f"<Spectrum of a matrix [{', '.join(map(str, self.shape))}]: rank {self.numerical_rank}, entropy "
                f"{self.entropy:.4g}, stable rank {self.stable_rank:.4g}, effective rank {self.effective_rank:.4g}>")

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "entropy": self.entropy, "normalised_entropy": self.normalised_entropy,
                "entropy_by_largest": self.entropy_by_largest, "stable_rank": self.stable_rank,
                "effective_rank": self.effective_rank, "numerical_rank": self.numerical_rank, "norm": self.norm,
                "singular_values": list(self.values)}


def _kept(values: Tensor, shape: tuple[int, ...], rounding: float) -> tuple[float, ...]:
    """The values above the rounding of the entries and above that of the decomposition itself."""
    if not values.numel():
        return ()
    floor = max(rounding, max(shape) * torch.finfo(torch.float64).eps * float(values[0]))
    return tuple(values[values > floor].tolist())


def singular_values(matrix: Tensor, rounding: float = 0.0) -> Tensor:
    """All the singular values, descending, as float64 on the CPU.

    The roots of the eigenvalues of the smaller Gram matrix cost a quarter of an SVD, and are as good where no singular
    value of interest (none at or below `rounding` is) is tiny beside the largest; an SVD gives the others.
    """
    a = matrix.detach().double()
    if min(a.shape) > _SMALL:
        gram = a @ a.mT if a.shape[0] < a.shape[1] else a.mT @ a
        roots = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu()
        resolved = _RESOLVED * float(roots[0])
        if float(roots[-1]) >= resolved or rounding >= resolved:
            return roots
    return torch.linalg.svdvals(a).cpu()


def condition_number(matrix: Tensor) -> float | None:
    """σ₁ / σ of the smallest of min(m, n) singular values; None where that is no more than rounding in float64."""
    values = singular_values(matrix)
    floor = max(matrix.shape) * torch.finfo(torch.float64).eps * float(values[0])
    return float(values[0] / values[-1]) if float(values[-1]) > floor else None


# ---------------------------------------------------------------------------------------------------------- factors


class Directions(NamedTuple):
    """Orthonormal columns: singular vectors for the rows [m, k] and for the columns [n, k], strongest first."""

    out: Tensor
    in_: Tensor

    def first(self, k: int) -> Directions:
        return Directions(self.out[:, :k], self.in_[:, :k])


def of_factors(u: Tensor, v: Tensor, squared: bool = False) -> tuple[Spectrum, Directions]:
    """The spectrum of U V and all its directions: with U = Q R and Vᵀ = Z S, U V = Q (R Sᵀ) Zᵀ has those of R Sᵀ."""
    (q, r), (z, s) = torch.linalg.qr(u.detach().double()), torch.linalg.qr(v.detach().double().mT)
    shape = (u.shape[0], v.shape[1])
    x, values, yh = torch.linalg.svd(r @ s.mT)
    # Where U V is small because its parts cancel, what is left is their rounding.
    rounding = max(shape) * torch.finfo(torch.float64).eps * float(r.norm() * s.norm())
    spectrum = Spectrum(shape, _kept(values.cpu(), shape, rounding), squared)
    return spectrum, Directions(q @ x, z @ yh.mT).first(spectrum.numerical_rank)


# ------------------------------------------------------------------------------------------------------- directions


def leading(matrix: Tensor, k: int) -> Directions:
    """The k strongest directions of a matrix, in float64.

    Exact for a small matrix; else from a block Krylov space of AᵀA with 2 k columns a step, where close neighbours of
    the k-th singular value may still be mixed into it. The same matrix gives the same answer.
    Source: Musco & Musco, NeurIPS 2015.
    """
    a = matrix.detach().double()
    k = min(k, *a.shape)
    if min(a.shape) <= _SMALL:
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        return Directions(u[:, :k], vh.mT[:, :k])
    # An orthonormal basis of the span of G, AᵀA G, (AᵀA)² G, ... for a fixed random G [n, 2 k]: all blocks are kept,
    # which converges in far fewer steps than the last one alone.
    width, draw = 2 * k, torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(a.shape[1], width, generator=draw, dtype=a.dtype, device="cpu").to(a.device)).Q
    basis = block
    while basis.shape[1] < min(_STEPS * width, a.shape[1] - width):
        block = a.mT @ (a @ block)
        for _ in range(2):  # of a block that is almost in the space, once leaves little but rounding
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat([basis, block], dim=1)
    u, _, wh = torch.linalg.svd(a @ basis, full_matrices=False)
    return Directions(u[:, :k], (basis @ wh.mT)[:, :k])


def overlap(a: Tensor, b: Tensor) -> float:
    """φ = ‖Aᵀ B‖_F² / min(i, j) for orthonormal columns [n, i] and [n, j]: 1 if one span lies in the other, 0 if they
    are orthogonal, about max(i, j) / n for spans at random. Source: Hu et al., arXiv 2106.09685, equation 4."""
    least = min(a.shape[1], b.shape[1])
    return float((a.mT @ b).square().sum()) / least if least else 0.0
