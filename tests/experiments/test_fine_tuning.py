"""Fine-tuning: what is trained at which rate, what is saved, how a run goes on, the best checkpoint, and the three forms
of a model that score the same."""

import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from shutil import copytree

import pytest
import torch
from small_text import pieces, questions, save_causal, save_model, texts, words
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForCausalLM, BertModel

import surgery
from surgery.experiments import fine_tuning
from surgery.experiments.fine_tuning import Data, Training, Watch, groups
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import batches, with_head
from surgery.models.loading import load_with_head
from surgery.runtime import batched_setups

SHORT = Training(lr=1e-2, steps=6, batch=4, every=3, length=64, tokens=4)
FEW = surgery.parse("""spec few()
target linear "**.{q_proj,up_proj}", "**.query" { add low_rank(2) post diagonal() }""")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"causal": save_causal(folder / "causal"), "bert": save_model(folder / "bert")}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train", "dev", "test")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(24, seed)))
        rows = [f"{text}\t{'yes' if 'a' in text else 'no'}" for text in texts(24, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return {f"{path.stem}{path.suffix}": str(path) for path in folder.iterdir()}


def choices(files: dict[str, str], dev: bool = False) -> Data:
    return Data(files["train.jsonl"], files["dev.jsonl"] if dev else None, (files["test.jsonl"],))


def refusal(*arguments, **options) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.train(*arguments, **options)
    return str(caught.value)


def test_a_model_learns_choices_and_scores_the_same_reloaded_and_merged(models, files, tmp_path: Path) -> None:
    data = Data(files["train.jsonl"], None, (files["train.jsonl"], files["test.jsonl"]))
    found = surgery.train(FEW, models["causal"], data, tmp_path / "out", setting=replace(SHORT, lr=5e-2, steps=16, every=None))
    base = surgery.evaluate(models["causal"], files["test.jsonl"], scoring=SHORT.scoring)
    assert base == found.before[1] and found.steps == 16
    assert found.after[0].scores["accuracy"].value > found.before[0].scores["accuracy"].value + 0.2
    saved = surgery.evaluate(tmp_path / "out", files["test.jsonl"], scoring=SHORT.scoring)
    assert saved == found.after[1]
    found.surgeon.merge()
    surgery.save_merged(found.surgeon, tmp_path / "merged", [fine_tuning.tokenizer(models["causal"])])
    merged = surgery.evaluate(tmp_path / "merged", files["test.jsonl"], scoring=SHORT.scoring)
    assert merged.scores == found.after[1].scores


def test_what_is_saved_says_how_it_was_made(models, files, tmp_path: Path) -> None:
    from surgery.analysis.page.training_curves import charts, found_state
    from surgery.experiments.training_record import read, toml, unequal, versions

    found = surgery.train(FEW, models["causal"], choices(files), tmp_path / "out",
                          setting=replace(SHORT, rates={"B": 2e-2}), about={"spec": "few.surg", "set": ["rank=2"]})
    text = (tmp_path / "out" / "training.toml").read_text()
    known = ["spec", "model", "data", "eval", "set", "rate", "lr", "prompt", *vars(SHORT)]
    asked = read(tmp_path / "out" / "training.toml", known)
    assert asked["rate"] == ["B=0.02"] and asked["steps"] == 6 and asked["set"] == ["rank=2"]
    assert asked["prompt"] == SHORT.prompt and f'torch = "{versions()["torch"]}"' in text
    assert files["train.jsonl"] in text.partition("[data_sha256]")[2]
    assert "loss" in charts(found_state(tmp_path / "out")) and found.loss > 0
    odd = {"a": 'x"\\\n\x7f é 😀', "b": [1, 2.5e-7, True], "c": None}
    (tmp_path / "odd.toml").write_text(toml(odd, {}))
    assert unequal("epochs = 2\nlr = 1e-3\n[versions]\ntorch = '2'", "lr = 0.001\nepochs = 2.0\n") == ["torch"]
    assert read(tmp_path / "odd.toml", "ab") == {"a": odd["a"], "b": odd["b"]}


def test_a_run_that_was_stopped_goes_on_to_the_same_end(models, files, tmp_path: Path, monkeypatch) -> None:
    # in the midst of the second epoch, whose order must not rest on what was drawn in the first one
    setting = replace(SHORT, batch=8, every=2)

    def run(folder: str, **more):
        return surgery.train(FEW, models["causal"], choices(files), tmp_path / folder, setting=setting, **more)

    first = run("whole")
    whole = first.surgeon.state()

    def stops(self, args, state, control, **more) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning.Progress, "on_step_end", stops)
        with pytest.raises(KeyboardInterrupt):
            run("half")
    assert not (tmp_path / "half").exists()
    with pytest.raises(surgery.SurgeryError, match="holds checkpoints of an earlier run"):
        run("half")
    with pytest.raises(surgery.SurgeryError, match="began with other settings: lr"):
        surgery.train(FEW, models["causal"], choices(files), tmp_path / "half", setting=replace(setting, lr=1e-3),
                      resume=True)
    later = run("half", resume=True)
    resumed = later.surgeon.state()
    logs = json.loads((tmp_path / "half" / "trainer_state.json").read_text())["log_history"]
    losses = [each["loss"] for each in logs if "loss" in each]
    assert (first.earlier, first.steps, later.earlier, later.steps) == (0, 6, 4, 6) and len(losses) == 6
    assert [first.loss, later.loss] == pytest.approx([sum(losses) / 6, sum(losses[4:]) / 2])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    again = run("half", force=True).surgeon.state()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    with pytest.raises(surgery.SurgeryError, match="there is no run to go on with"):
        run("none", resume=True)
    # what fails before it trains takes nothing away, and leaves nothing
    checkpoints = sorted((tmp_path / "half-checkpoints").rglob("*"))
    for folder in ("half", "fresh"):
        with pytest.raises(surgery.SurgeryError, match="no-match"):
            surgery.train(FEW.retarget("**.misspelt"), models["causal"], choices(files), tmp_path / folder,
                          setting=setting, force=True)
    assert sorted((tmp_path / "half-checkpoints").rglob("*")) == checkpoints and checkpoints
    assert not (tmp_path / "fresh-checkpoints").exists()


def test_the_best_checkpoint_is_the_one_that_is_saved(models, files, tmp_path: Path, monkeypatch) -> None:
    """The scores on `dev` fall from the second checkpoint on."""
    values, held, real = iter([0.5, 0.9, 0.4, 0.3, 0.2]), [], fine_tuning.scored

    def scored(model, words, task, *more):
        found = real(model, words, task, *more)
        held.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return replace(found, scores={"accuracy": replace(found.scores["accuracy"], value=next(values))})

    monkeypatch.setattr(fine_tuning, "scored", scored)
    data = Data(files["train.jsonl"], files["dev.jsonl"])
    found = surgery.train(FEW, models["causal"], data, tmp_path / "out",
                          setting=replace(SHORT, steps=10, every=2, patience=2))
    assert found.steps == 8 and len(held) == 4  # two without a better one, and it stops
    state = found.surgeon.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in held[1].items())
    assert any(not torch.equal(state[name], tensor) for name, tensor in held[3].items())


def test_a_head_is_trained_and_its_classes_are_known_everywhere(models, files, tmp_path: Path) -> None:
    data = Data(files["train.tsv"], None, (files["test.tsv"],))
    base = copytree(models["bert"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))  # not what the tokenizer pads with
    found = surgery.train(FEW, str(base), data, tmp_path / "out", setting=replace(SHORT, every=None))
    assert set(found.after[0].scores) == {"accuracy", "f1", "matthews"}
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["task"] == {
        "kind": "classification", "classes": ["no", "yes"], "pad_token_id": 0}
    assert surgery.evaluate(tmp_path / "out", files["test.tsv"], scoring=SHORT.scoring) == found.after[0]
    # One class alone, and in another order: the head's classes are what counts.
    rows = [f"{text}\tyes" for text in texts(24, 2) if "a" in text]
    (tmp_path / "yes.tsv").write_text("\n".join(["text\tlabel", *rows]))
    alone = surgery.evaluate(tmp_path / "out", tmp_path / "yes.tsv", scoring=SHORT.scoring)
    from surgery.cli.main import main

    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "out"), "-o", str(tmp_path / "merged")])
    assert surgery.evaluate(tmp_path / "merged", tmp_path / "yes.tsv", scoring=SHORT.scoring) == alone
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["pad_token_id"] == 0
    (tmp_path / "yes.tsv").write_text("text\tlabel\na\tmaybe\n")
    with pytest.raises(surgery.SurgeryError, match="the model does not know: maybe"):
        surgery.evaluate(tmp_path / "merged", tmp_path / "yes.tsv")
    with pytest.raises(surgery.SurgeryError, match="a BertModel has no outputs for the task `classification`"):
        surgery.evaluate(models["bert"], files["test.tsv"])


@pytest.mark.parametrize(("name", "rows"), [
    ("pairs.tsv", "sentence1\tsentence2\tlabel\n" + "".join(f"{t}\t{t[::-1]}\t{i}.5\n" for i, t in enumerate(texts(8)))),
    ("chat.jsonl", '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' * 8),
    ("alpaca.jsonl", '{"instruction": "q", "input": "", "output": "a"}\n' * 8),
    ("math.jsonl", '{"question": "q", "answer": "1 + 1 #### 2"}\n' * 8),
    ("plain.txt", "what is the answer\n" * 8),
])
def test_every_kind_of_task_trains_and_is_scored(name: str, rows: str, models, tmp_path: Path) -> None:
    (tmp_path / name).write_text(rows)
    model = models["bert" if name.endswith("tsv") else "causal"]
    setting = replace(SHORT, steps=4, every=None, lr=0.1, schedule="cosine", warmup=0.25, weight_decay=0.1, accumulate=2,
                      checkpointing=True, bf16=name == "chat.jsonl")
    found = surgery.train(FEW, model, Data(str(tmp_path / name), None, (str(tmp_path / name),)), tmp_path / "out",
                          setting=setting)
    (before, after), main = (found.before[0], found.after[0]), next(iter(found.after[0].scores))
    assert main == {"pairs.tsv": "spearman", "math.jsonl": "exact_match"}.get(name, "perplexity")
    if main == "perplexity":
        assert after.scores[main].value < 0.9 * before.scores[main].value


def test_the_kind_that_is_said_holds_for_every_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jsonl")
    Path(path).write_text('{"question": "q", "answer": "it is 4", "text": "t", "label": 0.5}\n')
    for kind, found in (("answer", "answer"), ("language", "language"), (None, "chat"), ("regression", "regression")):
        task, dev, tests = Data(path, path, (path,), kind).read()
        assert [task.kind, dev.kind, *(test.kind for test in tests)] == [found] * 3


def test_a_new_head_and_a_parameter_have_rates_of_their_own(models) -> None:
    model = load_with_head(models["bert"], 2)
    surgeon = surgery.apply(model, with_head(surgery.load("lora"), model), check=False)
    setting = Training(lr=1e-4, head_lr=1e-3, rates={"B": 5e-3}, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups(surgeon, model, setting) for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, rate in found.items():
        assert rate == (1e-3 if name.startswith("classifier") else 5e-3 if name.endswith(".B") else 1e-4)
    with pytest.raises(surgery.SurgeryError, match="lr_C"):
        groups(surgeon, model, Training(rates={"C": 1.0}))


@pytest.mark.parametrize("asked", [
    *({name: value} for name in ("lr", "head_lr", "epochs", "warmup", "weight_decay") for value in (nan, inf, -1)),
    *({name: 0} for name in ("lr", "epochs", "batch", "accumulate", "steps", "length", "every")), {"schedule": "lineal"}])
def test_what_nothing_can_be_trained_with_is_refused_before_anything_is_loaded(asked) -> None:
    with pytest.raises(surgery.SurgeryError, match=next(iter(asked))):
        Training(**asked)
    assert Training(seed=0, warmup=0, weight_decay=0).head_lr is None


def test_the_heads_rate_is_that_of_the_heads_own_parameters(models) -> None:
    """And of no adapter's: what adapters share stands at the model's root, as a head does, and some stand in the head."""
    model = load_with_head(models["bert"], 2)
    everywhere = surgery.parse("""
        update common() { shared(model) param U[2, in] ~ normal()  param B[out, 2] = 0  return B @ U }
        target linear "**" { add common() }""")
    surgeon = surgery.apply(model, everywhere, check=False)
    setting = Training(lr=1e-4, head_lr=1e-3, rates={"B": 5e-3})
    rates = {id(p): group["lr"] for group in groups(surgeon, model, setting) for p in group["params"]}
    for name, p in surgeon.named_tensors().items():
        assert rates[id(p)] == (5e-3 if name.endswith(".B") else 1e-4), name
    assert {name.partition(".")[0] for name in surgeon.named_tensors()} == {"bert", "classifier", "shared_surgery"}
    # and without a spec all of the model trains, with decay where a spec's `train` has it
    plain = load_with_head(models["bert"], 2)
    found = {id(p): group for group in groups(None, plain, replace(setting, weight_decay=0.1)) for p in group["params"]}
    for name, p in plain.named_parameters():
        assert found[id(p)]["lr"] == (1e-3 if name.startswith("classifier") else 1e-4)
        assert found[id(p)]["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)


@pytest.mark.parametrize("name", ["train.tsv", "train.jsonl"])
def test_a_step_of_two_batches_is_that_of_one(name: str, models, files, tmp_path: Path) -> None:
    """Of texts with a head, whose loss would else be the sum of two means, and of choices, by their tokens."""
    model = models["bert" if name.endswith("tsv") else "causal"]
    config = Path(model) / "config.json"
    config.write_text(config.read_text().replace('_prob": 0.1', '_prob": 0.0'))  # dropout is drawn for each batch
    setting, losses = replace(SHORT, every=None, steps=4), []
    for batch in (4, 2):
        surgery.train(FEW, model, files[name], tmp_path / str(batch),
                      setting=replace(setting, batch=batch, accumulate=4 // batch))
        logs = json.loads((tmp_path / str(batch) / "trainer_state.json").read_text())["log_history"]
        losses.append([each["loss"] for each in logs if "loss" in each])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 4


def test_set_ups_at_once_train_the_same(models, files, tmp_path: Path, monkeypatch) -> None:
    """As they are made on a GPU by one process, unless the model checkpoints; but for rounding."""
    spec = surgery.parse("""spec turned()
    target linear "**.{q,k,v}_proj" { add low_rank(2) post orthogonal(rank = 1) }
    target linear "**.up_proj" { add low_rank(2) post magnitude() }""")
    setting = replace(SHORT, steps=3, batch=2, accumulate=2, every=None)
    losses, tensors, made, make = [], [], [], batched_setups._batch
    monkeypatch.setattr(batched_setups, "_batch", lambda *args: (made.append(len(args[2])), make(*args))[1])
    for name, on_gpu, checkpointing in (("alone", False, False), ("at once", True, False), ("checkpoints", True, True)):
        monkeypatch.setattr(fine_tuning, "_launches_cost", lambda on_gpu=on_gpu: on_gpu)
        before = len(made)
        found = surgery.train(spec, models["causal"], files["train.jsonl"], tmp_path / name,
                              setting=replace(setting, checkpointing=checkpointing))
        assert (len(made) > before) is (name == "at once"), name
        assert all(adapter.batches is None for adapter in found.surgeon.adapters.values())
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([each["loss"] for each in log if "loss" in each])
        tensors.append(found.surgeon.named_tensors())
    assert min(made) > 1
    for others, trained in zip(losses[1:], tensors[1:]):
        assert others == pytest.approx(losses[0], abs=1e-5) and len(others) == 3
        for name, tensor in trained.items():
            torch.testing.assert_close(tensor, tensors[0][name], rtol=1e-3, atol=1e-4, msg=name)


def test_starts_are_measured_by_the_loss_that_is_learned(files, tmp_path: Path) -> None:
    """Not by the model's own, where that of BART's decoder is of each token given itself."""
    config = BartConfig(vocab_size=300, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
                        init_std=0.5)
    model = BartForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "bart")
    pieces().save_pretrained(tmp_path / "bart")
    spec = surgery.parse("""update u() { frozen param g[out, in] = G  param k = 0  return k * g }
                            target linear "**.self_attn.q_proj" { add u() }""")
    setting = replace(SHORT, steps=1)
    trained = surgery.train(spec, str(tmp_path / "bart"), choices(files), tmp_path / "out", setting=setting).surgeon
    for batch in batches(model, pieces(), choices(files).read()[0], setting):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        (cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()) / 6).backward()
    found, = (t for name, t in trained.state().items() if name.endswith(".g"))
    gradient = model.model.decoder.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and (found - gradient).norm() < 1e-5 * gradient.norm()


def test_what_is_drawn_and_would_not_be_saved_is_told_before_training(models, files, tmp_path: Path) -> None:
    """A pooler that the checkpoint lacks: nobody could load what is trained with it."""
    BertModel.from_pretrained(models["bert"], add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    words().save_pretrained(tmp_path / "bare")
    data, bare = Data(files["train.tsv"], None, (files["test.tsv"],)), str(tmp_path / "bare")
    assert "do not hold `bert.pooler.dense.weight`" in refusal(FEW, bare, data, tmp_path / "out", setting=SHORT)
    trained = surgery.parse(FEW.to_surg() + 'train "bert.pooler.dense.*"')
    found = surgery.train(trained, bare, data, tmp_path / "out", setting=replace(SHORT, every=None))
    assert surgery.evaluate(tmp_path / "out", files["test.tsv"], scoring=SHORT.scoring) == found.after[0]


def test_starts_are_measured_on_all_of_a_file_that_is_sorted(models) -> None:
    """On items drawn at random, each once, the same ones for one seed; a file of fewer items is measured on whole."""
    model, found = load_with_head(models["bert"], 2), {}
    task = Task("sorted", tuple(texts(80)), (0.0,) * 40 + (1.0,) * 40, ("no", "yes"))
    for seed in (0, 0, 1):
        setting = replace(SHORT, batch=4, seed=seed)
        found.setdefault(seed, []).append([*batches(model, words(), task, setting, count=5)])
    same, again, other = *found[0], found[1][0]
    assert [len(each["labels"]) for each in same] == [4] * 5
    assert 4 < sum(float(each["labels"].sum()) for each in same) < 16
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(same, again))
    assert not all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(same, other))
    whole = torch.cat([each["labels"] for each in batches(model, words(), task, SHORT, count=50)])
    assert len(whole) == 80 and whole.sum() == 40


def test_a_number_of_minus_100_is_learned_as_others_are(models, tmp_path: Path) -> None:
    rows = [f"{text}\t{number}" for text, number in zip(texts(8), (-100.0, -99.5, -100.0, -100.5) * 2)]
    (tmp_path / "cold.tsv").write_text("\n".join(["text\tlabel", *rows]))
    found = surgery.train(FEW, models["bert"], str(tmp_path / "cold.tsv"), tmp_path / "out",
                          setting=replace(SHORT, every=None, steps=1, batch=8))
    assert found.loss == pytest.approx(1e4, rel=0.1)  # the mean of the squares, of outputs around 0


def test_a_loss_that_is_no_number_is_not_told_as_0(models, files, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(surgery.SurgeryError, match="the training that made it diverged"):
        surgery.train(FEW, models["causal"], files["train.jsonl"], tmp_path / "out",
                      setting=replace(SHORT, lr=1e30, every=None), watch=Watch(note=said.append))
    losses = [float(line.partition("loss ")[2].split()[0]) for line in said if "loss" in line]
    assert len(losses) == 6 and losses[0] > 1 and isnan(losses[-1]) and not any(loss < 1 for loss in losses)


def test_what_is_wrong_is_told_before_anything_is_trained(models, files, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    assert "is not a saved adapter" in refusal("lora", models["causal"], choices(files), tmp_path / "mine")
    (tmp_path / "out-checkpoints").mkdir()
    (tmp_path / "out-checkpoints" / "notes").write_text("")
    assert "is for checkpoints, and holds notes" in refusal("lora", models["causal"], choices(files), tmp_path / "out",
                                                            force=True)
    (tmp_path / "out-checkpoints" / "notes").unlink()
    assert "a BertModel has no outputs" in refusal("lora", models["bert"], choices(files), tmp_path / "out")
    missing = Data(files["train.jsonl"], None, ("none.jsonl",))
    assert "missing-file" in refusal("lora", models["causal"], missing, tmp_path / "out")
    assert "no-match" in refusal(surgery.parse('target linear "**.nope" { add low_rank() }'), models["causal"],
                                 choices(files), tmp_path / "out")
    assert not (tmp_path / "out").exists()
