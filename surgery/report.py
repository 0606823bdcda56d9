"""What a plan does to a model, in figures: the same for `plan`, `apply` and `Surgeon.report()`.

Takes a `Plan`; gives rows and totals, as text, as JSON. Promises: no weight is read, so it works on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from surgery.compile import Placed, Plan


@dataclass(frozen=True)
class Report:
    """The figures of a plan; `str()` is a table."""

    plan: Plan

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return sum(p.numel() for name, p in self.plan.selection.model.named_parameters() if "_surgery." not in name)
