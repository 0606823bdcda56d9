"""Text tasks: labelled text from a file, and its parts.

Takes a file with a column `text` (or GLUE's `sentence`, or one of its pairs) and one of labels; gives a `Task`.
Promises: the same seed gives the same parts; labels that are all numbers, one of them with a fraction, are regressed
on, and others are names of classes, unless the caller says otherwise; one number spelt in two ways is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, Self

from surgery.diagnostics import did_you_mean, fail
from surgery.experiments.data_files import Rows, read_rows
from surgery.text import counted

TEXT, LABEL = "text", "label"
# A pair before a single one of its texts: of GLUE's QNLI the sentence alone says nothing.
TEXTS = (("sentence1", "sentence2"), ("question", "sentence"), ("question1", "question2"), ("premise", "hypothesis"),
         (TEXT,), ("sentence",))
NOT_LABELS = ("idx",)  # GLUE numbers its rows
Kind = Literal["classification", "regression"]


class Items:
    """What tasks of every kind can do with their items."""

    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def taken(self, indices: Iterable[int]) -> Self:
        """The items at these places."""
        raise NotImplementedError

    def parts(self, *shares: float, seed: int = 0) -> tuple[Self, ...]:
        """The task shuffled and cut: a part for each share of it, and what is left as the last.

        Raises: SurgeryError (bad-data) where a part is empty."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        cuts = [0, *(round(sum(shares[: i + 1]) * len(self)) for i in range(len(shares))), len(self)]
        parts = tuple(self.taken(order[a:b]) for a, b in zip(cuts, cuts[1:]))
        if not all(map(len, parts)):
            items = counted(len(self), "item")
            raise fail("bad-data", f"{self.name} has {items}, too few to be cut into {len(parts)} parts")
        return parts

    def limited(self, limit: int | None) -> Self:
        """`limit` of the items, drawn at random; all where there are not more."""
        if limit is None or limit >= len(self):
            return self
        return self.taken(sorted(random.Random(0).sample(range(len(self)), limit)))


@dataclass(frozen=True)
class Task(Items):
    """Texts with their labels: numbers to regress on, or indices into `classes`."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[float, ...]
    classes: tuple[str, ...] = ()
    seconds: tuple[str, ...] = ()  # the other texts, where each is one of a pair

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
        if not self.classes:
            return {"problem_type": "regression"}
        return {"problem_type": "single_label_classification", "id2label": dict(enumerate(self.classes)),
                "label2id": {name: i for i, name in enumerate(self.classes)}}

    def taken(self, indices: Iterable[int]) -> Self:
        """The texts at these places."""
        chosen, pairs = tuple(indices), self.seconds
        return replace(self, texts=tuple(self.texts[i] for i in chosen), labels=tuple(self.labels[i] for i in chosen),
                       seconds=tuple(pairs[i] for i in chosen) if pairs else ())


# ----------------------------------------------------------------------------------------------------------- files


def read(path: str | PathLike, kind: Kind | None = None, threshold: float | None = None,
         label: str | None = None) -> Task:
    """The task in a file. `threshold` makes two classes of numbers, above it or not; `label` names the column.

    Raises: SurgeryError (missing-file, bad-data) with every line that is wrong."""
    return of_rows(read_rows(path), kind, threshold, label)


def of_rows(rows: Rows, kind: Kind | None = None, threshold: float | None = None, label: str | None = None,
            classes: Sequence[str] = ()) -> Task:
    """The task in the rows of a file: texts, or pairs of them. `classes`: those that a model was trained to tell apart,
    in the order of its outputs.

    Raises: SurgeryError (bad-data)."""
    texts = next((columns for columns in TEXTS if rows.has(*columns)), (TEXT,))
    labels = rows.column(_label(rows, texts, label), str, int, float)
    # JSON's NaN is how tables are written that have none there
    rows.refuse("has no label", [not str(each).strip() or each != each for each in labels])
    first, *second = (tuple(rows.column(column)) for column in texts)
    found = _labelled(rows, first, [str(each) for each in labels], kind, threshold, tuple(classes))
    return replace(found, seconds=second[0]) if second else found


def _label(rows: Rows, texts: Sequence[str], label: str | None) -> str:
    """The name of the column of labels."""
    if not rows.has(*texts):
        raise fail("bad-data", f"{rows.file} has no column `{TEXT}`, only {', '.join(rows.columns)}",
                   helps=(f"texts are {', or '.join(map(' and '.join, reversed(TEXTS)))}",))
    others = [column for column in rows.columns if column not in (*texts, *NOT_LABELS)]
    if label is not None and label not in others:
        raise fail("bad-data", f"{rows.file} has no column `{label}`",
                   helps=(did_you_mean(label, others) or _listed(others),))
    if label is None and LABEL in others:
        return LABEL
    if label is None and len(others) != 1:
        raise fail("bad-data", f"{rows.file} does not say which column is the label: beside `{texts[0]}` "
                   f"{_listed(others)}", helps=("name the column",) if others else ())
    return label or others[0]


def _listed(columns: Sequence[str]) -> str:
    return f"it has {', '.join(columns) or 'none'}"


def _labelled(rows: Rows, texts: Sequence[str], labels: Sequence[str], kind: Kind | None,
              threshold: float | None, classes: tuple[str, ...]) -> Task:
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
        spelt: dict[float, str] = {}
        rows.refuse("has a label that another row spells in another way, as 1 and 01", [
            not classes and value is not None and spelt.setdefault(value, label) != label
            for value, label in zip(values, labels)], "they would be two classes: spell them alike")
        return _classified(rows, texts, labels, classes)
    if has_names:
        raise fail("bad-data", f"{rows.file} has labels that are no numbers, such as `{labels[values.index(None)]}`",
                   helps=("such labels can only be classes",))
    if threshold is None:
        return Task(rows.name, tuple(texts), tuple(numbers))
    names = {False: f"up to {threshold:g}", True: f"above {threshold:g}"}
    return _classified(rows, texts, [names[n > threshold] for n in numbers], classes)


def _classified(rows: Rows, texts: Sequence[str], labels: Sequence[str], known: tuple[str, ...]) -> Task:
    classes = known or tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise fail("bad-data", f"every text of {rows.file} has the label `{labels[0]}`",
                   helps=("there is nothing to tell apart",))
    index = {name: float(i) for i, name in enumerate(classes)}
    new = sorted(set(labels) - set(index))
    if new:
        raise fail("bad-data", f"{rows.file} has labels that the model does not know: {', '.join(new[:8])}",
                   notes=(f"it tells apart {', '.join(classes)}",))
    return Task(rows.name, tuple(texts), tuple(index[each] for each in labels), classes)
