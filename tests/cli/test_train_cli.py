"""`surgery train` and `surgery eval`: as the README has them, from a file of settings, and what they say of a wrong line."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from small_text import questions, save_causal

from surgery.cli.main import main

SPEC = 'target linear "**.{q_proj,up_proj}" { add low_rank(2) post diagonal() }'
TRAIN = ["train", "few.surg", "model", "--data", "train.jsonl", "--eval", "test.jsonl", "-o", "out", "--steps", "4",
         "--batch", "4", "--lr", "0.05"]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with a spec, a model and data."""
    folder, before = tmp_path_factory.mktemp("here"), Path.cwd()
    save_causal(folder / "model")
    (folder / "few.surg").write_text(SPEC)
    for seed, name in enumerate(("train", "test")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(16, seed)))
    os.chdir(folder)
    yield folder
    os.chdir(before)


def run(*words: str, status: int = 0):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == status, result.output
    return result


def test_train_merge_and_eval() -> None:
    result = run(*TRAIN)
    for said in ("before  test, 16 items: accuracy 0.", "step 4/4  loss ", "after   test, 16 items: accuracy 0."):
        assert said in result.stderr
    assert "accuracy_by_length" in result.stdout and "next      surgery merge out -o out-merged" in result.stdout
    run("merge", "out", "-o", "out-merged")
    scores = [json.loads(run("eval", name, "--data", "test.jsonl", "--json").stdout)["evaluations"][0]["scores"]
              for name in ("model", "out", "out-merged")]
    assert scores[1] == scores[2] != scores[0]
    said = run("eval", "out", "--data", "test.jsonl", "--data", "train.jsonl", "--limit", "8").stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == ["test, 8 items", "train, 8 items"]
    assert "exists already" in run(*TRAIN, status=2).stderr


def test_a_file_of_settings_trains_the_same_again() -> None:
    first = run(*TRAIN, "--rate", "B=0.1", "--schedule", "cosine", "--limit", "12", "--force", "--json").stdout
    again = run("train", "--config", "out/training.toml", "-o", "again", "--json").stdout
    first, again = json.loads(first), json.loads(again)
    assert (first["loss"], first["after"]) == (again["loss"], again["after"])
    assert (Path("out") / "adapter.safetensors").read_bytes() == (Path("again") / "adapter.safetensors").read_bytes()
    other = run("train", "--config", "out/training.toml", "-o", "other", "--steps", "2", "--json").stdout
    assert json.loads(other)["steps"] == 2


@pytest.mark.parametrize(("text", "said"), [
    ("learning-rate = 1e-3", "asks for `learning_rate`, which is no setting"),
    ("epoch = 3", "did you mean `epochs`?"), ("lr = ", "wrong.toml is not TOML"), ('lr = "fast"', "'fast' is not a valid"),
])
def test_a_wrong_file_of_settings(text: str, said: str) -> None:
    Path("wrong.toml").write_text(text)
    assert said in run(*TRAIN[:7], "-o", "wrong", "--config", "wrong.toml", status=2).stderr


@pytest.mark.parametrize(("words", "said"), [
    (["--patience", "2"], "--patience needs --dev FILE"), (["--rate", "B"], "B is not of the form B=1e-3"),
    (["--data", "few.surg"], "few.surg is of no kind that is read"),
    (["--data", "none.jsonl"], "missing-file"), (["--resume"], "there is no run to go on with"),
])
def test_a_wrong_line(words: list[str], said: str) -> None:
    result = run(*TRAIN[:7], "-o", "wrong", *words, status=2)
    assert said in result.stderr and not Path("wrong").exists()


ALONG = """spec s(unread: int = 3)
update along(rank: int = 2) {
  param A[rank, in] = right_singular(G, rank)
  param B[out, rank] = 0
  return B @ A
}
target linear "**.q_proj" { add along() }"""


def test_starts_are_measured_on_a_file() -> None:
    Path("along.surg").write_text(ALONG)
    assert "--data FILE" in run("apply", "along.surg", "model", status=1).stderr
    run("apply", "along.surg", "model", "--data", "train.jsonl", "--batches", "1", "-o", "one")
    run("apply", "along.surg", "model", "--data", "train.jsonl", "-o", "all")
    told = run("train", "along.surg", "model", "--data", "train.jsonl", "--steps", "1", "--batch", "8", "--lr", "1e-12",
               "-o", "trained")
    assert told.stderr.index("warning[unused]") < told.stderr.index("step 1/1")  # and not when hours have passed
    one, whole, trained = (load_file(Path(name, "adapter.safetensors")) for name in ("one", "all", "trained"))
    name = next(name for name in one if name.endswith(".A"))
    assert not torch.equal(one[name], whole[name])
    torch.testing.assert_close(trained[name], whole[name], rtol=0, atol=1e-6)  # of the same two batches
    assert "no column" in run("apply", "along.surg", "model", "--data", "train.jsonl", "--label", "none",
                              "--task", "classification", status=2).stderr


def test_the_launcher_starts_two_processes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page has the command. (What two of them learn: tests/runtime/test_two_processes.py.)"""
    from accelerate.commands import launch

    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"`accelerate launch (.*) \.\.\.`", page)
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    monkeypatch.setattr(launch, "simple_launcher", lambda args: None)  # which starts one
    launch.launch_command(launch.launch_command_parser().parse_args([*words.split(), "lora"]))
    (asked,) = started
    assert (asked.nproc_per_node, asked.training_script, asked.module) == ("2", "surgery", True)
    assert asked.training_script_args == ["train", "lora"]
