"""Tasks of every kind, from the columns of a data file.

Takes a file; gives a `Task` of labelled texts, or a `Generative` one: questions with choices, conversations with what
is answered in them, questions whose answer is a number, texts. Promises: the columns tell the kind unless the caller
does; a file that has the columns of none is told what it has and what each needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from os import PathLike
from typing import Any, Literal, Self, cast

from surgery.diagnostics import fail
from surgery.experiments.data_files import Rows, read_rows
from surgery.experiments.text_tasks import TEXT, TEXTS, Items, Kind, Task, of_rows

GenerativeKind = Literal["choice", "chat", "answer", "language"]
HEADED = ("classification", "regression")  # by a new head on the model
KINDS = (*HEADED, "choice", "chat", "answer", "language")
USER, ASSISTANT = "user", "assistant"
MARK = "####"  # before the number of an answer, as GSM8K has it
# 1,234.5, -.5, -$5, 2e-3, 1/2: with all that makes it another number than its digits are
_NUMBER = re.compile(r"(?<!\d)(?:-[$€£]?)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
                     r"(?:[eE][+-]?\d{1,3}(?!\d)|/0*[1-9]\d*)?")


@dataclass(frozen=True)
class Choice:
    """A question, and which of its choices is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Message:
    """What one side of a conversation says."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Generative(Items):
    """What a causal language model is asked: of the kind `choice` a `Choice` each; `chat` and `answer`, a
    `Conversation`; `language`, a text."""

    name: str
    kind: GenerativeKind
    items: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.items)

    def taken(self, indices: Iterable[int]) -> Self:
        """The items at these places."""
        return replace(self, items=tuple(self.items[i] for i in indices))


AnyTask = Task | Generative


def read_task(path: str | PathLike, kind: str | None = None, *, label: str | None = None,
              threshold: float | None = None, classes: Sequence[str] = ()) -> AnyTask:
    """The task in a data file. `kind` is one of `KINDS` where the columns do not tell; `label`, `threshold` and
    `classes` are for labelled texts, as `text_tasks` has them.

    Raises: SurgeryError (missing-file; missing-extra; bad-data)."""
    rows = read_rows(path)
    form = None if kind in HEADED else _form(rows, kind)
    if form is None and kind not in HEADED and not _is_labelled(rows, kind):
        raise fail("bad-data", f"{rows.file} has not the columns of {f'the task `{kind}`' if kind else 'any task'}: "
                   f"it has {', '.join(rows.columns)}", notes=tuple(_needed(kind)))
    if form is None:
        return of_rows(rows, cast(Kind, kind) if kind in HEADED else None, threshold, label, classes)
    return Generative(rows.name, form.kind, tuple(form.read(rows)))


def _is_labelled(rows: Rows, kind: str | None) -> bool:
    return kind is None and any(rows.has(*columns) for columns in TEXTS)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or the first after `####` where that stands in it; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    found = _NUMBER.findall(after.replace("\u2212", "-"))  # the minus sign of Unicode
    if not found:
        return None
    above, _, below = re.sub("[,$€£]", "", found[0 if mark else -1]).partition("/")
    return Decimal(above) / Decimal(below) if below else Decimal(above)


# ------------------------------------------------------------------------------------------------------------ forms


@dataclass(frozen=True)
class Form:
    """The columns of a kind of task, and its items from them. `fits`: whether rows with these columns are of the kind
    where nobody says so."""

    kind: GenerativeKind
    columns: tuple[str, ...]
    read: Callable[[Rows], Iterable[Any]]
    fits: Callable[[Rows], bool] = lambda rows: True


def _form(rows: Rows, kind: str | None) -> Form | None:
    return next((form for form in _FORMS if rows.has(*form.columns)
                 and (form.kind == kind if kind else form.fits(rows))), None)


def _needed(kind: str | None) -> Iterable[str]:
    """What each kind of task needs, in a line."""
    for name in KINDS if kind is None else (kind,):
        needs = [" and ".join(form.columns) for form in _FORMS if form.kind == name]
        texts = [" and ".join(columns) for columns in TEXTS] if name in HEADED else []
        yield f"{name} needs {', or '.join(needs or [f'a label, and {text}' for text in texts])}"


def _choices(rows: Rows) -> Iterable[Choice]:
    questions, choices, answers = (rows.column("question"), rows.column("choices", list),
                                   rows.column("answer", int, str))
    rows.refuse("has choices that are not at least two texts",
                [len(each) < 2 or not all(isinstance(c, str) and c for c in each) for each in choices])
    places = [_place(answer, each) for answer, each in zip(answers, choices)]
    rows.refuse("has an answer that is none of its choices", [place is None for place in places],
                "an answer counts from 0, or is the text of a choice")
    return (Choice(q, tuple(c), a or 0) for q, c, a in zip(questions, choices, places))


def _place(answer: int | str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer is."""
    if isinstance(answer, str):
        return choices.index(answer) if choices.count(answer) == 1 else None
    return answer if not isinstance(answer, bool) and 0 <= answer < len(choices) else None


def _messages(rows: Rows) -> Iterable[Conversation]:
    found = rows.column("messages", list)
    rows.refuse("has messages that are not each a `role` and a `content`", [not _are_messages(each) for each in found])
    rows.refuse("has a conversation without an answer",
                [all(m["role"] != ASSISTANT for m in each) for each in found],
                f"what is learned is what `\"role\": \"{ASSISTANT}\"` says")
    return (tuple(Message(m["role"], m["content"]) for m in each) for each in found)


def _are_messages(found: Sequence[Any]) -> bool:
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
               for m in found)


def _asked(question: str, answer: str) -> Conversation:
    return Message(USER, question), Message(ASSISTANT, answer)


def _pairs(question: str, answer: str) -> Callable[[Rows], Iterable[Conversation]]:
    return lambda rows: map(_asked, rows.column(question), rows.column(answer))


def _instructions(rows: Rows) -> Iterable[Conversation]:
    inputs = [row.get("input") or "" for row in rows.rows]
    rows.refuse("has an `input` that is no text", [not isinstance(each, str) for each in inputs])
    asked = [f"{said}\n\n{more}" if more else said for said, more in zip(rows.column("instruction"), inputs)]
    return map(_asked, asked, rows.column("output"))


def _numbers(rows: Rows) -> Iterable[Conversation]:
    rows.refuse("has an answer without a number", [last_number(each) is None for each in rows.column("answer")])
    return _pairs("question", "answer")(rows)


def _are_marked(rows: Rows) -> bool:
    return all(isinstance(row.get("answer"), str) and MARK in row["answer"] for row in rows.rows)


_FORMS = (
    Form("chat", ("messages",), _messages),
    Form("choice", ("question", "choices", "answer"), _choices),
    Form("chat", ("instruction", "output"), _instructions),
    Form("chat", ("prompt", "completion"), _pairs("prompt", "completion")),
    Form("answer", ("question", "answer"), _numbers, _are_marked),
    Form("chat", ("question", "answer"), _pairs("question", "answer")),
    Form("language", (TEXT,), lambda rows: rows.column(TEXT), lambda rows: rows.columns == (TEXT,)),
)
