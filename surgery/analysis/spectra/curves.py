"""The curves of spectra, as numbers: what a plot draws, whatever it is drawn with.

Takes spectra by label; gives `Curve`s. Promises: with one label there is a curve for each module type, with several one
for each label; where a figure is not known there is no point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean

from surgery.analysis.spectra.summary import FIGURES, Row, Spectra

POINTS = 200  # of a longer curve, so many are kept, as dense as a logarithmic axis shows them


@dataclass(frozen=True)
class Curve:
    """A named line: `y` over `x`, the same number of each."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def _by_line(spectra: Mapping[str, Spectra]) -> dict[str, list[Row]]:
    """The changed rows of each line."""
    lines: dict[str, list[Row]] = {}
    for label, each in spectra.items():
        for row in filter(lambda row: row.changed, each.rows):
            lines.setdefault(label if len(spectra) > 1 else row.type, []).append(row)
    return lines


def across_layers(spectra: Mapping[str, Spectra], figure: str) -> list[Curve]:
    """The mean of a figure (see `summary.FIGURES`) in each layer."""
    curves = []
    for label, rows in _by_line(spectra).items():
        values: dict[int, list[float]] = {}
        for row in rows:
            if row.layer is not None and (value := FIGURES[figure](row)) is not None:
                values.setdefault(row.layer, []).append(value)
        if values:  # an output head stands in no layer, and has no curve across them
            layers = sorted(values)
            curves.append(Curve(label, tuple(layers), tuple(fmean(values[layer]) for layer in layers)))
    return curves


def distributions(spectra: Mapping[str, Spectra]) -> list[Curve]:
    """The mean of p_i over the rows of a line, for i from 1: how the update is spread over its directions."""
    return [distribution(label, rows) for label, rows in _by_line(spectra).items()]


def distribution(label: str, rows: Sequence[Row], points: int = POINTS) -> Curve:
    """The mean of p_i over some rows, at about so many places i."""
    # A row that has no i-th singular value has p_i = 0 in the mean, or means of few rows would rise at the end.
    means = [sum(column) / len(rows) for column in zip_longest(*(row.spectrum.p for row in rows), fillvalue=0.0)]
    kept = sorted({round(len(means) ** (i / points)) for i in range(points + 1)}) if means else []
    return Curve(label, tuple(map(float, kept)), tuple(means[i - 1] for i in kept))
