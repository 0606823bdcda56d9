"""What `check` tries in numbers: that a target starts as the frozen weight, and that claims hold.

Takes targets at concrete sizes; gives diagnostics. Promises: the start is computed as it is for a model, on a random
weight; a claim is tried with parameters away from their start, so that a trivial one proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.diagnostics import Collector, Diagnostic, SurgeryError
from surgery.ir.dense import dense
from surgery.ir.expression import Claim, Formula
from surgery.ir.manifolds import MANIFOLDS
from surgery.ir.sizes import known, known_shape
from surgery.language.tree import Target
from surgery.layers.survey import sites
from surgery.planning.compile import Placed
from surgery.planning.initial_values import (
    IDENTITY_TOLERANCE,
    departure,
    frozen_leaves,
    not_identity,
    part_of,
    tensors,
)
from surgery.planning.sharing import shared_tensors
from surgery.planning.trial_sizes import Trial
from surgery.text import listed

CLAIM_TOLERANCE = 1e-8
LARGE = 1000  # rows of a matrix that takes seconds to make: a claim is tried on one of such a size alone
_DISTANCES = (0.1, 1.0)


def _placed(trial: Trial, report: Collector) -> Placed:
    """A target on a random linear layer of its sizes, the only one of a model. Reports what cannot be one tensor and is
    said to be."""
    layer, generator = nn.Linear(trial.in_, trial.out, device="meta"), torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():  # (`to_empty` would import a library of algebra)
        setattr(layer, name, nn.Parameter(torch.randn(parameter.shape, generator=generator, device="cpu")))
    site = replace(sites(layer)[0], name=_title(trial), layer_name="layers.0")
    shared = shared_tensors([(site, trial.formula.leaves)], report)
    return Placed(site, trial.target, trial.formula, shared.get(site.name, {}))


def unshared(trial: Trial) -> list[Diagnostic]:
    """Why what a target shares between its own steps cannot be one tensor at these sizes."""
    report = Collector()
    _placed(trial, report)
    return list(report.found)


@torch.no_grad()
def start(trial: Trial) -> dict[str, Tensor]:
    """The tensors of a target where it starts, each as the formula reads it, on a random linear layer of its sizes."""
    placed = _placed(trial, Collector())
    held = tensors(placed, 0, torch.float32, {}, of_data=_of_data(placed))
    shared = {leaf.key: part_of(held[leaf.key], leaf) for leaf in trial.formula.leaves if leaf.group and leaf.shape}
    return {**frozen_leaves(placed), **held, **shared}


def moved(trial: Trial, begins: Mapping[str, Tensor], distance: float, seed: int) -> dict[str, Tensor]:
    """Values away from where they begin, by random numbers; what several steps share by the same ones."""
    generator, values = torch.Generator().manual_seed(seed), dict(begins)
    placed, known = _placed(trial, Collector()), {}
    for leaf in trial.formula.leaves:
        if leaf.frozen:
            continue
        held = placed.held(leaf) if leaf.group else None
        key, shape = (held.name, held.shape) if held else (leaf.key, known_shape(leaf.shape))
        if key not in known:
            known[key] = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        values[leaf.key] = begins[leaf.key] + distance * part_of(known[key], leaf)
    return values


def _of_data(placed: Placed) -> dict[str, Tensor]:
    """Random numbers in the place of what data gives: a gradient, and the sum over more inputs than there are
    entries."""
    if not placed.formula.of_data:
        return {}
    generator, site = torch.Generator().manual_seed(3), placed.site
    gradient = torch.randn(site.out, site.in_, generator=generator, device="cpu")
    inputs = torch.randn(2 * site.in_, site.in_, generator=generator, device="cpu")
    return {"gradient": gradient, "inputs": inputs.mT @ inputs}


# -------------------------------------------------------------------------------------------------------- start


@torch.no_grad()
def try_starts(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each target whose W' or b' does not start as W or b, with the largest departure."""
    worst: dict[int, tuple[float, Trial]] = {}
    for trial in trials:
        values, key = start(trial), id(trial.target)
        relative = max(departure(values["weight"], dense(trial.formula.weight, values)),
                       departure(values["bias"], dense(trial.formula.bias, values)))
        if not relative <= max(IDENTITY_TOLERANCE, worst.get(key, (0.0,))[0]):  # so written, a NaN is a departure too
            worst[key] = relative, trial
    return [diagnostic for relative, trial in worst.values()
            for diagnostic in not_identity(trial.target, {_title(trial): relative})]


def _title(trial: Trial) -> str:
    return f"a random weight [{trial.out}, {trial.in_}]"


def try_manifolds(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each parameter that is kept on a manifold and does not start there."""
    by_place: dict[tuple, Diagnostic] = {}  # the same at every size of the weight
    for trial in trials:
        try:
            start(trial)
        except SurgeryError as error:
            by_place |= {(d.code, d.span): d for d in error.diagnostics}
    return [*by_place.values()]


# ---------------------------------------------------------------------------------------------------- gradients


def try_gradients(targets: Iterable[Iterable[Trial]]) -> list[Diagnostic]:
    """One diagnostic for each target in which no parameter has a gradient at the start, whatever the loss is: there a
    step of training changes nothing, and so none ever does."""
    return [never_trains(trials[0].target, trials[0].formula) for trials in map(list, targets)
            if trained(trials[0].formula) and not any(map(_has_gradient, trials))]


def never_trains(target: Target, formula: Formula) -> Diagnostic:
    """The warning about a target of that formula in which no parameter has a gradient at the start."""
    names = listed(dict.fromkeys(leaf.name for leaf in formula.leaves if not leaf.frozen))
    return Diagnostic(
        "never-trains", "nothing in this target can train: where its parameters start, W' changes with none of them",
        target.span, severity="warning",
        notes=(f"the gradients of {names} are all zero, whatever the loss, and so they stay",),
        helps=("let a factor start at something other than 0, for example `~ kaiming_uniform()`",))


def trained(formula: Formula) -> list[str]:
    """The keys of what trains."""
    return [leaf.key for leaf in formula.leaves if not leaf.frozen]


def begins(trial: Trial) -> dict[str, Tensor]:
    """What a trial starts at, numbers in float64 and places as they are."""
    return {name: value.detach().double() if value.is_floating_point() else value
            for name, value in start(trial).items()}


def _has_gradient(trial: Trial) -> bool:
    values = begins(trial)
    leaves = [values[key].requires_grad_() for key in trained(trial.formula)]
    return reaches([dense(expr, values) for expr in (trial.formula.weight, trial.formula.bias)], leaves)


def reaches(results: Iterable[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether a random gradient of W' and b' reaches a parameter. A NaN is not nothing. (A random loss stands for every
    loss: where a gradient is zero for it, it is zero for all, but by chance.)"""
    generator = torch.Generator().manual_seed(2)
    draws = ((r, torch.randn(r.shape, generator=generator, device="cpu")) for r in results)
    loss = torch.stack([(draw.to(r) * r).sum() for r, draw in draws]).sum()
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in gradients)


# ------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Property:
    """What a claim says in maths, and how far a matrix is from it."""

    maths: str
    defect: Callable[[Tensor], Tensor]


def _unorthogonal(r: Tensor) -> Tensor:
    # A product with a few random vectors shows a defect anywhere in R Rᵀ; how large it is, all of R Rᵀ.
    if r.shape[-1] > LARGE:
        draw = torch.Generator().manual_seed(3)
        probes = torch.randn(r.shape[-1], 4, dtype=r.dtype, generator=draw, device="cpu").to(r.device)
        defect = (r @ (r.mT @ probes) - probes).abs().max()
        if defect <= CLAIM_TOLERANCE:
            return defect
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
    worst: dict[tuple, tuple[float, Claim]] = {}
    large: set[tuple] = set()
    for trial in trials:
        for claim, defect in _defects(trial, large):
            key = claim.owner, claim.name, claim.span
            if not defect <= max(CLAIM_TOLERANCE, worst.get(key, (0.0,))[0]):
                worst[key] = defect, claim
    diagnostics = []
    for defect, claim in worst.values():
        rows, columns = claim.expr.shape
        finite = f"{PROPERTIES[claim.name].maths} is {defect:.1e}"
        measured = finite if defect < float("inf") else "the matrix is never square and finite"
        diagnostics.append(Diagnostic(
            "false-claim", f"`{claim.owner}` is not {claim.name}", claim.span, label="random parameters refute this",
            notes=(f"{measured} at [{rows}, {columns}]; allowed is {CLAIM_TOLERANCE:.0e}",),
            helps=("leave the claim out, or mend the definition",)))
    return diagnostics


@torch.no_grad()
def _defects(trial: Trial, large: set[tuple]) -> Iterator[tuple[Claim, float]]:
    """Each claim with its largest defect (infinite if it never has one). Where a matrix is not finite,
    it says nothing. `large` are the claims that a large matrix has been tried for, and grows."""
    start_values = begins(trial)
    defects: dict[Claim, list[float]] = {claim: [] for claim in trial.formula.claims}
    for distance in _DISTANCES:
        # Away from the start, where most transforms are the identity and every claim would hold.
        values = moved(trial, start_values, distance, seed=1)
        for leaf in trial.formula.leaves:
            # what is kept on a manifold never leaves it, and a claim may rest on that
            if leaf.manifold:
                values[leaf.key] = MANIFOLDS[leaf.manifold].retract(values[leaf.key])
        for claim, sizes in defects.items():
            is_large = known(claim.expr.shape[-1]) > LARGE
            if is_large and (claim.owner, claim.name, claim.span) in large:
                continue
            matrix = dense(claim.expr, values)
            if is_large and matrix.isfinite().all():
                large.add((claim.owner, claim.name, claim.span))
            if matrix.isfinite().all() and matrix.shape[-1] == matrix.shape[-2]:
                sizes.append(float(PROPERTIES[claim.name].defect(matrix)))
    yield from ((claim, max(sizes, default=float("inf"))) for claim, sizes in defects.items()
                if sizes or (claim.owner, claim.name, claim.span) not in large)
