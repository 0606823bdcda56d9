"""Merging what was trained on a quantised base: onto the dequantised weights, or onto the full ones, with what that
changes in the logits."""

import json
from pathlib import Path

import pytest
import torch
from command import run
from models import logits, perturbed
from quantiser import Rows8Config
from transformers import LlamaForCausalLM

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.planning.initial_values import departure

pytestmark = pytest.mark.usefixtures("folder")

NARROW = 'target linear "**.{q,v}_proj" { add low_rank(rank = 2) }\ntrain "**.norm.weight"'


def trained(spec: object) -> torch.Tensor:
    """Saves an adapter that was trained on a quantised Llama; what the operated model gives."""
    load_demo("llama").save_pretrained("base")
    model = LlamaForCausalLM.from_pretrained("base", quantization_config=Rows8Config())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Int8Linear"
    surgeon = perturbed(model, spec)
    surgeon.save("adapter")
    return logits(model)


@pytest.mark.parametrize("spec", ["lora", "dora", "oft", NARROW], ids=["lora", "dora", "oft", "some layers"])
def test_the_dequantised_merge_is_what_was_trained(spec: str) -> None:
    wanted = trained(spec if spec.isalnum() else surgery.parse(spec))
    assert json.loads(Path("adapter/meta.json").read_text())["quantization"]["quant_method"] == "rows8"
    done = surgery.merge_files("adapter", "merged", dequantise=True)
    merged = LlamaForCausalLM.from_pretrained("merged")
    assert not hasattr(merged.config, "quantization_config")
    assert {type(m).__name__ for n, m in merged.named_modules() if n.endswith("_proj")} == {"Linear"}
    assert departure(wanted, logits(merged)) < 1e-5
    assert done.logits is not None and done.logits < 1e-5 and max(done.errors.values()) < 1e-6


def test_what_one_adapter_trained_the_next_transforms() -> None:
    """W' of an embedding is made of the one that was trained, and stands in its place."""
    trained(surgery.parse('target linear "**.q_proj" { add low_rank(rank = 2) }\ntrain "**.embed_tokens.weight"'))
    second = surgery.parse('target embedding "**.embed_tokens" { add low_rank(rank = 2) }')
    perturbed(surgery.load_model("base"), second).save("second")
    model = LlamaForCausalLM.from_pretrained("base", quantization_config=Rows8Config())
    surgeries = surgery.Surgeries(model)
    for name in ("adapter", "second"):
        surgeries.add(name, Path(name))
    surgeries.use("adapter", "second")
    surgery.merge_files("adapter", "merged", then=["second"], dequantise=True)
    assert departure(logits(model), logits(LlamaForCausalLM.from_pretrained("merged"))) < 1e-5


def test_the_merge_onto_full_weights_says_what_that_changes() -> None:
    wanted = trained("lora")
    done = surgery.merge_files("adapter", "merged")
    change = departure(wanted, logits(LlamaForCausalLM.from_pretrained("merged")))
    assert done.in_memory == "" and done.logits == pytest.approx(change, rel=1e-3) and change > 1e-3


def test_both_are_told_on_the_command_line() -> None:
    trained("lora")
    full, plain = run("merge", "adapter", "-o", "full"), run("merge", "adapter", "-o", "plain", "--dequantise")
    assert (full.exit_code, plain.exit_code) == (0, 0), full.output + plain.output
    for result in (full, plain):
        assert "from those of the quantised model that was trained" in result.stdout
    small, large = (json.loads(run("merge", "adapter", "-o", "out", "--force", "--json", *words).stdout)["logits_change"]
                    for words in (["--dequantise"], []))
    assert small < 1e-5 < 1e-3 < large


def test_there_is_nothing_to_dequantise_in_a_plain_model() -> None:
    load_demo("llama").save_pretrained("base")
    perturbed(surgery.load_model("base"), "lora").save("adapter")
    with pytest.raises(SurgeryError, match="merge-error.*nothing to dequantise"):
        surgery.merge_files("adapter", "merged", dequantise=True)
    assert not Path("merged").exists()
    assert surgery.merge_files("adapter", "merged").logits is None


def test_what_cannot_be_compared_is_said() -> None:
    """The package that quantises is not installed where it is merged."""
    trained("lora")
    meta = Path("adapter/meta.json")
    known = json.loads(meta.read_text())
    meta.write_text(json.dumps({**known, "quantization": {"quant_method": "nobody's"}}))
    done = surgery.merge_files("adapter", "merged")
    assert done.logits is None and done.not_compared.startswith("cannot load `base`")


@pytest.mark.parametrize("bias", [False, True])
def test_what_its_dtype_cannot_hold_is_refused(bias: bool) -> None:
    """As in a merge of plain weights: W', and b' where a formula changes it."""
    config = load_demo("llama").config
    config.attention_bias = True
    LlamaForCausalLM(config).half().save_pretrained("base")
    quantised = LlamaForCausalLM.from_pretrained("base", quantization_config=Rows8Config(), dtype=torch.float16)
    shift = " add shift()" * bias
    surgeon = surgery.apply(quantised, surgery.parse(f'target linear "**.q_proj" {{ add low_rank(2){shift} }}'), check=False)
    far = "beta" if bias else "B"
    with torch.no_grad():
        next(t for n, t in surgeon.named_tensors().items() if n.endswith(f".{far}")).fill_(1e8)
    surgeon.save("adapter")
    with pytest.raises(SurgeryError, match="merge-error.*does not fit float16"):
        surgery.merge_files("adapter", "merged", dequantise=True)
    assert not Path("merged").exists()
