"""The picture of a comparison: for each method its score, its entropy and what it costs, one under the other.

Takes rows; writes an SVG. Promises: the same rows give the same file; no display is needed. Needs the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from surgery.compare import Mean, Row

_INK, _MARK = "#333333", "#2a6fbb"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
          "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
          "svg.hashsalt": "surgery", "svg.fonttype": "path"}


def draw(rows: Sequence[Row], file: Path, title: str = "") -> None:
    """Write the picture; the folder must be there. The ending of the name says the format."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 1.2 + 0.32 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = _panels(rows)
        for axes, (label, values, is_log) in zip(figure.subplots(1, len(panels), sharey=True), panels):
            _dots(axes, rows, values, label, is_log)
        figure.suptitle(title, fontsize=10)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)


def _panels(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], Mean | None], bool]]:
    metric = next((name for row in rows for name in row.scores), "score")
    return [(f"{metric} (mean, standard error)", lambda row: row.scores.get(metric), False),
            ("entropy of ΔW", lambda row: row.entropy, False),
            ("trained parameters", lambda row: Mean(row.trained, None), True),
            ("ms a step", lambda row: Mean(1000 * row.step_seconds, None), False)]


def _dots(axes: Axes, rows: Sequence[Row], value: Callable[[Row], Mean | None], label: str, is_log: bool) -> None:
    """One dot for each method, the first at the top; a method without the value has none."""
    known = [(i, found) for i, row in enumerate(rows) if (found := value(row)) is not None]
    axes.errorbar([m.value for _, m in known], [i for i, _ in known], xerr=[m.error or 0.0 for _, m in known],
                  fmt="o", ms=4.5, color=_MARK, elinewidth=1.2)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    if is_log:
        axes.set_xscale("log")
