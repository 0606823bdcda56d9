"""What `check` tries in numbers: that a target starts as the frozen weight, and that claims hold.

Takes targets at concrete sizes; gives diagnostics. Promises: the start is computed as it is for a model, on a random
weight; a claim is tried with parameters away from their start, so that a trivial one proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.diagnostics import Diagnostic, SurgeryError
from surgery.ir.dense import dense
from surgery.ir.expression import Claim
from surgery.ir.manifolds import MANIFOLDS
from surgery.ir.sizes import known_shape
from surgery.layers.survey import sites
from surgery.planning.compile import Placed
from surgery.planning.initial_values import IDENTITY_TOLERANCE, departure, frozen_leaves, not_identity, tensors
from surgery.planning.trial_sizes import Trial
from surgery.text import listed

CLAIM_TOLERANCE = 1e-8
_DISTANCES = (0.1, 1.0)


def _placed(trial: Trial) -> Placed:
    """The target on a random linear layer of its sizes."""
    layer = nn.Linear(trial.in_, trial.out, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    site = replace(sites(layer)[0], name=_title(trial))
    return Placed(site, trial.target, trial.formula)


@torch.no_grad()
def _start(placed: Placed) -> dict[str, Tensor]:
    return {**frozen_leaves(placed), **tensors(placed, 0, torch.float32, {})}


# -------------------------------------------------------------------------------------------------------- start


def try_starts(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each target whose W' or b' does not start as W or b, with the largest departure."""
    worst: dict[int, tuple[float, Trial]] = {}
    for trial in trials:
        relative, key = _departure(_placed(trial)), id(trial.target)
        if not relative <= max(IDENTITY_TOLERANCE, worst.get(key, (0.0,))[0]):
            worst[key] = relative, trial
    return [found for relative, trial in worst.values()
            for found in not_identity(trial.target, {_title(trial): relative})]


def _title(trial: Trial) -> str:
    return f"a random weight [{trial.out}, {trial.in_}]"


@torch.no_grad()
def _departure(placed: Placed) -> float:
    values, formula = _start(placed), placed.formula
    return max(departure(values["weight"], dense(formula.weight, values)),
               departure(values["bias"], dense(formula.bias, values)))


def try_manifolds(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each parameter that is kept on a manifold and does not start there."""
    told: dict[tuple, Diagnostic] = {}
    for trial in trials:
        try:
            _start(_placed(trial))
        except SurgeryError as error:
            told |= {(d.code, d.span): d for d in error.diagnostics}
    return [*told.values()]


# ---------------------------------------------------------------------------------------------------- gradients


def try_gradients(targets: Iterable[Iterable[Trial]]) -> list[Diagnostic]:
    """One diagnostic for each target in which no parameter has a gradient at the start, whatever the loss is: there a
    step of training changes nothing, and so none ever does."""
    return [_never_trains(trials[0]) for trials in map(list, targets)
            if _trained(trials[0]) and not any(map(_has_gradient, trials))]


def _trained(trial: Trial) -> list[str]:
    return [leaf.key for leaf in trial.formula.leaves if not leaf.frozen]


def _has_gradient(trial: Trial) -> bool:
    """Whether a random gradient of W' and b' reaches a parameter. A NaN is not nothing."""
    values = {name: value.detach().double() if value.is_floating_point() else value
              for name, value in _start(_placed(trial)).items()}
    trained = [values[key].requires_grad_() for key in _trained(trial)]
    generator = torch.Generator().manual_seed(2)
    made = [dense(expr, values) for expr in (trial.formula.weight, trial.formula.bias)]
    loss = torch.stack([(torch.randn(m.shape, generator=generator, dtype=torch.float64) * m).sum() for m in made]).sum()
    if not loss.requires_grad:
        return False
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in found)


def _never_trains(trial: Trial) -> Diagnostic:
    names = listed(key.rpartition(".")[2] for key in _trained(trial))
    return Diagnostic("never-trains", "nothing in this target can train: where its parameters start, W' changes with "
                      "none of them", trial.target.span, severity="warning",
                      notes=(f"the gradients of {names} are all zero, whatever the loss, and so they stay",),
                      helps=("let a factor start at something other than 0, for example `~ kaiming_uniform()`",))


# ------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Property:
    """What a claim says in maths, and how far a matrix is from it."""

    maths: str
    defect: Callable[[Tensor], Tensor]


def _unorthogonal(r: Tensor) -> Tensor:
    return (r @ r.mT - torch.eye(r.shape[-2], dtype=r.dtype, device=r.device)).abs().max()


def _undiagonal(r: Tensor) -> Tensor:
    return _relative(r - r.diagonal().diag_embed(), r)


def _asymmetric(r: Tensor) -> Tensor:
    return _relative(r - r.mT, r)


def _relative(part: Tensor, whole: Tensor) -> Tensor:
    return part.abs().max() / whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny)


PROPERTIES = {
    "orthogonal": Property("max |R Rᵀ - I|", _unorthogonal),
    "diagonal": Property("max |R off the diagonal| / max |R|", _undiagonal),
    "symmetric": Property("max |R - Rᵀ| / max |R|", _asymmetric),
}


def try_claims(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each claim of a definition that random parameters refute, with the largest defect."""
    worst: dict[tuple, tuple[float, Diagnostic]] = {}
    for trial in trials:
        for claim, defect in _defects(trial):
            key = claim.owner, claim.name, claim.span
            if not defect <= max(CLAIM_TOLERANCE, worst.get(key, (0.0,))[0]):
                worst[key] = defect, _false_claim(claim, defect)
    return [diagnostic for _, diagnostic in worst.values()]


@torch.no_grad()
def _defects(trial: Trial) -> Iterator[tuple[Claim, float]]:
    """Each claim with its largest defect (infinite if it never has one). Where a matrix is not finite,
    it says nothing."""
    start = {name: value.detach().double() for name, value in _start(_placed(trial)).items()}
    points = [_moved(trial, start, distance) for distance in _DISTANCES]
    for claim in dict.fromkeys(trial.formula.claims):
        found = [_defect(claim, values) for values in points]
        yield claim, max((d for d in found if d is not None), default=float("inf"))


def _moved(trial: Trial, start: dict[str, Tensor], distance: float) -> dict[str, Tensor]:
    """The parameters that train, moved from their start at random."""
    generator = torch.Generator().manual_seed(1)
    moved = {leaf.key: start[leaf.key] + distance * _noise(known_shape(leaf.shape), generator)
             for leaf in trial.formula.leaves if not leaf.frozen}
    # what is kept on a manifold never leaves it, and a claim may rest on that
    kept = {leaf.key: MANIFOLDS[leaf.manifold].retract(moved[leaf.key]) for leaf in trial.formula.leaves
            if leaf.manifold}
    return {**start, **moved, **kept}


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _defect(claim: Claim, values: dict[str, Tensor]) -> float | None:
    matrix = dense(claim.expr, values)
    if not matrix.isfinite().all() or matrix.shape[-1] != matrix.shape[-2]:
        return None
    return float(PROPERTIES[claim.name].defect(matrix))


def _false_claim(claim: Claim, defect: float) -> Diagnostic:
    rows, columns = claim.expr.shape
    finite = f"{PROPERTIES[claim.name].maths} is {defect:.1e}"
    measured = finite if defect < float("inf") else "the matrix is never square and finite"
    return Diagnostic("false-claim", f"`{claim.owner}` is not {claim.name}", claim.span,
                      label="random parameters refute this",
                      notes=(f"{measured} at [{rows}, {columns}]; allowed is {CLAIM_TOLERANCE:.0e}",),
                      helps=("leave the claim out, or mend the definition",))
