"""The reference model of a trainer of preferences is the operated one with its surgery off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import perturbed
from transformers import LlamaForCausalLM

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


SETTINGS = {"per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 3, "learning_rate": 0.05, "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1, "gradient_checkpointing": False, "bf16": False}
ROWS = {"SFT": [{"text": "a b c d"}, {"text": "b a d c"}], "GRPO": [{"prompt": "a b"}, {"prompt": "b a"}],
        "DPO": [{"prompt": "a b", "chosen": " c d", "rejected": " e f"},
                {"prompt": "b a", "chosen": " d d", "rejected": " f c"}]}


def trained(kind: str, is_ours: bool, folder: Path) -> tuple[surgery.Surgeon, Any]:
    """Three steps of one of TRL's trainers, against the base model: ours, or one that TRL loads by its name."""
    import trl
    from datasets import Dataset

    model = LlamaForCausalLM.from_pretrained(folder / "base")
    surgeon, more, own = surgery.apply(model, "lora", check=False), {}, {}
    if kind == "DPO":
        more = {"ref_model": surgeon.reference() if is_ours else None}
    if kind == "GRPO":
        own = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0 if is_ours else 0.5}
        more = {"reward_funcs": lambda completion_ids, **_: [sum(ids) / 100 for ids in completion_ids]}
    arguments = getattr(trl, f"{kind}Config")(str(folder / f"{kind} {is_ours}"), **SETTINGS, **own)
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=arguments, train_dataset=Dataset.from_list(ROWS[kind] * 3), processing_class=words(), **more)
    if kind == "GRPO" and is_ours:  # it has no argument for a reference, and loads one where beta is not 0 at first
        trainer.beta, trainer.ref_model = 0.5, surgeon.reference()
    trainer.train()
    return surgeon, trainer


def told(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.engines
@pytest.mark.parametrize("kind", ROWS)
def test_trl_trains_and_saves_the_adapter_alone_and_needs_no_second_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is of the extra `engines`")
    load_demo("llama").save_pretrained(tmp_path / "base")
    base, batch = load_demo("llama"), demo_inputs("llama")
    surgeon, trainer = trained(kind, True, tmp_path)
    model = trainer.model.eval()
    state, operated = surgeon.state(), model(**batch).logits
    assert all(t.abs().max() > 0 for n, t in state.items() if n.endswith(".B")) and len(set(told(trainer, "loss"))) == 3
    other = load_demo("llama")
    saved = surgery.attach(other, tmp_path / f"{kind} True" / "checkpoint-3").state()
    assert saved.keys() == state.keys() and all(torch.equal(t, saved[n]) for n, t in state.items())
    assert not (tmp_path / f"{kind} True" / "checkpoint-3" / "config.json").exists()
    torch.testing.assert_close(other(**batch).logits, operated)
    if kind != "SFT":
        (theirs, comparing), reference = trained(kind, False, tmp_path), trainer.ref_model
        assert not [*reference.parameters()] and [*comparing.ref_model.parameters()]
        assert torch.equal(reference(**batch).logits, base(**batch).logits)
        for name in ("loss", "kl") if kind == "GRPO" else ("loss",):
            assert told(trainer, name) == pytest.approx(told(comparing, name), rel=1e-4, abs=1e-6)
        for name, value in theirs.state().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
        # log 2 while it is the base model; what it has moved away from that
        assert abs(told(trainer, "loss")[0] - 0.6931) < 1e-3 if kind == "DPO" else told(trainer, "kl")[-1] > 1e-4
    surgeon.merge()
    torch.testing.assert_close(model(**batch).logits, operated)
