"""Data files of every format, and which task their columns are: what is read, and what is said of what cannot be."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

import surgery
from surgery.experiments.data_files import read_rows
from surgery.experiments.tasks import Choice, Generative, Message, last_number, read_task
from surgery.experiments.text_tasks import Task

ROWS = [{"text": "a \"b\", c", "label": "x"}, {"text": "d", "label": "y"}]
PAIR = (Message("user", "q"), Message("assistant", "a 4"))


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def lines(folder: Path, *rows: object) -> Path:
    return written(folder, "some.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def refusal(*arguments, **options) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        read_task(*arguments, **options)
    assert {d.code for d in caught.value.diagnostics} <= {"bad-data", "missing-extra", "missing-file"}
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(("name", "text"), [
    ("a.tsv", 'text\tlabel\na "b", c\tx\n\nd\ty\n'),
    ("a.csv", '\ufefftext,label\r\n"a ""b"", c",x\r\n\r\nd,y\r\n'),
    ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
    ("a.json", json.dumps(ROWS)),
])
def test_the_same_rows_in_each_format(name: str, text: str, tmp_path: Path) -> None:
    found = read_rows(written(tmp_path, name, text))
    assert found.columns == ("text", "label") and list(found.rows) == ROWS
    assert read_task(tmp_path / name) == Task("a", ('a "b", c', "d"), (0.0, 1.0), ("x", "y"))


def test_parquet(tmp_path: Path, monkeypatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    choices = {"question": ["q", "r"], "choices": [["a", "b"], ["c", "d"]], "answer": [1, 0]}
    parquet.write_table(arrow.table(choices), tmp_path / "a.parquet")
    assert read_task(tmp_path / "a.parquet").items == (Choice("q", ("a", "b"), 1), Choice("r", ("c", "d"), 0))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    assert "is not Parquet" in refusal(tmp_path / "b.parquet")


def test_parquet_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.extras.importlib.util.find_spec", lambda name: None)
    assert "pip install 'surgery[parquet]'" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.xml", "", "its name ends in none of .tsv, .csv, .jsonl"),
    ("a.csv", 'text,label\n"a,x\n', "a.csv:2 is not CSV"),
    ("a.csv", "text,label\na\nb,c,d\n", "a.csv:2 has 1 columns, and the header 2"),
    ("a.csv", "text,text\na,b\n", "has two columns `text`"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "a.jsonl:3 is not JSON"),
    ("a.jsonl", '{"text": "a"}\n[1]\n3\n', "a.jsonl:2 is no object with names for its values, and so has 1 more"),
    ("a.json", "{}", "is no list of objects"),
    ("a.jsonl", "[" * 100_000, "nested too deeply"),
    ("a.jsonl", "\n", "holds no text"),
])
def test_a_file_that_cannot_be_read_says_where(name: str, text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(written(tmp_path, name, text))


# ------------------------------------------------------------------------------------------------------------ kinds


@pytest.mark.parametrize(("row", "kind", "item"), [
    ({"question": "q", "choices": ["a", "b"], "answer": 1}, "choice", Choice("q", ("a", "b"), 1)),
    ({"question": "q", "choices": ["a", "b"], "answer": "b"}, "choice", Choice("q", ("a", "b"), 1)),
    ({"question": "q", "answer": "a 4"}, "chat", PAIR),
    ({"question": "q", "answer": "a 4 #### 4"}, "answer", (PAIR[0], Message("assistant", "a 4 #### 4"))),
    ({"prompt": "q", "completion": "a 4"}, "chat", PAIR),
    ({"instruction": "q", "output": "a 4"}, "chat", PAIR),
    ({"instruction": "q", "input": "i", "output": "a 4"}, "chat", (Message("user", "q\n\ni"), PAIR[1])),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a 4"}]}, "chat", PAIR),
    ({"text": "q"}, "language", "q"),
])
def test_columns_tell_the_task(row: dict, kind: str, item: object, tmp_path: Path) -> None:
    assert read_task(lines(tmp_path, row)) == Generative("some", kind, (item,))


def test_the_caller_can_tell_the_task(tmp_path: Path) -> None:
    path = lines(tmp_path, {"question": "q", "answer": "a 4", "text": "t", "label": 1})
    assert read_task(path).kind == "chat" and read_task(path, "answer").items == (PAIR,)
    assert read_task(path, "language").items == ("t",)
    assert read_task(path, "regression") == Task("some", ("t",), (1.0,))


def test_glue(tmp_path: Path) -> None:
    pairs = read_task(written(tmp_path, "a.tsv", "idx\tsentence1\tsentence2\tlabel\n0\ta\tb\t0.5\n1\tc\td\t3\n"))
    assert pairs == Task("a", ("a", "c"), (0.5, 3.0), (), ("b", "d"))
    assert pairs.taken([1]) == Task("a", ("c",), (3.0,), (), ("d",))
    for names in (("question", "sentence"), ("question1", "question2"), ("premise", "hypothesis")):  # none is left out
        asked = read_task(lines(tmp_path, *({**dict(zip(names, "ab")), "label": label} for label in ("no", "yes"))))
        assert asked == Task("some", ("a", "a"), (0.0, 1.0), ("no", "yes"), ("b", "b"))
    single = read_task(written(tmp_path, "b.tsv", "sentence\tlabel\na\t1\nb\t0\n"))
    assert single == Task("b", ("a", "b"), (1.0, 0.0), ("0", "1"))


def test_classes_that_a_model_knows_keep_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "text\tlabel\na\tgood\nb\tgood\n")
    assert read_task(path, classes=("good", "bad")).labels == (0.0, 0.0)
    assert "does not know: good" in refusal(path, classes=("fine", "bad"))


@pytest.mark.parametrize(("rows", "options", "said"), [
    ([{"a": "b", "c": 1}], {}, "has not the columns of any task: it has a, c"),
    ([{"question": "q", "answer": "b"}], {"kind": "choice"}, "choice needs question and choices and answer"),
    ([{"question": "q", "answer": "b"}], {"kind": "answer"}, "some.jsonl:1 has an answer without a number"),
    ([{"question": "q", "choices": ["a", "b"], "answer": 2}], {}, "has an answer that is none of its choices"),
    ([{"question": "q", "choices": ["a", "b"], "answer": -1}], {}, "has an answer that is none of its choices"),
    ([{"question": "q", "choices": ["a", "a"], "answer": "a"}], {}, "has an answer that is none of its choices"),
    ([{"question": "q", "choices": ["a"], "answer": 0}], {}, "not at least two texts"),
    ([{"question": "q", "choices": "ab", "answer": 0}], {}, "has no `choices` that is a list"),
    ([{"messages": [{"role": "user", "content": "q"}]}], {}, "a conversation without an answer"),
    ([{"messages": [{"role": "user"}]}], {}, "not each a `role` and a `content`"),
    ([{"prompt": "q", "completion": "a"}, {"prompt": "q"}], {}, "some.jsonl:2 has no `completion` that is a text"),
    ([{"instruction": "q", "input": 3, "output": "a"}], {}, "has an `input` that is no text"),
    ([{"prompt": "q"}], {"kind": "classification"}, "has no column `text`, only prompt"),
])
def test_columns_that_are_no_task_are_told(rows: list, options: dict, said: str, tmp_path: Path) -> None:
    assert said in refusal(lines(tmp_path, *rows), **options)


@pytest.mark.parametrize(("text", "number"), [
    ("so 3 + 4 = 7", "7"), ("it is $1,234.50.", "1234.5"), ("5 #### 42", "42"), ("#### 42 apples of 3", "42"),
    ("from -3", "-3"), ("between 3-4", "4"), ("1,2", "2"), ("none", None), ("7 #### none", None),
    ("it is .75", "0.75"), ("-.5.", "-0.5"), ("1.5.", "1.5"), ("see 3. Then", "3"),
    # two answers that end alike are not one: 2e-3 and 5e-3 were both -3, 1/2 and 1/3 both 1
    ("#### 2e-3", "0.002"), ("it is 1.5E+2.", "150"), ("#### 1/2", "0.5"), ("or -3/4", "-0.75"), ("5/0", "0"),
    ("a loss of -$5", "-5"), ("#### \u22127", "-7"), ("9\u22125", "5"), ("1e9999", "9999"), ("10/2 = 5", "5")])
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))
