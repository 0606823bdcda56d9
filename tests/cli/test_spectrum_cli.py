"""`surgery spectrum`: of saved adapters and of pairs of models, from their files one tensor at a time;
tables and plots."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from models import LLAMA, SMALLER, perturbed, spec_for

import surgery
from surgery.analysis import saved_weights
from surgery.cli.main import main
from surgery.experiments.training import with_head
from surgery.models.demo import demo_config, load_demo
from surgery.models.loading import load_with_head
from surgery.runtime.save import save_merged


def run(*words: object) -> object:
    return CliRunner().invoke(main, ["spectrum", *map(str, words)])


def measured(*words: object) -> dict:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def said(*words: object, code: int = 0) -> str:
    result = run(*words)
    assert result.exit_code == code, result.output
    return result.output


def figures(found: dict) -> dict[str, list[float]]:
    return {m["name"]: [m["entropy"], m["stable_rank"], m["effective_rank"]] for m in found["modules"]}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A moved SORA on demo:llama."""
    perturbed(load_demo(LLAMA), "sora").save(tmp_path / "adapter", base_model=f"demo:{LLAMA}")
    return tmp_path / "adapter"


# -------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_is_as_python_says(adapter: Path) -> None:
    surgeon = surgery.attach(load_demo(LLAMA), adapter)
    assert measured(adapter)["modules"] == json.loads(json.dumps(surgery.spectrum(surgeon).to_json()))["modules"]
    squared = measured(adapter, "--squared", "--top", "0")
    assert squared["modules"] == json.loads(json.dumps(surgery.spectrum(surgeon, squared=True,
                                                                        top=0).to_json()))["modules"]
    assert squared["squared"] and squared["modules"][0]["overlap_out"] is None


def test_an_adapter_needs_only_the_weights_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model lies in files of a tensor each, and is never loaded."""
    load_demo(LLAMA).save_pretrained(tmp_path / "base", max_shard_size="1KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 5
    # an identity and ones that the program makes, where the layers themselves have no numbers
    spec = """transform turned() on n : orthogonal {
      param t = 0
      return cos(t) * I(n) + sin(t) * kron(I(n / 2), [[0, -1], [1, 0]])
    }
    update level() { param c = 0 return W * (c * ones(out, in)) }
    target linear "**.q_proj" { pre diagonal() pre turned() on in add low_rank(3) add level() post orthogonal(2) }"""
    surgeon = perturbed(load_demo(LLAMA), surgery.parse(spec))
    surgeon.save(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    monkeypatch.setattr(saved_weights, "load", None)
    assert figures(measured(tmp_path / "adapter")) == figures(surgery.spectrum(surgeon).to_json())


def test_a_trained_head_is_no_obstacle(tmp_path: Path) -> None:
    """An adapter of a text task was saved from the base model with a head that the base model's files know nothing
    of."""
    import transformers

    base = transformers.BertModel(demo_config("bert")).eval()
    base.save_pretrained(tmp_path / "base")
    model = load_with_head(str(tmp_path / "base"), 3)
    surgeon = perturbed(model, with_head(surgery.load("dora"), model))
    surgeon.save(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    found = measured(tmp_path / "adapter")
    assert figures(found) == figures(surgery.spectrum(surgeon).to_json())
    assert found["modules"][0]["name"].startswith("bert.encoder.layer.0.")


def test_shared_and_fused_tensors(tmp_path: Path) -> None:
    spec = """spec s
    update own() { shared param A[2, in] ~ normal() param B[out, 2] = 0 return B @ A }
    target linear "**.q_proj", "**.experts.*" { add own() }"""
    surgeon = perturbed(load_demo("mixtral"), surgery.parse(spec))
    surgeon.save(tmp_path / "adapter", base_model="demo:mixtral")
    found = measured(tmp_path / "adapter")
    assert figures(found) == figures(surgery.spectrum(surgeon).to_json())
    assert sum("experts" in m["name"] for m in found["modules"]) == 2 * 2 * 4


def test_another_base(adapter: Path, tmp_path: Path) -> None:
    model = load_demo(LLAMA, seed=5)
    model.save_pretrained(tmp_path / "other")
    other = measured(adapter, "--base", tmp_path / "other")
    expected = figures(surgery.spectrum(surgery.attach(model, adapter)).to_json())
    assert figures(other) == expected != figures(measured(adapter))


def test_a_fresh_adapter_is_said_to_do_nothing(tmp_path: Path) -> None:
    surgery.apply(load_demo(LLAMA), "lora").save(tmp_path / "adapter", base_model=f"demo:{LLAMA}")
    text = said(tmp_path / "adapter", "--csv", tmp_path / "t.csv", "--plot", tmp_path / "p.png")
    assert "7 weights, none of them changed" in text and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "resnet"])
def test_a_merged_model_against_its_base(name: str, tmp_path: Path) -> None:
    model = load_demo(SMALLER[name])
    model.save_pretrained(tmp_path / "base")
    surgeon = perturbed(model, spec_for(name, "lora"))
    adapter = surgery.spectrum(surgeon)
    save_merged(surgeon, tmp_path / "tuned")
    found = measured(tmp_path / "base", tmp_path / "tuned")
    assert figures(found) == figures(measured(f"demo:{SMALLER[name]}", tmp_path / "tuned"))
    changed = {m["name"]: m for m in found["modules"] if m["numerical_rank"]}
    assert changed.keys() == {row.name for row in adapter.rows}
    for row in adapter.rows:
        assert abs(changed[row.name]["entropy"] - row.spectrum.entropy) < 1e-6
        assert abs(changed[row.name]["stable_rank"] - row.spectrum.stable_rank) < 1e-6


def test_two_models_are_read_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        load_demo(LLAMA, seed).save_pretrained(tmp_path / str(seed), max_shard_size="50KB")
    monkeypatch.setattr(saved_weights, "load", None)
    found = measured(tmp_path / "0", tmp_path / "1")
    expected = surgery.spectrum(load_demo(LLAMA, 0), load_demo(LLAMA, 1))
    assert figures(found) == figures(expected.to_json()) and found["not_compared"] == []


def test_a_base_model_against_a_task_model(tmp_path: Path) -> None:
    """The same weights under another prefix; what the base lacks, or has in another shape, is named."""
    import transformers

    base, tuned = transformers.BertModel(demo_config("bert")), load_demo("bert")
    with torch.no_grad():
        tuned.bert.load_state_dict(base.state_dict())
        tuned.bert.encoder.layer[1].output.dense.weight += 0.1 * torch.randn(64, 128)
    tuned.resize_token_embeddings(300)
    base.save_pretrained(tmp_path / "base"), tuned.save_pretrained(tmp_path / "tuned")
    found = measured(tmp_path / "base", tmp_path / "tuned")
    assert [m["name"] for m in found["modules"] if m["numerical_rank"]] == ["bert.encoder.layer.1.output.dense"]
    assert found["not_compared"] == ["bert.embeddings.word_embeddings", "classifier"]
    assert "not compared" in (text := said(tmp_path / "base",
                                           tmp_path / "tuned")) and "1 changed weight: entropy" in text


# --------------------------------------------------------------------------------------------------------- several


def test_several_are_measured_as_each_alone_and_drawn_together(tmp_path: Path) -> None:
    lora, dora, tuned = (tmp_path / name for name in ("lora", "dora", "tuned"))
    load_demo(LLAMA).save_pretrained(tmp_path / "base")
    for folder in (lora, dora):
        perturbed(load_demo(LLAMA), folder.name).save(folder, base_model=str(tmp_path / "base"))
    save_merged(perturbed(load_demo(LLAMA), "lora"), tuned)
    both = measured(lora, dora)["spectra"]
    assert [each["subject"] for each in both] == [str(lora), str(dora)]
    assert list(map(figures, both)) == [figures(measured(lora)), figures(measured(dora))]
    # A model among adapters is measured against their base; the first name is that where it is a model.
    for words in ((lora, tuned, "--base", tmp_path / "base"), (tmp_path / "base", lora, tuned)):
        one, other = measured(*words)["spectra"]
        assert figures(one) == figures(both[0]) and figures(other) == figures(measured(tmp_path / "base", tuned))
    text = said(lora, dora, "--csv", tmp_path / "t.csv", "--plot", tmp_path / "p.svg", "--top", "0", "--condition")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["subject"] for row in rows] == [str(lora)] * 7 + [str(dora)] * 7
    assert "κ(W')" in text and all(float(row["condition_number"]) > 1 for row in rows)
    assert (tmp_path / "p.svg").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------ files


def test_the_table_and_the_csv(adapter: Path, tmp_path: Path) -> None:
    text = said(adapter, "--csv", tmp_path / "new" / "t.csv")
    modules = measured(adapter)["modules"]
    for words in ("self_attn.q_proj", "layer (mean)", "module type (mean)", "‖RRᵀ-I‖/√n",
                  "7 changed weights: entropy"):
        assert words in text
    rows = list(csv.DictReader((tmp_path / "new" / "t.csv").read_text().splitlines()))
    assert [(r["name"], float(r["entropy"]), int(r["out"])) for r in rows] == [
        (m["name"], m["entropy"], m["shape"][0]) for m in modules]
    assert all(float(r["orthogonality"]) < 1e-6 for r in rows)


def test_a_plot_is_the_same_each_time(adapter: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.svg", "other.svg")]
    for file in files:
        said(adapter, "--top", "0", "--plot", file)
    first, second = (file.read_bytes() for file in files)
    assert first == second and first.startswith(b"<?xml")


# ----------------------------------------------------------------------------------------------------------- faults


def test_what_cannot_be_done_is_said_before_any_work(adapter: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_weights, "opened_adapter", None)
    assert "did you mean `.png`?" in said(adapter, "--plot", tmp_path / "p.pgn", code=2)
    assert "is a folder" in said(adapter, "--csv", tmp_path, code=2)
    assert "is a file" in said(adapter, "--csv", adapter / "meta.json" / "t.csv", code=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'surgery[plot]'" in said(adapter, "--plot", tmp_path / "p.png", code=2)


def test_only_a_file_is_replaced(adapter: Path, tmp_path: Path) -> None:
    """A device stays one, and a link a link."""
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in said(adapter, "--csv", tmp_path / "pipe", code=2) and (tmp_path / "pipe").is_fifo()
    (tmp_path / "table.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("table.csv")
    said(adapter, "--csv", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "table.csv").read_text().startswith("name,")


def test_wrong_use(adapter: Path, tmp_path: Path) -> None:
    assert "error[missing-file]" in said(tmp_path / "nowhere", code=2)
    assert "is a saved adapter" in said(adapter, f"demo:{LLAMA}", code=2)
    assert "error[bad-adapter]" in said(adapter, "--base", "demo:gpt2", code=1)
    assert "have no weight in common" in said("demo:resnet", f"demo:{LLAMA}", code=1)
    perturbed(load_demo(LLAMA), "lora").save(tmp_path / "stray")
    meta = tmp_path / "stray" / "meta.json"  # of an adapter that was saved by an older version, or of a nameless model
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "base_model": None}))
    assert "--base names it" in said(tmp_path / "stray", code=2)
