"""Any update as a product of two thin factors, as near as a given rank allows.

    ΔW = W' - W = Σ σᵢ uᵢ vᵢᵀ  ≈  B A,   B = U √Σ,  A = √Σ Vᵀ   of the k largest σᵢ

Takes the updates of an operated model, one at a time; gives the factors in float32 and how far they are off. Promises:
no other product of that rank is nearer (but for close neighbours of the k-th singular value of a large dense update);
the error is measured on the factors as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.analysis.spectra import pending_of
from surgery.analysis.spectra.spectrum import Directions, Spectrum, leading, of_factors
from surgery.analysis.spectra.updates import Update
from surgery.diagnostics import fail
from surgery.runtime.surgeon import Surgeon


@dataclass(frozen=True)
class Factors:
    """B [out, k] and A [k, in] of one module, and ‖ΔW - B A‖ / ‖ΔW‖. `rank`: that of ΔW."""

    name: str
    b: Tensor
    a: Tensor
    rank: int
    error: float

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The factors as the leaves of `add low_rank`."""
        return {"add_low_rank.A": self.a, "add_low_rank.B": self.b}

    @property
    def exact(self) -> bool:
        """Whether nothing was left out, so that the error is one of rounding alone."""
        return self.rank <= len(self.a)


@torch.no_grad()
def ranks(surgeon: Surgeon) -> dict[str, tuple[int, int]]:
    """The rank of each module's update, and the largest that is worth factors: half of its shorter side."""
    return {u.name: (_spectrum(u).numerical_rank, min(u.weight.shape) // 2) for u in _updates(surgeon)}


@torch.no_grad()
def factors(surgeon: Surgeon, rank: int) -> Iterator[Factors]:
    """The factors of each module's update."""
    yield from (_factors(update, rank) for update in _updates(surgeon))


def _updates(surgeon: Surgeon) -> Iterator[Update]:
    with surgeon.disabled():
        yield from (update for pending in pending_of(surgeon) for update in pending.load())


def _spectrum(update: Update) -> Spectrum:
    _refuse_unfinite(update)
    if isinstance(update.delta, tuple):
        return of_factors(*update.delta)[0]
    return Spectrum.of(update.delta, update.rounding)


def _refuse_unfinite(update: Update) -> None:
    parts = update.delta if isinstance(update.delta, tuple) else (update.delta,)
    if not all(bool(t.isfinite().all()) for t in parts):
        raise fail("bad-value", f"the update of {update.name} is not finite",
                   helps=("the training that made it diverged",))


def _factors(update: Update, rank: int) -> Factors:
    found = _spectrum(update)
    kept = min(rank, found.numerical_rank)
    b, a = _balanced(update, _directions(update, kept))
    b, a = (torch.nn.functional.pad(t, pad).float() for t, pad in ((b, (0, rank - kept)), (a, (0, 0, 0, rank - kept))))
    error = _error(update, b.double(), a.double()) / (found.norm or 1.0)
    return Factors(update.name, b, a, found.numerical_rank, error)


def _directions(update: Update, kept: int) -> Directions:
    if isinstance(update.delta, tuple):
        return of_factors(*update.delta)[1].first(kept)
    return leading(update.delta, kept)


def _balanced(update: Update, directions: Directions) -> tuple[Tensor, Tensor]:
    """U √Σ and √Σ⁻¹ Uᵀ ΔW, which is the best that there is for these directions U."""
    u, delta = directions.out, update.delta
    onto = (u.mT @ delta[0]) @ delta[1] if isinstance(delta, tuple) else u.mT @ delta
    size = onto.norm(dim=1).clamp_min(torch.finfo(onto.dtype).tiny).sqrt()
    return u * size, onto / size[:, None]


def _error(update: Update, b: Tensor, a: Tensor) -> float:
    """‖ΔW - B A‖, without building the difference of what is thin."""
    if not isinstance(update.delta, tuple):
        return float((update.delta - b @ a).norm())
    u, v = update.delta
    left, right = torch.cat([u, -b], dim=1), torch.cat([v, a])
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT).norm())
