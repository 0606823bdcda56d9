"""A model whose parameters two processes share out (gloo, on the CPU): every verb gathers by itself and gives what it
gives on a whole model, or refuses before anything changes; what either layout saves the other takes."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from models import perturbed
from safetensors.torch import load_file
from small_text import questions, save_causal, save_model, texts
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load
from transformers import LlamaForCausalLM
from two_processes import (
    CHECKPOINTED,
    FILES,
    LEARN,
    MERGED,
    SPECS,
    TRAINED,
    apart,
    fine_tuned,
    fresh,
    logits,
    run,
    spec_of,
    trainer,
)

import surgery
from surgery.runtime.saved_format import REMADE

Seen = tuple[Path, list[dict]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes saw, and the folder that they wrote into: all the cases in one run."""
    folder = tmp_path_factory.mktemp("two")
    perturbed(fresh(), "vera", check=False).save(folder / "of one process")
    save_causal(folder / "causal")
    config = Path(save_model(folder / "bert")) / "config.json"  # without dropout, which each process draws for itself
    config.write_text(config.read_text().replace('_prob": 0.1', '_prob": 0.0'))
    # of many lengths, so that batches hold unlike numbers of tokens
    (folder / "choices.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions(27)))
    labelled = [f"{text}\t{'yes' if 'a' in text else 'no'}" for text in texts(27)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *labelled]))
    forked.run(lambda: run(folder))
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", SPECS)
def test_every_verb_of_a_sharded_model_is_that_of_a_whole_one(name: str, seen: Seen) -> None:
    for found in (process[name] for process in seen[1]):
        exact = ("state", "state while disabled", "operated again", "merged weights", "unmerged", "loaded")
        assert {what: found[what] for what in exact} == dict.fromkeys(exact, True)
        assert found["forward"] <= 1e-6 and found["disabled"] <= 1e-6 and found["merged"] <= 1e-6
        assert found["merging changes"] > 1e-3 and found["error of merging"] < 1e-6
        assert found["trained"] <= 1e-6 < 1e-5 < found["training changes"]
        assert found["report"]


@pytest.mark.parametrize("name", SPECS)
def test_what_two_processes_save_one_attaches(name: str, seen: Seen, tmp_path: Path) -> None:
    ours, other = fresh(), fresh()
    surgeon = perturbed(ours, spec_of(name), check=False)
    attached = surgery.attach(other, seen[0] / name)
    state = surgeon.state()
    assert all(torch.equal(t, state[n]) for n, t in attached.state().items())
    assert apart(logits(ours), logits(other)) <= 1e-6


@pytest.mark.parametrize("name", MERGED)
def test_what_two_processes_merge_and_save_is_a_plain_model(name: str, seen: Seen) -> None:
    model = fresh()
    perturbed(model, spec_of(name), check=False).merge()
    found = LlamaForCausalLM.from_pretrained(seen[0] / f"{name} merged")
    assert found.state_dict().keys() == fresh().state_dict().keys() and apart(logits(model), logits(found)) <= 1e-6


def test_a_distributed_checkpoint_loads_in_one_process(seen: Seen) -> None:
    ours, other = fresh(), fresh()
    perturbed(ours, spec_of(CHECKPOINTED), check=False)
    surgery.apply(other, spec_of(CHECKPOINTED), check=False)
    state = other.state_dict()
    dcp_load(state, storage_reader=FileSystemReader(seen[0] / "dcp"))
    other.load_state_dict(state)
    assert apart(logits(ours), logits(other)) <= 1e-6


def test_what_one_process_saves_two_attach(seen: Seen) -> None:
    assert all(process["attached"]["forward"] <= 1e-6 for process in seen[1])


def test_what_is_refused_is_said_before_anything_changes(seen: Seen) -> None:
    for found in (process["refusals"] for process in seen[1]):
        assert all("operate on the model first, then shard it" in found[verb] for verb in ("apply", "attach"))
        assert all("sharded" in found[verb] for verb in ("prove", "remove", "serving"))
        assert found["untouched"] and found["unchanged"]


def test_a_verb_that_fails_leaves_all_as_it_was_everywhere(seen: Seen) -> None:
    for found in (process["failures"] for process in seen[1]):
        assert "error[bad-output]" in found["a file"]
        assert found["interrupted"] == 5 and found["put back"] and found["and goes on"]
        assert "operate on the module that is sharded last" in found["unseen"] and found["unseen, forward"] <= 1e-6


def test_a_flattened_model_is_refused_but_where_it_is_whole(seen: Seen) -> None:
    for found in (process["flattened"] for process in seen[1]):
        assert all("summon_full_params" in found[verb] for verb in ("merge", "save"))
        assert "operate on the model first" in found["apply"] and found["state"]
        assert max(found[what] for what in ("forward", "merged", "unmerged")) <= 1e-6
        assert found["merging changes"] > 1e-3
    surgery.attach(fresh(), seen[0] / "flat")


def test_tensor_parallelism_is_refused_by_name_or_right(seen: Seen) -> None:
    for found in (process["tensor parallel"] for process in seen[1]):
        for by in ("divided_by_torch", "divided_by_transformers"):
            assert "`model.layers.0.mlp.gate_proj.weight` (Shard(dim=0) of [64, 32]) and 5 more" in found[f"{by}, apply"]
            assert found[f"{by}, untouched"] and found[f"{by}, merged"] <= 1e-6
        for name in ("dora", "lora"):
            assert all("a part of its weight" in found[f"{name}, {when}"] for when in ("torch", "evaluating", "training"))
            assert found[f"{name}, no part"]


def test_what_layers_share_is_sharded_too_or_no_step_is_made(seen: Seen) -> None:
    for found in (process["unshared"] for process in seen[1]):
        assert all("fully_shard the model itself too" in found[f"unilora, {verb}"] for verb in ("step", "groups"))
        assert "is in no unit" in found["unilora, groups"] and "theta" in found["unilora, step"]
        assert found["unilora, unchanged"]
        assert not found["lora, step"] and not found["lora, groups"] and not found["lora, unchanged"]


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_on_two_processes_is_that_of_one_with_their_batch(name: str, seen: Seen, tmp_path: Path) -> None:
    model = fresh()
    surgeon = surgery.apply(model, spec_of(name), check=False)
    before = {n: t.clone() for n, t in surgeon.state().items()}
    trainer(model, tmp_path, 4, TRAINED[name]).train()
    for found in (process[f"{name} trained"] for process in seen[1]):
        assert found["processes"] == 2 and found["wrapped"] == "DistributedDataParallel"
        assert all(apart(t, torch.tensor(found["state"][n])) <= 1e-5 for n, t in surgeon.state().items())
    assert max(apart(t, before[n]) for n, t in surgeon.state().items()) > 1e-3
    other = fresh()
    checkpoint = seen[0] / f"{name} trained" / "checkpoint-3"
    attached = surgery.attach(other, checkpoint)
    state = attached.state()
    assert all(apart(t, state[n]) <= 1e-5 for n, t in surgeon.state().items())
    kept = surgeon.named_tensors().keys() - surgeon.made.keys()  # what is made again is not, and is told beside them
    assert load_file(checkpoint / "model.safetensors").keys() == kept | ({REMADE} if surgeon.made else set())
    assert apart(logits(model.eval()), logits(other)) <= 1e-5


def test_the_trainers_checkpoints_under_fsdp_hold_the_adapter_alone_and_are_exact(seen: Seen) -> None:
    for found in (process["thinned"] for process in seen[1]):
        assert found["sharded"] and found["size"] < found["whole"] / 2
        assert found["kept"] and found["exact"] == [True] * 6


def test_the_trainers_checkpoint_in_shards_loads_in_one_process(seen: Seen) -> None:
    folder, other = seen[0] / "thinned", surgery.apply(fresh(), spec_of("every kind"), check=False)
    state = {"model": other.state()}  # of what the shards hold, the adapter's tensors alone are read
    dcp_load(state, checkpoint_id=folder / "shards" / "checkpoint-2" / "pytorch_model_fsdp_0")
    other.load(state["model"])
    whole = surgery.attach(fresh(), folder / "checkpoint-2").state()
    assert all(torch.equal(t, whole[name]) for name, t in other.state().items())


def test_nothing_is_left_beside_what_was_saved(seen: Seen) -> None:
    names = {path.name for path in seen[0].iterdir()}
    names -= {name for name in names if name.startswith((*FILES, *FILES.values()))}  # of `train`: two others look at them
    assert names == {*SPECS, *(f"{name} merged" for name in MERGED), *(f"{name} trained" for name in TRAINED), "0.json", "1.json", "dcp", "a file", "flat", "group", "thinned",
                     "of one process"} - ({"group"} - names)
    assert not any(path.is_dir() and not any(path.iterdir()) for path in seen[0].rglob("*"))


@pytest.mark.parametrize("name", FILES)
def test_surgery_train_on_two_processes_has_the_losses_of_one(name: str, seen: Seen) -> None:
    """Averaged over tokens, of which the two have unlike numbers, and over texts; the same adapter comes out, and one of
    the two tells of it."""
    alone, said = fine_tuned(name, seen[0], LEARN.batch, f"{name} of one")
    assert len(alone) == 14 and max(alone) - min(alone) > 0.01
    for process in seen[1]:
        assert process[f"{name} learned"]["losses"] == pytest.approx(alone, abs=1e-4)
    first, second = (process[f"{name} learned"]["said"] for process in seen[1])
    assert "saved " in said and "saved " in first and not second
    one, two = (load_file(seen[0] / f"{name} of {count}" / "adapter.safetensors") for count in ("one", "two"))
    assert all(apart(two[key], one[key]) <= 1e-4 for key in one)
