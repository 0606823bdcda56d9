"""What the runs of a comparison say: a row for each method.

Takes runs, and the times of steps side by side; gives `Row`s. Promises: the learning rate is the one with the best
validation scores, and the scores are those of the test part at that rate alone; a rate at which a training diverged
is never chosen over one at which none did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from surgery.experiments.comparison_files import Run, Steps


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, None for a single seed."""

    value: float
    error: float | None

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
    methods = dict.fromkeys(r.method for r in runs)
    return [_row(method, [r for r in runs if r.method == method], steps) for method in methods]


def _row(method: str, runs: Sequence[Run], steps: Steps | None) -> Row:
    rates = dict.fromkeys(r.asked["rate"] for r in runs)
    best = max(rates, key=lambda rate: fmean(r.chosen_by for r in _at(rate, runs)))
    chosen = _at(best, runs)
    tests = [r.test for r in chosen if r.test is not None]
    entropies = [entropy for r in chosen if (entropy := r.update.get("entropy")) is not None]
    found = {name: Mean.of([test[name] for test in tests]) for name in tests[0]} if len(tests) == len(chosen) else {}
    return Row(method, best, _edge(best, rates) if found else None, len(chosen), found, chosen[0].trained,
               steps and steps.seconds(method), steps and steps.ratio(method), max(r.peak_bytes for r in runs),
               Mean.of(entropies) if len(entropies) == len(chosen) else None)


def _edge(rate: float, rates: Iterable[float]) -> str | None:
    """The end of several rates that one is."""
    ends = {min(rates): "bottom", max(rates): "top"}
    return ends.get(rate) if len(ends) > 1 else None


def _at(rate: float, runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.asked["rate"] == rate]
