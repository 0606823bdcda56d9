"""The settings of the paper's tables: they are options that there are, and their specs fit small stand-ins of the models."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from surgery.cli.compare import _by_method, _methods
from surgery.cli.main import main
from surgery.cli.training_options import given
from surgery.experiments.fine_tuning import Training
from surgery.planning.check import check
from surgery.planning.compile import compile

PAPER = Path(__file__).parents[2] / "examples" / "paper"
FILES = sorted((PAPER / "settings").glob("*.toml"))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
# The class that stands in for each model, and how many weights of a layer the authors' code operates on.
STAND_INS = {
    "microsoft/deberta-v3-base": (transformers.DebertaV2ForSequenceClassification, transformers.DebertaV2Config, 6),
    "meta-llama/Meta-Llama-3-8B": (transformers.LlamaForCausalLM, transformers.LlamaConfig, 5),
    "google/gemma-7b": (transformers.GemmaForCausalLM, transformers.GemmaConfig, 5)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_settings_of_a_table_fit_its_model(file: Path) -> None:
    command = main.commands["compare"]  # type: ignore[attr-defined]
    asked = command.make_context("compare", ["--config", str(file)]).params
    kind, config, weights = STAND_INS[asked["model"]]
    with torch.device("meta"):
        model = kind(config(**SMALL))
    specs = _methods(asked["specs"], asked["sets"], asked["targets"])
    assert set(specs) >= {"lora", "dora", "oft", "sora", "sora_reference"}
    for spec in specs.values():
        assert spec is not None and len(compile(model, spec).placed) == 2 * weights
    how = Training(**given({name: asked[name] for name in vars(Training()) if name in asked}))
    assert how.batch * how.accumulate == (32 if asked["model"].startswith("microsoft") else 128)
    tried = _by_method(asked["rates"], list(specs))
    assert all(len(rates) == 3 for rates in tried.values()) and len(asked["tests"]) > 0


def test_the_table_of_turns_is_of_what_was_run() -> None:
    found = importlib.util.spec_from_file_location("turned", PAPER / "sora" / "turned.py")
    turned = importlib.util.module_from_spec(found)
    found.loader.exec_module(turned)
    runs = json.loads(turned.FILE.read_text(encoding="utf-8"))
    assert len(runs) == turned.SEEDS * len(turned.VARIANTS) and all(len(run["steps"]) == turned.STEPS for run in runs)
    assert "\n".join(turned.table(runs)) in (PAPER / "README.md").read_text(encoding="utf-8")
    for variant in turned.VARIANTS:
        assert check(turned.spec_of(variant)) == []
    form, factor, _ = turned.VARIANTS["exact, s_p"]
    proposed = PAPER / "sora" / "exact_sp.surg"  # which says that it is orthogonal, and is checked for that
    assert check(proposed) == [] and f"  return {form.format(f'{factor} * (D @ C.T - C @ D.T)')}\n" in proposed.read_text(
        encoding="utf-8")
