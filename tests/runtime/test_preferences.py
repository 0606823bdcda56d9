"""The reference model of a trainer of preferences is the operated one with its surgery off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import perturbed

import surgery
from surgery.models.demo import demo_inputs, load_demo


def test_a_reference_is_the_base_model_and_holds_nothing():
    model = load_demo("llama")
    batch = demo_inputs(model)
    with torch.no_grad():
        base = model(**batch).logits
    surgeon = perturbed(model, "dora")
    reference, operated = surgeon.reference(), model(**batch).logits
    with torch.no_grad():
        assert torch.equal(reference(**batch).logits, base)
    assert torch.equal(model(**batch).logits, operated) and not torch.equal(operated, base)
    assert not [*reference.parameters()] and reference.config is model.config
    assert reference.get_output_embeddings() is model.get_output_embeddings()
    # a trainer's own forward, which runs parts of the model by themselves
    reference.forward = lambda **given: reference.lm_head(reference.model(**given).last_hidden_state)
    with torch.no_grad():
        assert torch.equal(reference(**batch), base)
    operated.square().mean().backward()  # what ran in between has taken nothing from the graph
    assert all(p.grad is not None for p in surgeon.parameters())


def test_a_reference_has_a_mode_of_its_own():
    """Its numbers are those of the model in evaluation, while the model itself trains with dropout."""
    model = load_demo("gpt2")
    batch = demo_inputs(model)
    with torch.no_grad():
        base = model.eval()(**batch).logits
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    reference = perturbed(model, surgery.load("lora").retarget("**.c_fc")).reference()
    model.train()
    model.lm_head.eval()
    modes = [part.training for part in model.modules()]
    with torch.no_grad():
        assert torch.equal(reference(**batch).logits, base) and torch.equal(reference.eval()(**batch).logits, base)
        assert not torch.equal(reference.train()(**batch).logits, base)
    assert [part.training for part in model.modules()] == modes


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate("<pad> </s> <unk> a b c d e f".split())},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def preferred(folder: Path, how: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The adapter after three steps of DPO, against the base model that `how` names, and what was logged."""
    Dataset = pytest.importorskip("datasets").Dataset
    trl = pytest.importorskip("trl")

    torch.manual_seed(0)
    model = load_demo("llama")
    base = copy.deepcopy(model)
    surgeon = surgery.apply(model, "lora", check=False)
    rows = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"},
                              {"prompt": "b a", "chosen": " d d", "rejected": " f c"}] * 3)
    arguments = trl.DPOConfig(str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, report_to=[],
                          use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, seed=1,
                          gradient_checkpointing=False, bf16=False)
    trainer = trl.DPOTrainer(model, surgeon.reference() if how == "ours" else base, args=arguments, train_dataset=rows,
                         processing_class=words())
    trainer.train()
    return surgeon.state(), trainer.state.log_history


@pytest.mark.engines
def test_dpo_of_trl_needs_no_second_model(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is of the extra `engines`")
    (ours, logs), (theirs, others) = (preferred(tmp_path / how, how) for how in ("ours", "a copy"))
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3 and abs(losses[1] - losses[0]) > 0.01  # log 2 while it is the base model
    assert losses == pytest.approx([entry["loss"] for entry in others if "loss" in entry], rel=1e-4)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
