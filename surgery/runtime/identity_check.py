"""The check that operated weights start as the frozen ones, W' = W, before anything is put into a model.

Takes placed formulas and their adapters; raises where one starts elsewhere. Promises: W' is computed by the program
that a merge would run; a target that says `shifted` is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from surgery.diagnostics import Collector
from surgery.language.tree import Target
from surgery.planning.compile import Placed
from surgery.planning.initial_values import IDENTITY_TOLERANCE, departure, frozen_leaves, not_identity
from surgery.rewrite.prove_identity import starts_as_weight
from surgery.runtime.adapter import Adapter


@torch.no_grad()
def assert_identity(targets: Sequence[Target], placed: Sequence[Placed], adapters: Mapping[str, Adapter]) -> None:
    """Raises: SurgeryError (not-identity) with each target's modules that start elsewhere, and how far off."""
    report = Collector()
    for target in targets:
        changes: dict[str, float] = {}
        for each in (p for p in placed if p.target is target and not target.shifted and not p.site.is_meta):
            # to read the weight of a called layer takes as many calls as it has columns: algebra is asked first
            if each.site.layout.is_called and starts_as_weight(each.formula):
                continue
            adapter = adapters[each.site.name]
            after = adapter.weights(each.site.module)
            change = max(departure(old, new) for old, new in zip(frozen_leaves(each).values(), after))
            # no start is nearer to W than the adapter's own dtype can say
            held = (torch.finfo(t.dtype).eps for t in adapter.tensors().values() if t.is_floating_point())
            if not change <= max([IDENTITY_TOLERANCE, *held]):
                changes[each.site.name] = change
        report.add(*not_identity(target, changes))
    report.raise_errors()
