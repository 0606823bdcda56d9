"""What the runs of a comparison say: a row for each method, and what lies between two of them.

Takes runs, and the times of steps side by side; gives `Row`s and `Difference`s. Promises: the learning rate is the one
with the best validation scores, and the scores are those of the tests at that rate alone; a rate at which a training
diverged is never chosen over one at which none did; two methods are compared seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from surgery.experiments.comparison_files import MEAN, Run, Steps
from surgery.extras import need

CHANCE = 0.05  # of telling apart, anywhere in a family of differences, what is not


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
    the end of several rates, so that a better one may lie beyond. `scores` are those of each test, the first is the one
    to go by, and there are none where the training diverged; of several tests their `mean` is the last. `entropy` is
    the SVD entropy of ΔW, a mean over the weights. The times are medians of steps side by side, the ratio to the first
    method's, None where they were not taken; the memory is the most of any run."""

    method: str
    rate: float
    edge: str | None
    seeds: int
    scores: Mapping[str, Mapping[str, Mean]]
    trained: int
    step_seconds: float | None
    step_ratio: float | None
    peak_bytes: int
    entropy: Mean | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """What a method scores on a test less what another does, a mean over the seeds of both. `apart`: whether it is told
    apart from 0 by the t distribution of such differences, so that in all of them together chance does that once in 20
    comparisons at most."""

    method: str
    other: str
    test: str
    mean: Mean
    apart: bool


def rows(runs: Sequence[Run], steps: Steps | None = None, sweep: int | None = None) -> list[Row]:
    """One row for each method, in the order of the runs. `sweep`: the seeds below it alone choose the rate."""
    table = []
    for method, mine in by_method(runs).items():
        best, chosen = at_best(mine, sweep)
        rates = {r.asked["rate"] for r in mine}
        entropies = [value for r in chosen for value in entropy(r).values()]
        # A mean over the seeds that happened not to diverge would be a better score than the method has.
        scores = _scores(chosen) if all(r.tests for r in chosen) else {}
        ends = {min(rates): "bottom", max(rates): "top"}
        edge = ends.get(best) if len(ends) > 1 and scores else None
        table.append(Row(
            method, best, edge, len(chosen), scores, chosen[0].trained, steps and steps.seconds(method),
            steps and steps.ratio(method), max(r.peak_bytes for r in mine),
            Mean.of(entropies) if len(entropies) == len(chosen) else None))
    return table


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {method: [r for r in runs if r.method == method] for method in dict.fromkeys(r.method for r in runs)}


def at_best(runs: Sequence[Run], sweep: int | None = None) -> tuple[float, list[Run]]:
    """The learning rate of a method that its validation scores are best at, and its runs at that."""
    tried = [r for r in runs if sweep is None or r.asked["seed"] < sweep]
    # A diverged run's score is minus infinity, and so is its mean: its rate comes last.
    best = max(dict.fromkeys(r.asked["rate"] for r in tried),
               key=lambda rate: fmean(r.chosen_by for r in tried if r.asked["rate"] == rate))
    return best, [r for r in runs if r.asked["rate"] == best]


def _scores(runs: Sequence[Run]) -> dict[str, dict[str, Mean]]:
    """The means over runs of every score of each test, and of the mean of the tests."""
    tests = runs[0].tests or {}
    found = {test: {name: Mean.of([(r.tests or {})[test][name] for r in runs]) for name in scores}
             for test, scores in tests.items()}
    name = next(iter(next(iter(tests.values()))))
    return {**found, **({MEAN: {name: Mean.of([r.main[MEAN] for r in runs])}} if len(tests) > 1 else {})}


def scored(run: Run) -> Mapping[str, float]:
    """The score to go by on each test."""
    return run.main


def entropy(run: Run) -> Mapping[str, float]:
    """The entropy of ΔW, where it was taken."""
    return {"entropy of ΔW": value} if (value := run.update.get("entropy")) is not None else {}


def differences(runs: Sequence[Run], sweep: int | None = None, against: str | None = None,
                of: Callable[[Run], Mapping[str, float]] = scored) -> list[Difference]:
    """What each method has of `of` less what the method `against` (the first one) has, all of them one family; methods
    that diverged are left out."""
    need("scipy", "train", "a comparison")
    from scipy.stats import t

    best = {method: {r.asked["seed"]: of(r) for r in at_best(mine, sweep)[1]}
            for method, mine in by_method(runs).items()}
    other = against or next(iter(best))
    theirs = best.pop(other)
    pairs = [(method, test, [mine[seed][test] - values[test] for seed, values in theirs.items()])
             for method, mine in best.items() if all(theirs.values()) and all(mine.get(seed) for seed in theirs)
             for test in next(iter(theirs.values()))]

    def is_apart(mean: Mean, seeds: int) -> bool:
        # Bonferroni's: each may err so much less often as there are more of them. What is equal in all seeds, as shares
        # of few items can be, has no spread to judge by.
        limit = float(t.ppf(1 - CHANCE / 2 / len(pairs), seeds - 1)) if seeds > 1 else float("inf")
        return bool(mean.error) and abs(mean.value) > limit * (mean.error or 0.0)

    return [Difference(method, other, test, mean := Mean.of(values), is_apart(mean, len(values)))
            for method, test, values in pairs]


def bearing(runs: Sequence[Run], found: Sequence[Difference], count: Mapping[str, int],
            sweep: int | None = None) -> list[str]:
    """What the differences can and cannot bear, in sentences. `count`: the items of each test."""
    seeds = len({r.asked["seed"] for r in runs})
    apart = [f"{d.method} on {d.test}" for d in found if d.apart]
    said = []
    if found and seeds < 2:
        said.append("One seed has no standard error: no difference is told apart from another seed's.")
    elif found:
        said.append(f"{len(apart)} of {len(found)} differences from {found[0].other} are told apart from 0 (t of "
                    f"{seeds} paired seeds, {CHANCE:.0%} over all of them): {', '.join(apart) or 'none'}. "
                    "The others are not shown to be there, and not shown to be absent.")
    for test, items in count.items():
        errors = [error for mine in by_method(runs).values() for r in at_best(mine, sweep)[1]
                  if (error := r.errors.get(test)) is not None]
        if errors:
            said.append(f"All are scored on the same {items} items of {test}: a score of one model has a standard "
                        f"error of {fmean(errors):.4f} from them, which no number of seeds takes away.")
    return said
