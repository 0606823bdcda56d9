"""Scores with their standard errors, as scikit-learn and SciPy compute them.

Takes arrays; gives numbers by name, the one to go by first. Promises: a correlation or a Matthews coefficient of what
is constant is 0; errors are the same each time, and that of an accuracy is its formula's. Needs the extra `train`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from surgery.experiments.comparison_table import Mean
from surgery.experiments.text_tasks import Task
from surgery.extras import need

GROUPS = 200  # that are left out in turn, at most
Scores = Mapping[str, float]


def of_outputs(task: Task, outputs: np.ndarray) -> dict[str, Mean]:
    """How well a model's outputs [texts, outputs] fit the labels of a task."""
    labels = np.asarray(task.labels)
    if task.classes:
        return with_errors(partial(of_classes, len(task.classes)), outputs.argmax(-1), labels.astype(int))
    # a correlation of two numbers is 1 or -1 whatever they are: leaving one out of three says nothing
    return with_errors(of_numbers, outputs[:, 0].astype(float), labels, least=4)


def of_classes(classes: int, given: np.ndarray, labels: np.ndarray) -> Scores:
    """Of the classes [texts] that were given, of so many: accuracy; F1 of the second of two classes, the mean over
    more; Matthews' correlation."""
    need("sklearn", "train", "a score")
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    nothing: Any = 0  # where no text is of a class: the stubs know the word `warn` alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single class in both, which leaving a text out may leave
        f1 = f1_score(labels, given, average="binary" if classes == 2 else "macro", zero_division=nothing)
        matthews = matthews_corrcoef(labels, given)
    return {"accuracy": float(accuracy_score(labels, given)), "f1": float(f1), "matthews": float(matthews)}


def of_numbers(given: np.ndarray, labels: np.ndarray) -> Scores:
    """Of numbers [texts]: Spearman's and Pearson's correlation and the mean squared error."""
    return {"spearman": spearman(given, labels), "pearson": _correlation("pearsonr", given, labels),
            "mse": float(((given - labels) ** 2).mean())}


def spearman(given: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    return _correlation("spearmanr", given, labels)


def _correlation(name: str, given: np.ndarray, labels: np.ndarray) -> float:
    need("scipy", "train", "a score")
    from scipy import stats

    if np.ptp(given) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is nearly constant, which the number itself says
        return float(getattr(stats, name)(given, labels).statistic)


def with_errors(score: Callable[[np.ndarray, np.ndarray], Scores], given: np.ndarray,
                labels: np.ndarray, least: int = 2) -> dict[str, Mean]:
    """The scores, each with its standard error by the jackknife; without one for fewer texts than `least`."""
    values = score(given, labels)
    if len(labels) < least:
        return {name: Mean(value, None) for name, value in values.items()}
    left_out, times = _left_out(given, labels)
    without = [score(np.delete(given, places), np.delete(labels, places)) for places in left_out]
    count = times.sum()
    errors = {}
    for name in values:
        found = np.array([each[name] for each in without])
        apart = found - (times * found).sum() / count
        errors[name] = float(np.sqrt((count - 1) / count * (times * apart**2).sum()))
    return {name: Mean(value, errors[name]) for name, value in values.items()}


def _left_out(given: np.ndarray, labels: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The places to leave out, one set after the other, and how many texts or groups each stands for: one of every
    distinct pair of an output and a label; where there are many, groups drawn at random."""
    _, first, times = np.unique(np.stack([given, labels]), axis=1, return_index=True, return_counts=True)
    if len(first) <= GROUPS:
        return [np.array([place]) for place in first], times
    order = np.random.default_rng(0).permutation(len(labels))
    return np.array_split(order, GROUPS), np.ones(GROUPS, int)
