"""The examples run: each spec in examples/ is in order, and trains on the reviews with no Python written for it."""

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_text import save_model

from surgery.cli.main import main

EXAMPLES = Path(__file__).parents[1] / "examples"
SPECS = sorted(path for path in EXAMPLES.rglob("*.surg") if path.parent.name not in ("grid", "sora"))
# (test_grid.py and test_paper_settings.py have those.)


@pytest.fixture(scope="module")
def sentiment():
    found = importlib.util.spec_from_file_location("sentiment", EXAMPLES / "sentiment.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def surgery(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_in_order_and_can_be_applied(spec: Path, tmp_path: Path) -> None:
    surgery("check", "--strict", spec)
    surgery("fmt", "--check", spec)
    assert "the logits are unchanged" in surgery("apply", spec, "demo:bert", "-o", tmp_path / "out")


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_the_sentiment_example(spec: Path, sentiment, tmp_path: Path, capsys) -> None:
    """The first spec trains the model that the example is for, the others a small one."""
    words = [str(spec), "--limit", "20", "--epochs", "1", "--out", str(tmp_path / "out")]
    if spec != SPECS[0]:
        words += ["--model", save_model(tmp_path / "model", longest=256)]
    assert sentiment.main(words) == 0
    said = capsys.readouterr().out
    assert "training on 16 texts, holding out 4" in said and "accuracy on held-out texts" in said
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_what_is_wrong_with_an_example_is_said_in_words(sentiment, capsys) -> None:
    assert sentiment.main(["lorra"]) == 1
    assert "did you mean `lora`?" in capsys.readouterr().err
