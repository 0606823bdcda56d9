"""The checks of where operated weights start, before anything is put into a model: as the frozen ones, W' = W, and
where training can move them.

Takes placed formulas and their adapters; raises where one starts elsewhere, and warns of what never trains. Promises:
W' is computed by the program that a merge would run, unless it is W to the bit by algebra alone; a target that says
`shifted` is not asked where it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from surgery.diagnostics import Collector, Diagnostic
from surgery.language.tree import Target
from surgery.planning.compile import Placed
from surgery.planning.initial_values import (
    IDENTITY_TOLERANCE,
    Departure,
    frozen_parts,
    is_finite,
    not_identity,
)
from surgery.planning.numeric_check import never_trains, reaches, trained
from surgery.rewrite.prove_identity import starts_as_weight, starts_bit_for_bit, surely_trains
from surgery.runtime.adapter import Adapter


def assert_identity(targets: Sequence[Target], placed: Sequence[Placed], adapters: Mapping[str, Adapter]) -> None:
    """Raises: SurgeryError (not-identity) with each target's modules that start elsewhere, and how far off."""
    asked = [p for p in placed if not p.target.shifted and not p.site.is_meta]
    refuse_moved(targets, [(p, moved_by(p, adapters[p.site.name])) for p in asked
                           if not is_proven(p, adapters[p.site.name].tensors().values())])


def is_proven(placed: Placed, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether it follows from the formula that W' starts as W, with those tensors in the adapter: nothing is computed
    then, but looked through for what is not finite."""
    site = placed.site
    if site.layout.is_called:  # to read its weight takes as many calls as it has columns
        return starts_as_weight(placed.formula)
    return starts_bit_for_bit(placed.formula) and all(
        is_finite(t) for t in (site.weight, site.bias, *tensors) if t is not None)


@torch.no_grad()
def moved_by(placed: Placed, adapter: Adapter) -> float:
    """How far W' starts from W, relative; 0 for what the dtypes allow."""
    before, off = frozen_parts(placed), (Departure(), Departure())
    for rows, after in adapter.weights_by_rows(placed.site.module):
        for old, new, each in zip(before, after, off):
            each.add(old[rows].to(new.dtype), new)
    change = max(each.relative for each in off)
    # no start is nearer to W than the adapter's own dtype can say
    held = (torch.finfo(t.dtype).eps for t in adapter.tensors().values() if t.is_floating_point())
    return 0.0 if change <= max([IDENTITY_TOLERANCE, *held]) else change


def refuse_moved(targets: Sequence[Target], moved: Sequence[tuple[Placed, float]]) -> None:
    """Raises: SurgeryError (not-identity), for weights that start elsewhere, by so much."""
    report = Collector()
    for target in targets:
        report.add(*not_identity(target, {p.site.name: change for p, change in moved if change and p.target is target}))
    report.raise_errors()


def idle(targets: Sequence[Target], placed: Sequence[Placed], adapters: Mapping[str, Adapter]) -> Iterator[Diagnostic]:
    """A warning for each target that training changes nothing of: W' has a gradient in none of its parameters."""
    for target in targets:
        own = [each for each in placed if each.target is target and not each.site.is_meta]
        formulas = {id(each.formula): each.formula for each in own}
        if not own or not trained(own[0].formula) or any(map(surely_trains, formulas.values())):
            continue
        if not any(_trains(each, adapters[each.site.name]) for each in own):
            yield never_trains(target, own[0].formula)


@torch.enable_grad()
def _trains(placed: Placed, adapter: Adapter) -> bool:
    tensors = adapter.tensors()
    return reaches(adapter.weights(placed.site.module), [tensors[key] for key in trained(placed.formula)])
