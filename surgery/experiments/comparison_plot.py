"""The picture of a comparison: for each method its score, its entropy and what it costs, one under the other.

Takes rows; writes PNG, SVG or PDF. Promises: the same rows give the same file. Needs the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from surgery.analysis.spectra.figure import GRID, MARK, picture
from surgery.experiments.comparison_table import Mean, Row


def draw(rows: Sequence[Row], file: Path, title: str = "") -> None:
    """Write the picture; the folder must be there. The ending of the name says the format."""
    metric = next((name for row in rows for name in row.scores), "score")
    panels: list[tuple[str, Callable[[Row], Mean | None], bool]] = [
        (f"{metric} (mean, standard error)", lambda row: row.scores.get(metric), False),
        ("entropy of ΔW", lambda row: row.entropy, False),
        ("trained parameters", lambda row: Mean(row.trained, None), True),
        ("ms a step", lambda row: Mean(1000 * row.step_seconds, None) if row.step_seconds else None, False)]
    with picture(file, (9.5, 1.2 + 0.32 * len(rows)), title) as figure:
        for axes, (label, value, is_log) in zip(figure.subplots(1, len(panels), sharey=True), panels):
            # one dot for each method; a method without the value has none, and keeps its line
            known = [(i, mean) for i, row in enumerate(rows) if (mean := value(row)) is not None]
            axes.errorbar([m.value for _, m in known], [i for i, _ in known], xerr=[m.error or 0.0 for _, m in known],
                          fmt="o", ms=4.5, color=MARK, elinewidth=1.2)
            axes.set_yticks(range(len(rows)), [row.method for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)  # downwards, so that the first method is at the top
            axes.set_xlabel(label)
            axes.grid(axis="x", color=GRID)
            axes.set_axisbelow(True)
            if is_log:
                axes.set_xscale("log")
