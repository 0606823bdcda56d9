"""The picture of spectra: entropy and stable rank across layers, and how the singular values are distributed.

Takes spectra by label; writes PNG, SVG or PDF. Promises: the same spectra give the same file; no display is needed.
With one label there is a line for each module type, with several one line for each label. Needs the extra `plot`.

Source: Chang et al., AAAI 2026, arXiv 2511.00051, figures 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from surgery.analysis.spectra.curves import Curve, across_layers, distributions
from surgery.analysis.spectra.figure import GRID, picture
from surgery.analysis.spectra.summary import Spectra

FORMATS = (".png", ".svg", ".pdf")


def draw(spectra: Mapping[str, Spectra], file: Path, title: str = "") -> None:
    """Write the picture; the folder must be there. The ending of the name says the format."""
    with picture(file, (12, 3.8), title) as figure:
        first, second, third = figure.subplots(1, 3)
        _lines(first, across_layers(spectra, "entropy"), "layer", "entropy of ΔW (nats)")
        _lines(second, across_layers(spectra, "stable_rank"), "layer", "stable rank of ΔW")
        _lines(third, distributions(spectra), "i", "p_i, the share of the i-th singular value")
        # Both axes: a spread over a few directions and one over all differ by orders of magnitude.
        third.set(xscale="log", yscale="log")
        for axes in (first, second):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # The three panels have the same lines, so one legend stands for all of them.
        if (labels := first.get_legend_handles_labels())[0]:
            figure.legend(*labels, loc="outside right upper")


def _lines(axes: Axes, curves: Sequence[Curve], across: str, up: str) -> None:
    for curve in curves:
        axes.plot(curve.x, curve.y, marker=".", markersize=4, linewidth=1.2, label=curve.label)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
