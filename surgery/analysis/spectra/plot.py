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


PANELS = {"entropy": "entropy of ΔW (nats)", "entropy_by_largest": "entropy of σ / σ₁",
          "stable_rank": "stable rank of ΔW", "condition_number": "condition number of W'"}
SPREAD = "p_i, the share of the i-th singular value"
_ACROSS = 3  # panels in a row


def draw(spectra: Mapping[str, Spectra], file: Path, title: str = "") -> None:
    """Write the picture; the folder must be there. The ending of the name says the format."""
    draw_curves({figure: across_layers(spectra, figure) for figure in PANELS}, distributions(spectra), file, title)


def draw_curves(layered: Mapping[str, Sequence[Curve]], spread: Sequence[Curve], file: Path, title: str = "") -> None:
    """Write the picture of curves that are made: across layers, those of each figure of `PANELS`; `spread`, of
    singular values. A figure that no curve is of has no panel."""
    known = [(figure, curves) for figure, curves in layered.items() if curves]
    lines = -(-(len(known) + 1) // _ACROSS)
    with picture(file, (12, 3.8 * lines), title) as figure:
        panels = figure.subplots(lines, _ACROSS, squeeze=False).ravel()
        for axes, (name, curves) in zip(panels, known):
            _lines(axes, curves, "layer", PANELS[name])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _lines(panels[len(known)], spread, "i", SPREAD)
        # Both axes: a spread over a few directions and one over all differ by orders of magnitude.
        panels[len(known)].set(xscale="log", yscale="log")
        for axes in panels[len(known) + 1 :]:
            axes.axis("off")
        # The panels have the same lines, so one legend stands for all of them.
        if (labels := panels[0].get_legend_handles_labels())[0]:
            figure.legend(*labels, loc="outside right upper")


def _lines(axes: Axes, curves: Sequence[Curve], across: str, up: str) -> None:
    for curve in curves:
        axes.plot(curve.x, curve.y, marker=".", markersize=4, linewidth=1.2, label=curve.label)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
