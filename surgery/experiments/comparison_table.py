"""What the runs of a comparison say: a row for each method.

Takes runs, and the times of steps side by side; gives `Row`s. Promises: the learning rate is the one with the best
validation scores, and the scores are those of the test part at that rate alone; a rate at which a training diverged
is never chosen over one at which none did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from surgery.experiments.comparison_files import Run, Steps


@dataclass(frozen=True)
class Mean:
    """A mean (over seeds, or over the items of a task) and its standard error, None for a single one."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method at the learning rate that its validation scores are best at. `edge` is `top` or `bottom` where that is
    the end of several rates, so that a better one may lie beyond. `scores` are of the test part, the first is the one
    to go by, and there are none where the training diverged; `entropy` is the SVD entropy of ΔW, a mean over the
    weights. The times are medians of steps side by side, the ratio to the first method's, None where they were not
    taken; the memory is the most of any run."""

    method: str
    rate: float
    edge: str | None
    seeds: int
    scores: Mapping[str, Mean]
    trained: int
    step_seconds: float | None
    step_ratio: float | None
    peak_bytes: int
    entropy: Mean | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rows(runs: Sequence[Run], steps: Steps | None = None) -> list[Row]:
    """One row for each method, in the order of the runs."""
    table = []
    for method in dict.fromkeys(r.method for r in runs):
        by_rate: dict[float, list[Run]] = {}
        for run in (r for r in runs if r.method == method):
            by_rate.setdefault(run.asked["rate"], []).append(run)
        # A diverged run's score is minus infinity, and so is its mean: its rate comes last.
        best = max(by_rate, key=lambda rate: fmean(r.chosen_by for r in by_rate[rate]))
        chosen = by_rate[best]
        tests = [r.test for r in chosen if r.test is not None]
        entropies = [entropy for r in chosen if (entropy := r.update.get("entropy")) is not None]
        # A mean over the seeds that happened not to diverge would be a better score than the method has.
        scores = {name: Mean.of([t[name] for t in tests]) for name in tests[0]} if len(tests) == len(chosen) else {}
        ends = {min(by_rate): "bottom", max(by_rate): "top"}
        edge = ends.get(best) if len(ends) > 1 and scores else None
        table.append(Row(
            method, best, edge, len(chosen), scores, chosen[0].trained, steps and steps.seconds(method),
            steps and steps.ratio(method), max(r.peak_bytes for each in by_rate.values() for r in each),
            Mean.of(entropies) if len(entropies) == len(chosen) else None))
    return table
