"""Any update as a product of two thin factors, as near as a given rank allows.

    ΔW = W' - W = Σ σᵢ uᵢ vᵢᵀ  ≈  B A,   B = U √Σ,  A = √Σ Vᵀ   of the k largest σᵢ

Takes the updates of an operated model, one at a time; gives the factors in float32 and how far they are off. Promises:
no other product of that rank is nearer (but for close neighbours of the k-th singular value of a large dense update);
the error is measured on the factors as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from surgery.analysis.spectra import pending_of
from surgery.analysis.spectra.spectrum import Spectrum, leading, of_factors
from surgery.analysis.spectra.updates import Update
from surgery.diagnostics import fail
from surgery.runtime.surgeon import Surgeon


@dataclass(frozen=True)
class Factors:
    """B [out, k] and A [k, in] of one module, and ‖ΔW - B A‖ / ‖ΔW‖. `rank`: that of ΔW. Of a stack, B and A of all its
    matrices, with the largest rank and the largest error."""

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
        return self.rank <= self.a.shape[-2]


@torch.no_grad()
def ranks(surgeon: Surgeon) -> dict[str, tuple[int, int]]:
    """The rank of each module's update, and the largest that is worth factors: half of its shorter side."""
    return {u.name: (_spectrum(u).numerical_rank, min(u.weight.shape) // 2) for u in _updates(surgeon)}


@torch.no_grad()
def factors(surgeon: Surgeon, rank: int) -> Iterator[Factors]:
    """The factors of each module's update."""
    # the matrices of a stack come one by one, each named by its number below the stack
    owner = {f"{p.site.name}.{i}": p.site.name for p in surgeon.plan.placed for i in range(p.site.stack or 0)}
    for name, group in groupby(_of_matrices(surgeon, rank), lambda factors: owner.get(factors.name, factors.name)):
        each = list(group)
        yield each[0] if each[0].name == name else Factors(
            name, torch.stack([f.b for f in each]), torch.stack([f.a for f in each]),
            max(f.rank for f in each), max(f.error for f in each))


def _of_matrices(surgeon: Surgeon, rank: int) -> Iterator[Factors]:
    for update in _updates(surgeon):
        delta, spectrum = update.delta, _spectrum(update)
        kept = min(rank, spectrum.numerical_rank)
        # U √Σ and √Σ⁻¹ Uᵀ ΔW, which is the best that there is for these directions U, whatever error U has.
        if isinstance(delta, tuple):
            u = of_factors(*delta)[1].first(kept).out
            onto = (u.mT @ delta[0]) @ delta[1]
        else:
            u = leading(delta, kept).out
            onto = u.mT @ delta
        # √Σ to each side: of sizes that far apart, training would move one factor and hardly the other
        size = onto.norm(dim=1).clamp_min(torch.finfo(onto.dtype).tiny).sqrt()
        missing = rank - kept  # PEFT has one rank for all modules: the others get zeros
        b = torch.nn.functional.pad(u * size, (0, missing)).float()
        a = torch.nn.functional.pad(onto / size[:, None], (0, 0, 0, missing)).float()
        if isinstance(delta, tuple):  # ‖ΔW - B A‖ = ‖[U -B] [V; A]‖, without building the difference of what is thin
            left, right = torch.cat([delta[0], -b.double()], dim=1), torch.cat([delta[1], a.double()])
            difference = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
        else:
            difference = delta - b.double() @ a.double()
        error = float(difference.norm()) / (spectrum.norm or 1.0)
        yield Factors(update.name, b, a, spectrum.numerical_rank, error)


def _updates(surgeon: Surgeon) -> Iterator[Update]:
    with surgeon.disabled():
        yield from (update for pending in pending_of(surgeon) for update in pending.load())


def _spectrum(update: Update) -> Spectrum:
    if not all(bool(t.isfinite().all()) for t in update.parts):
        raise fail("bad-value", f"the update of {update.name} is not finite",
                   helps=("the training that made it diverged",))
    return of_factors(*update.parts)[0] if len(update.parts) == 2 else Spectrum.of(update.parts[0], update.rounding)
