"""The bench: what takes turns is what it is said to be, and the figures are those of what ran."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from small_text import pieces, questions, save_causal

from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.experiments.bench import Bench, batches_of, spread
from surgery.language.library import load, parse
from surgery.models.demo import DEMOS, demo_config, demo_inputs, load_demo
from surgery.models.loading import load as load_model

TOKENS = (2, 8)
ODD = parse('spec odd()\ntarget linear "**.q_proj" {\n  post scale()\n}\ntrain "**.norm.weight"')


@pytest.fixture(scope="module")
def bench() -> Bench:
    specs = {"lora": load("lora", rank=2), "dora": load("dora", rank=2, dropout=0.0), "odd": ODD}
    made = Bench(load_demo("llama"), specs, TOKENS, against_peft=True)
    made.said = list(made.run(3))
    return made


def test_there_is_a_row_for_each_spec_with_all_its_figures(bench):
    frozen, lora, dora, odd = bench.rows()
    assert [r["name"] for r in (frozen, lora, dora, odd)] == ["frozen", "lora", "dora", "odd"]
    assert frozen["step_ratio"] == frozen["forward_ratio"] == 1
    for row in (lora, dora):
        assert all(row[f"{who}{what}"] > 0 for who in ("", "peft_") for what in (
            "step_ratio", "step_seconds", "forward_ratio", "forward_seconds", "peak_bytes"))
        assert row["step_over_peft"] > 0 and row["peft_note"] is None
    assert odd["peft_step_ratio"] is None and odd["step_over_peft"] is None
    assert odd["peft_note"] == "PEFT has no method with this formula"


def test_what_starts_from_data_starts_at_the_batches_of_the_measurement():
    made = Bench(load_demo("llama"), {name: load(name, rank=2) for name in ("eva", "lora_ga")}, TOKENS, merged=True)
    for _ in made.run(1):
        pass
    assert all(row["step_ratio"] and row["merged_forward_ratio"] for row in made.rows()[1:])


def test_a_ratio_is_of_times_of_the_same_round():
    made = Bench(load_demo("llama"), {"lora": load("lora")}, TOKENS)
    made.frozen.times["step"], made.contenders[0].ours.times["step"] = [1.0, 10.0, 100.0], [2.0, 30.0, 200.0]
    assert made.rows()[1]["step_ratio"] == 2 and made.rows()[1]["step_seconds"] == 30


def test_the_spread_is_half_the_distance_between_the_quartiles():
    assert spread([5, 1, 2, 4, 3]) == 1
    assert spread([7]) is None


def test_every_round_begins_with_another(bench):
    first = [next(s for s in bench.said if f"step, round {n}" in s).partition(": ")[2] for n in (1, 2, 3)]
    assert first == ["the frozen model", "lora", "PEFT's lora"]


def test_weights_are_shared_and_the_model_is_left_alone(bench):
    weight = bench.model.model.layers[0].self_attn.q_proj.weight
    lora, dora, odd = bench.contenders
    inner = lora.peft.model.base_model.model.model.layers[0].self_attn.q_proj
    assert inner.base_layer.weight is weight is lora.ours.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert not any(p.requires_grad or "_surgery" in n for n, p in bench.model.named_parameters())
    assert odd.ours.model.model.norm.weight is not bench.model.model.norm.weight
    assert sum(p.numel() for p in odd.ours.model.parameters() if p.requires_grad) == odd.trained == 4 + 64


def test_peft_rewrites_weights_of_its_own():
    model = load_demo("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = Bench(model, {"pissa": load("pissa", rank=2), "boft": load("boft", block=4)}, TOKENS, against_peft=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pissa, boft = made.contenders
    inner = pissa.peft.model.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(inner.base_layer.weight, before["model.layers.0.self_attn.q_proj.weight"])
    assert boft.peft is None and boft.why == "PEFT runs it on CUDA alone, and another method here"


def test_a_step_is_a_step_of_training(bench):
    for each in bench.contenders:
        for subject in (each.ours, each.peft) if each.peft else (each.ours,):
            subject.step()
            assert all(p.grad is not None for p in subject.model.parameters() if p.requires_grad)
    bench.frozen.step()
    assert all(p.grad is None for p in bench.model.parameters())


def test_peft_trains_as_many_parameters_of_the_same_modules(bench):
    for each in bench.contenders[:2]:
        assert sum(p.numel() for p in each.peft.model.parameters() if p.requires_grad) == each.trained


@pytest.mark.parametrize("name", [*DEMOS])
def test_every_demo_has_a_batch_whose_backward_pass_reaches_the_input(name):
    Bench(load_demo(name), {}, TOKENS).frozen.step()


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(SurgeryError, match="at most 128 tokens a row, not 129"):
        Bench(load_demo("llama"), {}, (1, 129))


# ------------------------------------------------------------------------------------------------- the command line


def run(*arguments: str):
    return CliRunner(env={**os.environ, "NO_COLOR": "1"}).invoke(main, ["bench", *arguments])


QUICK = ("--model", "demo:llama", "--tokens", "2,8", "--repeat", "1")


def test_the_json_has_a_list_of_rows():
    result = run("lora", "oft", *QUICK, "--against", "peft", "--set", "rank=2", "--target", "**.q_proj", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and [r["name"] for r in found["rows"]] == ["frozen", "lora", "oft"]
    assert found["rounds"] == {"step": 1, "forward": 1} and found["rows"][1]["trained"] == 4 * 2 * (64 + 64)


def test_the_table_has_a_line_for_each(tmp_path):
    (tmp_path / "mine.surg").write_text(ODD.to_surg())
    result = run("lora", str(tmp_path / "mine.surg"), *QUICK)
    assert [line.split()[0] for line in result.stdout.split("\n\n")[1].splitlines()] == ["parameters", "frozen", "lora",
                                                                                         "mine"]


def test_all_run_as_the_compiler_makes_them(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: made.append(type(model).__name__) or model)
    result = run("lora", *QUICK, "--against", "peft", "--compiled")
    assert made == ["LlamaForCausalLM", "LlamaForCausalLM", "PeftModel"] and "compiled" in result.stdout.splitlines()[0]


def test_an_interruption_shows_what_is_known(monkeypatch):
    whole = Bench.run

    def broken(self, repeat):
        yield from (what for what in whole(self, repeat) if not what.startswith("forward, warm-up") or interrupt())

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", broken)
    result = run("lora", *QUICK)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    cells = result.stdout.split("\n\n")[1].splitlines()[-1].split()
    assert cells[0] == "lora" and cells[2] == "-" and float(cells[3]) > 0


@pytest.mark.parametrize("arguments, says", [
    (("lora", "--model", "demo:llama", "--tokens", "8"), "not two whole numbers"),
    (("lora", *QUICK, "--set", "rnak=2"), "did you mean `rank`"),
    (("lora", *QUICK, "--device", "tpu9"), "there is no device `tpu9`"),
    (("lora", "--model", "demo:llama:hiden_size=64"), "did you mean `hidden_size`"),
])
def test_what_is_wrong_is_said(arguments, says):
    result = run(*arguments)
    assert result.exit_code and says in result.stderr and "Traceback" not in result.stderr


def test_a_demo_of_other_sizes():
    config = load_demo("llama:hidden_size=32,num_hidden_layers=1").config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 1, 128)
    large = demo_config("llama-bench:num_hidden_layers=8")
    assert (large.hidden_size, large.intermediate_size, large.num_hidden_layers) == (1024, 2816, 8)
    assert demo_inputs("bert", batch=3, length=5)["input_ids"].shape == (3, 5)
    assert torch.equal(demo_inputs("bert")["input_ids"], demo_inputs("bert")["input_ids"])


def test_real_texts_are_read_with_their_lengths_and_merged_models_take_turns(tmp_path: Path) -> None:
    """Another batch in each round, the same for all in it; a merged model takes no step and gives what its spec does."""
    name = save_causal(tmp_path / "model")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions(12)))
    model = load_model(name)
    batches = batches_of(model, pieces(), tmp_path / "asked.jsonl", (3, 64), 4)
    assert len(batches) == 4 and all(b["input_ids"].shape[0] == 3 and b["input_ids"].shape[1] <= 64 for b in batches)
    assert len({b["input_ids"].shape[1] for b in batches}) > 1 and all("labels" not in b for b in batches)
    assert any((b["attention_mask"] == 0).any() for b in batches)
    moved = parse("""update moved() { param B[out, 1] = 0.1 param A[1, in] = 0.1 return B @ A }
    target linear "**.{q_proj,up_proj}" { add moved() }""")
    ready = Bench(model, {"moved": moved, "lora": load("lora")}, (3, 64), merged=True, batches=batches)
    seen: list[tuple] = []
    for subject in ready.subjects.values():
        run = subject.infer
        subject.infer = lambda run=run, subject=subject: (seen.append(tuple(subject.batch["input_ids"].shape)), run())[1]
    for _ in ready.run(2):
        pass
    rounds = [seen[5 * (2 + i) : 5 * (3 + i)] for i in range(2)]  # after two rounds of warm-up
    assert [len({*each}) for each in rounds] == [1, 1]
    _, row, _ = ready.rows()
    assert row["merged_forward_seconds"] > 0 and row["merged_forward_ratio"] > 0 and "merged_step_ratio" not in row
    merged = ready.contenders[0].merged
    with torch.no_grad():
        logits = [m.model.eval()(**batches[0]).logits for m in (ready.contenders[0].ours, merged, ready.frozen)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 < (logits[0] - logits[2]).abs().max()
    assert merged.model.get_parameter("lm_head.weight") is model.get_parameter("lm_head.weight")
    with pytest.raises(SurgeryError, match="has no 30 items"):
        batches_of(model, pieces(), tmp_path / "asked.jsonl", (30, 64), 1)
