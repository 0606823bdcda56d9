"""The comparison: equal budgets, the rate chosen on one part and the score taken on another, runs kept, one command."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from small_text import Deadly, Forked, questions, save_causal, save_model, texts, words
from transformers import BertModel, TrainingArguments

import surgery
from surgery.cli.compare import RATES, _by_method, _methods, _swept
from surgery.cli.main import main
from surgery.experiments import comparison as comparison_module
from surgery.experiments import comparison_workers, training
from surgery.experiments.comparison import FIGURES, Comparison, comparison_of, layers_of
from surgery.experiments.comparison_files import place_of
from surgery.experiments.comparison_table import rows
from surgery.experiments.fine_tuning import Data, Training
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import arguments
from surgery.models.loading import load_with_head


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def task(count: int = 60) -> Task:
    """Does a text hold an `a`?"""
    found = texts(count)
    return Task("letters", tuple(found), tuple(float("a" in text) for text in found), ("no", "yes"))


def comparison(model: str, *names: str, **changes) -> Comparison:
    how = Training(epochs=1, batch=8, length=128)
    asked = {"rates": (1e-3,), "seeds": 1, "how": how, "task": task(), **changes}
    specs = {name: None if name == "full" else surgery.load(name) for name in names}

    def load(seed: int):
        return load_with_head(model, asked["task"].outputs, seed, **asked["task"].head)

    return Comparison(specs, "small", load, words(), **asked)


# ------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_asked_for_with_all_that_they_depend_on(model: str) -> None:
    whole = comparison(model, "full", "lora", "dora", rates=(1e-3, 1e-2), seeds=2)
    asked = whole.asked()
    assert len(asked) == 12 and len({place_of(Path(), each) for each in asked}) == 12
    assert [each["method"] for each in asked[:3]] == ["full", "lora", "dora"]
    lora = {**whole.specs, "lora": surgery.load("lora", rank=3)}
    others = [replace(whole, task=task(59)), *(replace(whole, how=replace(whole.how, **changed)) for changed in (
                  {"epochs": 2}, {"batch": 4}, {"length": 64}, {"head_lr": 1e-3})),
              replace(whole, model="other"), replace(whole, specs=lora), replace(whole, dev=task(9)),
              replace(whole, tests=[task(9)])]
    for other in others:
        assert place_of(Path(), other.asked()[1]) != place_of(Path(), asked[1])


def test_a_run_trains_its_method_and_says_what_it_was(model: str) -> None:
    whole = comparison(model, "full", "lora", "oft")
    full, lora, oft = (whole.perform(each) for each in whole.asked())
    # 2 layers of four [32, 32], [64, 32] and [32, 64], and the pooler [32, 32]; a head [2, 32] with its bias.
    assert lora.trained == 8 * (9 * 64 + 4 * 96) + 66
    assert oft.trained == 11 * 32**2 + 2 * 2 * 32**2 + 66
    assert full.trained == sum(p.numel() for p in whole.load(0).parameters())
    for run in (full, lora, oft):
        assert list(run.validation) == list(run.tests["letters"]) == ["accuracy", "f1", "matthews"]
        assert run.machine == comparison_module.machine() and run.errors["letters"] >= 0
        assert run.step_seconds > 0 and run.peak_bytes > 4 * full.trained
    assert full.peak_bytes > lora.peak_bytes
    assert 0 < lora.update["entropy"] <= torch.tensor(8.0).log() < full.update["entropy"]


def test_the_spectra_of_each_layer_are_kept(model: str, monkeypatch) -> None:
    """As the microscope gives them of the model that was trained; of full fine-tuning where the specs operate."""
    seen = []
    monkeypatch.setattr(comparison_module, "layers_of", lambda spectra: seen.append(spectra) or layers_of(spectra))
    whole = comparison(model, "full", "lora")
    for run in map(whole.perform, whole.asked()):
        layers = {group.name: group.means for group in seen[-1].layers}
        assert [str(layer.layer) for layer in run.layers] == list(layers) == ["0", "1"]
        for layer in run.layers:
            means = layers[str(layer.layer)]
            assert layer.figures == {name: means[name] for name in FIGURES} and means["condition_number"] > 1
            assert layer.places[0] == 1 and 0 < sum(layer.shares) <= 1 + 1e-9
        assert len(seen[-1].rows) == 13 and run.update["entropy"] == seen[-1].total.means["entropy"]


def test_full_fine_tuning_is_measured_from_what_it_began_with(tmp_path: Path) -> None:
    """With another pooler for each seed, where the checkpoint has none: at a rate of nearly 0 nothing moves."""
    model, bare = BertModel.from_pretrained(save_model(tmp_path), add_pooling_layer=False), tmp_path / "bare"
    model.save_pretrained(bare)
    words().save_pretrained(bare)
    whole = comparison(str(bare), "full", "lora", rates=(1e-4,), seeds=2)
    runs = [whole.perform(each) for each in whole.asked() if each["method"] == "full"]
    sizes = [run.update["relative_size"] for run in runs]
    assert len(sizes) == 2 and all(0 < size < 0.01 for size in sizes)


def test_the_same_run_is_the_same_again(model: str) -> None:
    whole = comparison(model, "lora", seeds=2)
    first, second = whole.asked()
    one, same, other = whole.perform(first), whole.perform(first), whole.perform(second)
    assert (one.tests, one.layers) == (same.tests, same.layers) and one.update != other.update


def test_all_methods_learn_the_same_batches_in_every_epoch(model: str, monkeypatch) -> None:
    """However many random numbers the dropout of one takes; and each epoch and each seed in another order."""
    learned: list[tuple] = []

    def padded(model, words, items):
        learned.append(tuple(tuple(item["input_ids"]) for item in items))
        return real(model, words, items)

    real = training.padded
    monkeypatch.setattr(training, "padded", padded)
    whole = comparison(model, "lora", seeds=2)
    whole = replace(whole, how=replace(whole.how, epochs=2), specs={
        "plain": surgery.load("lora", rank=2), "dropped": surgery.load("sora", rank=2, dropout=0.5)})
    orders = []
    for asked in whole.asked():
        learned.clear()
        whole.perform(asked)
        orders.append(learned[:10])  # 36 texts in batches of 8, twice
    plain, dropped, other, _ = orders
    assert plain == dropped and plain != other and plain[:5] != plain[5:]
    for one in (plain, other):
        assert sorted(map(len, one)) == [4] * 2 + [8] * 8 and not {*plain[5:]} & {*other[:5]}
        assert sorted(text for batch in one[:5] for text in batch) == sorted(text for batch in one[5:] for text in batch)


def test_a_rate_that_a_spec_says_is_kept_to(model: str) -> None:
    """With a rate of nearly 0 nothing of the update moves, however the run trains."""
    text = """update low(rank: int = 2) {{
      param A[rank, in] ~ normal(std = 1) {0}
      param B[out, rank] ~ normal(std = 1) {0}
      return B @ A
    }}
    target linear "**.query" shifted {{ add low() }}"""
    specs = {name: surgery.parse(text.format(clause)) for name, clause in {"held": "rate 1e-6", "free": ""}.items()}
    whole = replace(comparison(model, "lora"), specs=specs)
    held, free = (whole.perform(each) for each in whole.asked())
    start = surgery.apply(whole.load(0), specs["held"], seed=0)
    before = sum(row.relative_size for row in surgery.spectrum(start, top=0).rows) / 2
    assert held.update["relative_size"] == pytest.approx(before, rel=1e-6)
    assert free.update["relative_size"] != pytest.approx(before, rel=1e-5)


def test_the_parts_are_apart_and_the_same_for_all(model: str) -> None:
    learned, validation, (test,) = comparison(model, "full").parts
    assert [len(learned), len(validation), len(test)] == [36, 12, 12]
    assert sorted((*learned.texts, *validation.texts, *test.texts)) == sorted(task().texts)


def test_a_training_that_diverges_is_told_and_never_chosen(model: str) -> None:
    whole = comparison(model, "full", rates=(1e-3, 1e30))
    runs = [whole.perform(each) for each in whole.asked()]
    assert runs[1].tests is runs[1].validation is None and runs[1].update == {}
    assert rows(runs)[0].rate == 1e-3
    row, = rows(runs[1:])
    assert row.scores == {} and row.entropy is None


def test_what_does_not_fit_is_said_before_any_training(model: str) -> None:
    whole = comparison(model, "full", "oft", "lora")
    none = surgery.parse('spec none\ntarget linear "x" { add low_rank() }')
    specs = {**whole.specs, "oft": surgery.load("oft", block=5), "none": none}
    with pytest.raises(surgery.SurgeryError) as caught:
        replace(whole, specs=specs).check()
    assert {d.code for d in caught.value.diagnostics} == {"not-divisible", "no-match"}
    whole.check()
    specs = {"lora": surgery.load("lora"), "oft": surgery.load("oft"), "eva": surgery.parse(
        'update u() { frozen param c[in, in] = C  param k = 0  return k * W @ c }\ntarget embedding "**" { add u() }')}
    with pytest.raises(surgery.SurgeryError) as caught:  # of one method a rate, of another what data cannot give
        replace(whole, specs=specs, how=replace(whole.how, rates={"B": 1e-3})).check()
    assert [d.code for d in caught.value.diagnostics] == ["bad-value", "unsupported-module"]


def test_methods_side_by_side_share_what_they_do_not_train(model: str, monkeypatch) -> None:
    """And train what they train alone."""
    whole, seen = comparison(model, "full", "lora", "dora"), {}
    monkeypatch.setattr("surgery.experiments.comparison.side_by_side", lambda models, batch: seen.update(models) or {})
    assert whole.time().asked == whole.steps_asked
    sizes = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in seen.items()}
    assert sizes == {each["method"]: whole.perform(each).trained for each in whole.asked()}
    full, lora, dora = (m.get_parameter("bert.encoder.layer.0.attention.self.query.weight") for m in seen.values())
    assert lora is dora is not full and full.requires_grad and not lora.requires_grad
    assert seen["lora"].get_parameter("classifier.weight") is not seen["dora"].get_parameter("classifier.weight")


def test_a_causal_model_learns_on_one_file_and_is_scored_on_others(tmp_path: Path) -> None:
    """Choices, by their likelihood; the rates are swept with the first seed alone, and what is there is not done again."""
    for name, seed in (("train", 0), ("easy", 1), ("hard", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(20, seed)))
    tests = tuple(str(tmp_path / f"{name}.jsonl") for name in ("easy", "hard"))
    few = surgery.parse('spec few\ntarget linear "**.{q_proj,up_proj}" { add low_rank(2) }')
    whole = comparison_of({"full": None, "few": few}, save_causal(tmp_path / "model"),
                          Data(str(tmp_path / "train.jsonl"), None, tests), rates=(1e-3, 3e-2), seeds=2, sweep=1,
                          how=Training(steps=4, batch=4, length=64))
    whole.check()
    runs = whole.runs(tmp_path / "out")
    assert [(r.method, r.asked["rate"]) for r in runs[:4]] == [(m, rate) for rate in (1e-3, 3e-2) for m in ("full", "few")]
    best = {row.method: row.rate for row in rows(runs, None, 1)}
    assert [(r.method, r.asked["rate"], r.asked["seed"]) for r in runs[4:]] == [(m, best[m], 1) for m in ("full", "few")]
    for run in runs:
        assert list(run.tests) == ["easy", "hard"] and list(run.tests["easy"]) == ["accuracy", "accuracy_by_length"]
        assert run.main["mean"] == sum(scores["accuracy"] for scores in run.tests.values()) / 2
        assert [layer.layer for layer in run.layers] == [0] and run.asked["tests"].keys() == {"easy", "hard"}
    base = surgery.evaluate(str(tmp_path / "model"), tests[0], scoring=whole.how.scoring)
    assert any(run.tests["easy"]["accuracy"] != base.scores["accuracy"].value for run in runs)
    told: list[bool] = []
    assert whole.runs(tmp_path / "out", ended=lambda what, run, is_new: told.append(is_new)) == runs and not any(told)
    with pytest.raises(surgery.SurgeryError, match="two tests have one name"):
        comparison_of({}, str(tmp_path / "model"), Data(tests[0], None, (tests[0], tests[0])))


# ---------------------------------------------------------------------------------------------------------- devices


def begin(monkeypatch: pytest.MonkeyPatch, *workers: type) -> None:
    """Workers that are begun are of these kinds, one after the other."""
    kinds = iter(workers)
    monkeypatch.setattr(comparison_workers, "subprocess", SimpleNamespace(
        PIPE=subprocess.PIPE, Popen=lambda words, **how: next(kinds)(words, **how)))


def test_several_devices_give_what_one_does_and_a_lost_worker_loses_its_run_alone(model: str, tmp_path: Path,
                                                                                  monkeypatch) -> None:
    """Both workers are copies of this process; the page of `lost-run` begins one of its own."""
    begin(monkeypatch, Forked, Forked)
    few = surgery.parse('spec few\ntarget linear "**.query" { add low_rank(2) }')
    whole = comparison_of({"full": None, "few": few}, model, Data(written(tmp_path)), rates=(1e-3,), seeds=2,
                          how=Training(epochs=1, batch=8, length=16))
    alone = [(run.asked, run.tests, run.update, run.layers) for run in whole.runs(tmp_path / "one")]
    (tmp_path / "once").touch()
    with pytest.raises(surgery.SurgeryError, match="1 run came to no end") as caught:
        replace(whole, load=Deadly(whole.load, tmp_path / "once")).runs(tmp_path / "two", devices=["cpu", "cpu"])
    said, = caught.value.diagnostics
    assert said.code == "lost-run" and len(list((tmp_path / "two/runs").iterdir())) == 3
    assert len(said.notes) == 1 and said.notes[0].endswith("on cpu: its process ended with signal SIGKILL")
    told: list[bool] = []
    runs = whole.runs(tmp_path / "two", ended=lambda what, run, is_new: told.append(is_new))
    assert [(run.asked, run.tests, run.update, run.layers) for run in runs] == alone and told == [False] * 3 + [True]


def test_what_is_refused_in_a_worker_is_told(model: str, tmp_path: Path, monkeypatch) -> None:
    begin(monkeypatch, Forked)
    none = surgery.parse('spec none\ntarget linear "x" { add low_rank() }')
    whole = comparison_of({"none": none}, model, Data(written(tmp_path)), rates=(1e-3,), seeds=1)
    with pytest.raises(surgery.SurgeryError, match='were not taken, on cpu: .* status 1: pattern "x" matches no linear'):
        whole.steps(tmp_path / "out", devices=["cpu"])


def test_a_step_learns_one_batch_however_many_gpus_there_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    asked = arguments(str(tmp_path), Training(batch=8))
    assert (asked.train_batch_size, asked.eval_batch_size) == (8, asked.per_device_eval_batch_size)


def test_steps_are_timed_where_models_train(model: str, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(comparison_module, "side_by_side", lambda models, batch: seen.update(models, batch=batch) or {})
    monkeypatch.setattr(comparison_module, "training_device", lambda: torch.device("meta"))
    monkeypatch.setattr(comparison_module, "operated", lambda *about: None)  # which reads weights
    comparison(model, "full", "lora").time()
    assert {each.device.type for each in seen["full"].parameters()} == {"meta"}
    assert {each.device.type for each in (*seen["lora"].parameters(), *seen["batch"].values())} == {"meta"}


# ---------------------------------------------------------------------------------------------------------- command


def test_methods_have_names_of_their_own(tmp_path: Path) -> None:
    lora, full, mine = paths = [tmp_path / f"{name}.surg" for name in ("lora", "full", "mine")]
    for path in paths:
        path.write_text("spec s(rank: int = 2)\ntarget linear { add low_rank(rank) }")
    found = _methods(("full", "lora", "oft", *map(str, paths)), ["rank=3"], [])
    assert list(found) == ["full", "lora", "oft", str(lora).replace("/", "_"), "full.surg", "mine"]
    assert [spec.params[0].default.value for name, spec in found.items() if name not in ("full", "oft")] == [3] * 4


def written(folder: Path, labels: bool = True) -> str:
    chosen = task(40)
    lines = [f"{chosen.classes[int(label)] if labels else len(text) / 7}\t{text}"
             for label, text in zip(chosen.labels, chosen.texts)]
    (folder / "letters.tsv").write_text("\n".join(["label\ttext", *lines]))
    return str(folder / "letters.tsv")


def told(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["compare", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_trains_once_and_shows_the_same_again(model: str, tmp_path: Path, monkeypatch) -> None:
    words = ("lora", "--model", model, "--data", written(tmp_path), "--seeds", 2, "--epochs", 1, "--lr", "1e-3,1e-2",
             "--batch", 12, "--set", "rank=2", "-o", tmp_path / "out")
    status, said, noted = told(*words)
    assert status == 0 and "24 items to learn from, 8 to choose the learning rate on, 8 of letters to score on" in said
    assert "swept: the learning rate: 0.001, 0.01; all else is the same" in said and "lora - full" in said
    assert "differences from full are told apart from 0 (t of 2 paired seeds, 5% over all of them)" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith((" full ", " lora "))] == ["full", "lora"]
    assert noted.count("letters accuracy") == 8 and len(list((tmp_path / "out/runs").iterdir())) == 8
    assert all((tmp_path / f"out/{name}.svg").read_text().startswith("<?xml") for name in ("comparison", "spectra"))

    for name in ("perform", "time"):
        monkeypatch.setattr(Comparison, name, lambda *_: pytest.fail("what is finished is done again"))
    monkeypatch.setattr("surgery.cli.compare._keep", lambda *_: None)  # the pictures are drawn above
    status, again, _ = told(*words, "--json")
    found, kept = json.loads(again), json.loads((tmp_path / "out/comparison.json").read_text())
    assert status == 0 and found["rows"] == kept["rows"] and [row["method"] for row in kept["rows"]] == ["full", "lora"]
    assert kept["machines"] == [comparison_module.machine()] and kept["texts"]["tests"] == {"letters": 8}
    assert {"rate", "scores", "trained", "step_seconds", "peak_bytes", "entropy"} <= kept["rows"][1].keys()
    assert kept["rows"][0]["step_ratio"] == 1 and kept["rows"][0]["edge"] in ("top", "bottom")
    assert "the grid: try" in said


def test_a_method_has_rates_of_its_own() -> None:
    tried = _by_method([("", (1e-3, 3e-3)), ("", (1e-3,)), ("full", (1e-5,))], ["full", "lora"])
    assert tried == {"full": (1e-5,), "lora": (1e-3, 3e-3)} and _by_method([], ["a"]) == {"a": RATES}
    whole = replace(comparison("", "full", "lora"), rates=tried)
    assert [(each["method"], each["rate"]) for each in whole.asked()] == [("full", 1e-5), ("lora", 1e-3), ("lora", 3e-3)]
    assert _swept(whole) == "the learning rate: 1e-05 (full); 0.001, 0.003 (lora)"


def test_numbers_are_compared_by_rank_correlation(model: str, tmp_path: Path) -> None:
    data = written(tmp_path, labels=False)
    status, said, _ = told("lora", "--no-full", "--model", model, "--data", data, "--seeds", 1, "--epochs", 1,
                           "--lr", "1e-3", "--limit", 30, "-o", tmp_path / "out", "--target", "**.query")
    assert status == 0 and "regression: 18 items" in said and "spearman" in said and "mse" in said
    assert "lora" in said and "full" not in said


@pytest.mark.parametrize(("words", "status", "said"), [
    (("lora", "--lr", "1e-3,x"), 2, "is not a list such as"),
    (("lora", "--lr", "0"), 2, "is not a list such as"),
    (("lora", "--set", "rnk=2"), 1, "did you mean `rank`?"),
    (("oft", "--set", "rank"), 2, "bad-set"),
    (("oft", "--set", "rank=2"), 1, "none of these specs has a parameter `rank`"),
    (("lorra",), 2, "unknown-spec"),
    (("lora", "--lr", "dora=1e-3"), 2, "--lr dora=... is for none of full, lora"),
    (("lora", "--against", "dora"), 2, "--against dora is none of full, lora"),
    (("oft", "--set", "block=5"), 1, "not-divisible"),
    (("lora", "--threshold", "0"), 2, "bad-data"),
    (("lora", "--devices", "cpu,cuda:9"), 1, "there is no device `cuda:9` to train on"),
    (("lora", "--epochs", "-1"), 2, "-1"),
])
def test_what_is_wrong_is_said_before_any_training(words: tuple, status: int, said: str, model: str,
                                                   tmp_path: Path) -> None:
    found = told(*words, "--model", model, "--data", written(tmp_path), "-o", tmp_path / "out")
    assert found[0] == status and said in found[2] and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_before_any_training(model: str, tmp_path: Path) -> None:
    data = written(tmp_path)
    status, _, said = told("lora", "--model", model, "--data", data, "-o", f"{data}/out")
    assert status == 2 and "letters.tsv is a file" in said
