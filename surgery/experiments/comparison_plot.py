"""The pictures of a comparison: for each method its score, its entropy and what it costs, one under the other; and the
spectra of its updates across layers, all methods over each other.

Takes rows, or runs; writes PNG, SVG or PDF. Promises: the same ones give the same file. Needs the extra `plot`.
Source: Chang et al., AAAI 2026, arXiv 2511.00051, figures 1, 2 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from surgery.analysis.spectra.curves import Curve
from surgery.analysis.spectra.figure import GRID, MARK, picture
from surgery.analysis.spectra.plot import PANELS, draw_curves
from surgery.experiments.comparison_files import Run
from surgery.experiments.comparison_table import Mean, Row, at_best, by_method


def draw(rows: Sequence[Row], file: Path, title: str = "") -> None:
    """Write the picture; the folder must be there. The ending of the name says the format."""
    tests = next((row.scores for row in rows if row.scores), {})
    # of several tests their mean alone, which is the last: the table has each
    test, metric = next(((test, next(iter(tests[test]))) for test in reversed(list(tests))), ("", "score"))
    panels: list[tuple[str, Callable[[Row], Mean | None], bool]] = [
        (f"{metric} (mean, standard error)", lambda row: row.scores.get(test, {}).get(metric), False),
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


def draw_spectra(runs: Sequence[Run], file: Path, title: str = "", sweep: int | None = None) -> None:
    """Write the picture of the spectra across layers, a line for each method at its best learning rate: means over its
    seeds and, of the singular values, over its layers. The folder must be there."""
    chosen = {method: at_best(mine, sweep)[1] for method, mine in by_method(runs).items()}
    layers = {method: [layer for run in mine for layer in run.layers] for method, mine in chosen.items()}
    layered = {figure: [_curve(method, ((layer.layer, layer.figures.get(figure)) for layer in mine))
                        for method, mine in layers.items()] for figure in PANELS}
    spread = [_curve(method, (point for layer in mine for point in zip(layer.places, layer.shares)))
              for method, mine in layers.items()]
    draw_curves({figure: [curve for curve in curves if curve.x] for figure, curves in layered.items()},
                [curve for curve in spread if curve.x], file, title)


def _curve(label: str, points: Iterable[tuple[float, float | None]]) -> Curve:
    """The mean of what is known at each place."""
    values: dict[float, list[float]] = {}
    for at, value in points:
        if value is not None:
            values.setdefault(at, []).append(value)
    places = sorted(values)
    return Curve(label, tuple(places), tuple(fmean(values[at]) for at in places))
