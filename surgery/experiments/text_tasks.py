"""Text tasks: labelled text from a TSV file, its parts, and the scores of a model's outputs on it.

Takes a file with a header line, a column `text` and a column of labels; gives a `Task`. Promises: the same seed gives
the same parts; labels that are all numbers, one of them with a fraction, are regressed on, and others are names of
classes, unless the caller says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.diagnostics import Collector, did_you_mean, fail

if TYPE_CHECKING:
    import numpy as np

TEXT = "text"
Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Task:
    """Texts with their labels: numbers to regress on, or indices into `classes`."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[float, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def kind(self) -> Kind:
        return "classification" if self.classes else "regression"

    @property
    def outputs(self) -> int:
        """How many numbers a head gives for a text."""
        return len(self.classes) or 1

    @property
    def head(self) -> dict[str, Any]:
        """What a model's configuration is told of its head, besides the number of outputs."""
        return {"problem_type": "single_label_classification" if self.classes else "regression"}

    def taken(self, indices: Iterable[int]) -> Task:
        """The texts at these places."""
        chosen = tuple(indices)
        return replace(self, texts=tuple(self.texts[i] for i in chosen), labels=tuple(self.labels[i] for i in chosen))

    def parts(self, *shares: float, seed: int = 0) -> tuple[Task, ...]:
        """The task shuffled and cut: a part for each share of it, and what is left as the last.

        Raises: SurgeryError (bad-data) where a part is empty."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        cuts = [0, *(round(sum(shares[: i + 1]) * len(self)) for i in range(len(shares))), len(self)]
        parts = tuple(self.taken(order[a:b]) for a, b in zip(cuts, cuts[1:]))
        if not all(map(len, parts)):
            raise fail("bad-data", f"{self.name} has {len(self)} texts, too few to be cut into {len(parts)} parts")
        return parts

    def limited(self, limit: int | None, seed: int = 0) -> Task:
        """`limit` of the texts, drawn at random; all where there are not more."""
        if limit is None or limit >= len(self):
            return self
        return self.taken(sorted(random.Random(seed).sample(range(len(self)), limit)))


# ----------------------------------------------------------------------------------------------------------- files


def read(path: str | PathLike, kind: Kind | None = None, threshold: float | None = None,
         label: str | None = None) -> Task:
    """The task in a TSV file. `threshold` makes two classes of numbers, above it or not; `label` names the column.

    Raises: SurgeryError (missing-file, bad-data) with every line that is wrong."""
    file, report = Path(path), Collector()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise fail("missing-file", f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise fail("bad-data", f"{file} is not UTF-8 at byte {error.start}") from None
    # With their numbers from the file, blank lines counted, so that a fault is found where an editor shows it.
    cells = [(number, line.split("\t")) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(cells) < 2:
        raise fail("bad-data", f"{file} holds no text under a header line")
    (_, header), *rows = cells
    at, text = _column(file, header, label), header.index(TEXT)
    for number, row in rows:
        if len(row) != len(header):
            report.error("bad-data", f"{file}:{number} has {len(row)} columns, and the header {len(header)}")
    report.raise_errors()
    return _labelled(file, [row[text] for _, row in rows], [row[at] for _, row in rows], kind, threshold)


def _column(file: Path, header: Sequence[str], label: str | None) -> int:
    """The index of the column of labels."""
    others = [c for c in header if c != TEXT]
    if TEXT not in header:
        raise fail("bad-data", f"{file} has no column `{TEXT}`, only {', '.join(header)}",
                   helps=("the first line names the columns, with tabs between them",))
    if label is not None and label not in others:
        raise fail("bad-data", f"{file} has no column `{label}`",
                   helps=(did_you_mean(label, others) or _listed(others),))
    if label is None and len(others) != 1:
        raise fail("bad-data", f"{file} does not say which column is the label: beside `{TEXT}` {_listed(others)}",
                   helps=("name the column",) if others else ())
    return header.index(label or others[0])


def _listed(columns: Sequence[str]) -> str:
    return f"it has {', '.join(columns) or 'none'}"


def _labelled(file: Path, texts: Sequence[str], labels: Sequence[str], kind: Kind | None,
              threshold: float | None) -> Task:
    """The task of the kind that is asked for, or that the labels suggest."""
    values: list[float | None] = []
    for label in labels:
        try:
            value = float(label)
        except ValueError:
            value = float("nan")
        values.append(value if abs(value) < float("inf") else None)  # float() reads `nan` and `inf`, which are none
    numbers = [value for value in values if value is not None]
    has_names = len(numbers) < len(values)
    # Whole numbers are names of classes more often than amounts, so they are regressed on only when that is asked for.
    if threshold is None and kind != "regression" and (has_names or kind or all(n.is_integer() for n in numbers)):
        return _classified(file, texts, labels)
    if has_names:
        raise fail("bad-data", f"{file} has labels that are no numbers, such as `{labels[values.index(None)]}`",
                   helps=("such labels can only be classes",))
    if threshold is None:
        return Task(file.stem, tuple(texts), tuple(numbers))
    names = {False: f"up to {threshold:g}", True: f"above {threshold:g}"}
    return _classified(file, texts, [names[n > threshold] for n in numbers])


def _classified(file: Path, texts: Sequence[str], labels: Sequence[str]) -> Task:
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise fail("bad-data", f"every text of {file} has the label `{labels[0]}`",
                   helps=("there is nothing to tell apart",))
    index = {name: float(i) for i, name in enumerate(classes)}
    return Task(file.stem, tuple(texts), tuple(index[each] for each in labels), classes)


# ---------------------------------------------------------------------------------------------------------- scores


def scores(task: Task, outputs: np.ndarray) -> dict[str, float]:
    """How well a model's outputs [texts, outputs] fit the labels. The first score is what counts; larger is better.

    Accuracy for classes; Spearman's rank correlation and the mean squared error for numbers."""
    import numpy as np

    labels = np.asarray(task.labels)
    if task.classes:
        return {"accuracy": float((outputs.argmax(-1) == labels).mean())}
    predicted = outputs[:, 0].astype(float)
    return {"spearman": spearman(predicted, labels), "mse": float(((predicted - labels) ** 2).mean())}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    import numpy as np

    def centred_ranks(values: np.ndarray) -> np.ndarray:
        # The ranks from 0, less their mean (n - 1) / 2, which ties leave as it is.
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count + 1) / 2)[place] - (len(values) - 1) / 2

    x, y = centred_ranks(a), centred_ranks(b)
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else 0.0
