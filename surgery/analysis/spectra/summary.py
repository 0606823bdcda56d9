"""The spectra of a model's updates: one row for each weight, and means by module type, by layer and over all.

Takes updates; gives plain data. Promises: a row holds numbers and no tensor; means are over the updates that are not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from statistics import fmean
from typing import Any

import torch

from surgery.analysis.spectra.orthogonality import Defect
from surgery.analysis.spectra.spectrum import Spectrum, condition_number, leading, of_factors, overlap
from surgery.analysis.spectra.updates import Update
from surgery.diagnostics import fail
from surgery.html import table, tag
from surgery.text import counted, figure_text, sides_text

TOP = 8


@dataclass(frozen=True)
class Row:
    """One updated weight. `relative_size`: ‖ΔW‖_F / ‖W‖_F (None where W is zero). `overlap_out`, `overlap_in`: how far
    the strongest directions of ΔW lie among the first of W, from 0 to 1 (None where ΔW is 0); see `spectrum.overlap`.
    `condition_number`: that of W', where it is asked for and W' is not singular."""

    name: str
    type: str
    layer: int | None
    spectrum: Spectrum
    relative_size: float | None
    overlap_out: float | None
    overlap_in: float | None
    orthogonality: tuple[Defect, ...] = ()
    condition_number: float | None = None

    @property
    def changed(self) -> bool:
        return bool(self.spectrum.values)

    @property
    def worst_defect(self) -> float | None:
        """The largest distance from orthogonality of a transform that claims it; None where none does."""
        return max((d.distance for d in self.orthogonality), default=None)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type, "layer": self.layer, **self.spectrum.to_json(),
                "relative_size": self.relative_size, "overlap_out": self.overlap_out, "overlap_in": self.overlap_in,
                "condition_number": self.condition_number,
                "orthogonality": [{"transform": d.name, "distance": d.distance} for d in self.orthogonality]}


# The figures of a row that a mean makes sense of, by the name that JSON has for them.
FIGURES: dict[str, Callable[[Row], float | None]] = {
    "entropy": lambda row: row.spectrum.entropy,
    "normalised_entropy": lambda row: row.spectrum.normalised_entropy,
    "entropy_by_largest": lambda row: row.spectrum.entropy_by_largest,
    "stable_rank": lambda row: row.spectrum.stable_rank,
    "effective_rank": lambda row: row.spectrum.effective_rank,
    "numerical_rank": lambda row: row.spectrum.numerical_rank,
    "relative_size": lambda row: row.relative_size,
    "condition_number": lambda row: row.condition_number,
    "overlap_out": lambda row: row.overlap_out,
    "overlap_in": lambda row: row.overlap_in,
}


@dataclass(frozen=True)
class Group:
    """The means of some rows: of each figure over the updates that have it. `count` is that of all the rows."""

    name: str
    count: int
    means: Mapping[str, float | None]

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> Group:
        # An unchanged weight has no directions: an entropy of 0 for it would say that it has one.
        changed, means = [row for row in rows if row.changed], {}
        for figure, of in FIGURES.items():
            known = [value for row in changed if (value := of(row)) is not None]
            # of equal ones that value, so that ranks that are all 8 have the mean 8, a count
            means[figure] = (known[0] if len({*known}) == 1 else fmean(known)) if known else None
        return cls(name, len(rows), means)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "count": self.count, **self.means}


@dataclass(frozen=True, repr=False)
class Spectra:
    """The rows of a model in module order. `squared` says which distribution the entropies are of, `top` how many
    directions of W the overlaps are with."""

    rows: tuple[Row, ...]
    squared: bool = False
    top: int = TOP

    @cached_property
    def types(self) -> tuple[Group, ...]:
        """The means by module type, in module order."""
        return self._groups(lambda row: row.type)

    @cached_property
    def layers(self) -> tuple[Group, ...]:
        """The means by the index of the layer; modules outside of the layers are left out."""
        return self._groups(lambda row: row.layer)

    @cached_property
    def total(self) -> Group:
        """The means over all rows."""
        return Group.of("all", self.rows)

    @property
    def figures(self) -> list[str]:
        """The figures that are known of any change."""
        return [name for name, of in FIGURES.items() if any(of(row) is not None for row in self.rows if row.changed)]

    @property
    def unchanged(self) -> tuple[str, ...]:
        """The weights whose update is zero."""
        return tuple(row.name for row in self.rows if not row.changed)

    def _groups(self, key: Callable[[Row], Any]) -> tuple[Group, ...]:
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return tuple(Group.of(str(name), rows) for name, rows in groups.items() if name is not None)

    @property
    def summary(self) -> str:
        """The means in one line."""
        changed = len(self.rows) - len(self.unchanged)
        if not changed:
            return f"{counted(len(self.rows), 'weight')}, none of them changed (norms and biases have no spectrum)"
        means = self.total.means
        entropy, stable, effective = (figure_text(means[f]) for f in ("entropy", "stable_rank", "effective_rank"))
        return (f"{counted(changed, 'changed weight')}: entropy {entropy}, {means['normalised_entropy']:.0%} of the "
                f"possible; stable rank {stable}; effective rank {effective} (means)")

    def __repr__(self) -> str:
        return f"<Spectra of {self.summary}>"

    def _repr_html_(self) -> str:
        """A row for each weight that changed, for notebooks."""
        figures = self.figures
        rows = [(row.name, sides_text(*row.spectrum.shape), *(figure_text(FIGURES[f](row)) for f in figures))
                for row in self.rows if row.changed]
        return table(("weight", "[out, in]", *(f.replace("_", " ") for f in figures)), rows) + tag("p", self.summary)

    def to_json(self) -> dict[str, Any]:
        return {"squared": self.squared, "top": self.top, "modules": [row.to_json() for row in self.rows],
                "types": [g.to_json() for g in self.types], "layers": [g.to_json() for g in self.layers],
                "all": self.total.to_json()}


@torch.no_grad()
def row_of(update: Update, squared: bool = False, top: int = TOP, condition: bool = False) -> Row:
    """The figures of one update. Cost: of r x r for thin factors, an eigenvalue problem of min(out, in) otherwise, and
    one more for the condition number of W'.

    Raises: SurgeryError (bad-value) for weights that are not finite.
    """
    if not all(bool(t.isfinite().all()) for t in (update.weight, *update.parts)):
        raise fail("bad-value", f"{update.name} or its update is not finite",
                   helps=("the training that made it diverged",))
    if isinstance(update.delta, tuple):
        spectrum, directions = of_factors(*update.delta, squared)
        directions = directions.first(top)
    else:
        # The values come without vectors, which would cost several times as much: of those only the first are read.
        spectrum = Spectrum.of(update.delta, update.rounding, squared)
        directions = leading(update.delta, min(top, spectrum.numerical_rank))
    overlap_out = overlap_in = None
    if spectrum.values and top:
        strongest = leading(update.weight, top)
        overlap_out, overlap_in = overlap(strongest.out, directions.out), overlap(strongest.in_, directions.in_)
    size = float(update.weight.norm())
    relative = spectrum.norm / size if size else None
    number = condition_number(update.weight + reduce(torch.matmul, update.parts)) if condition else None
    return Row(update.name, update.type, update.layer, spectrum, relative, overlap_out, overlap_in, update.defects,
               number)
