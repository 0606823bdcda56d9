"""What two processes do for tests/runtime/test_two_processes.py: `python two_processes.py FOLDER`. Each writes what it
saw into FOLDER/RANK.json, by case and name; they run the same cases in the same order."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from click.testing import CliRunner
from models import perturbed
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Flat
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import Trainer, TrainingArguments
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import surgery
from surgery.cli.main import main
from surgery.experiments.fine_tuning import Training
from surgery.experiments.fsdp_checkpoints import WHOLE, AdapterCheckpoints
from surgery.models.demo import demo_inputs, load_demo
from surgery.runtime import surgeon as surgeon_module
from surgery.runtime.save import save_merged

SMALL = "llama:num_hidden_layers=2,hidden_size=32,intermediate_size=64"
EVERY_KIND = """spec every_kind(rank: int = 2)
update common(rank: int = 2) {
  shared(model) frozen param A[rank, in] ~ kaiming_uniform()
  shared(layer) param e[rank] = 0.5
  shared param d[rank] = 0.1
  param B[out, rank] = 0
  param s = 1
  return s * (B @ diag(d * e) @ A)
}
target linear "**.{q,k,down}_proj" { add common(rank) post magnitude() }
train "**.*norm.weight", "**.embed_tokens.weight"
"""
SPECS = ["lora", "vera", "unilora", "delora", "fourierft", "sora", "every kind"]  # each holds its tensors in another way
SIZES = {"fourierft": {"count": 20}}
TRAINED = {"unilora": 20.0, "every kind": 0.5}  # by the Trainer, at these rates
DIVIDED = {"gate": "colwise", "up": "colwise", "down": "rowwise"}  # how tensor parallelism cuts a block's layers
MERGED, CHECKPOINTED = ("lora", "vera"), "unilora"  # saved as whole models


def spec_of(name: str) -> surgery.Spec:
    """The spec on two layers of each block, so that the run is short."""
    if name == "every kind":
        return surgery.parse(EVERY_KIND)
    return surgery.load(name, **SIZES.get(name, {})).retarget("**.{q,up}_proj")


def fresh() -> nn.Module:
    return load_demo(SMALL)


class Outer(nn.Module):
    """A module of a user's that holds the operated one."""

    def __init__(self, held: nn.Module):
        super().__init__()
        self.held = held

    @torch.no_grad()
    def forward(self, **batch: torch.Tensor) -> object:
        return self.held(**batch)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def flat(model: nn.Module) -> nn.Module:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = Flat(layer, **options)
    return Flat(model, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**demo_inputs(SMALL)).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
            for name, t in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def stepped(model: nn.Module, surgeon: surgery.Surgeon) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = demo_inputs(SMALL)
    torch.manual_seed(0)  # dropout
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def refused(verb: Callable[[], object]) -> str:
    try:
        verb()
    except surgery.SurgeryError as error:
        return str(error)
    return ""


def verbs(name: str) -> dict:
    """Every verb on a sharded model, beside the same on a whole one."""
    model = fresh()
    base = logits(model)
    surgeon, seen = perturbed(model, spec_of(name), check=False), {}
    whole = deepcopy(model)
    operated, state, before = logits(model), {n: t.clone() for n, t in surgeon.state().items()}, gathered(model)
    surgeon.merge()
    merged, merged_weights = logits(model), gathered(model)
    surgeon.unmerge()
    sharded(model)
    seen["forward"] = apart(logits(model), operated)
    seen["state"] = same(surgeon.state(), state)
    surgeon.save(FOLDER / name)
    with surgeon.disabled():
        seen["disabled"], seen["state while disabled"] = apart(logits(model), base), same(surgeon.state(), state)
    seen["operated again"] = same(gathered(model), before)
    seen["error of merging"] = max(surgeon.merge().values())
    seen["merged"], seen["merging changes"] = apart(logits(model), merged), apart(merged, base)
    seen["merged weights"] = same(gathered(model), merged_weights)
    if name in MERGED:
        save_merged(surgeon, FOLDER / f"{name} merged")
    seen["report"] = str(surgeon.report()).splitlines()[0]
    surgeon.unmerge()
    seen["unmerged"] = same(gathered(model), before)
    surgeon.load({n: t * 2 if t.is_floating_point() else t for n, t in state.items()})
    seen["loaded"] = all(torch.equal(t, 2 * state[n]) for n, t in surgeon.state().items() if t.is_floating_point())
    surgeon.load(state)
    stepped(model.train(), surgeon)
    stepped(whole.train(), surgeon)
    found = gathered(whole)
    seen["trained"] = max(apart(t, found[n]) for n, t in gathered(model).items() if t.is_floating_point())
    seen["training changes"] = max(apart(t, before[n]) for n, t in found.items() if t.is_floating_point())
    if name == CHECKPOINTED:
        surgeon.load(state)
        dcp_save(model.state_dict(), storage_writer=FileSystemWriter(FOLDER / "dcp"))
    return seen


def refusals() -> dict:
    """What is not done, said before anything changes."""
    model = sharded(fresh())
    seen = {"apply": refused(lambda: surgery.apply(model, "lora")),
            "attach": refused(lambda: surgery.attach(model, FOLDER / "lora")),
            "untouched": not any("surgery" in n for n in model.state_dict())}
    model = fresh()
    surgeon = perturbed(model, "lora", check=False)
    before = gathered(sharded(model))
    seen["prove"], seen["remove"] = refused(surgeon.prove), refused(surgeon.remove)
    seen["serving"] = refused(lambda: surgeon.serving().__enter__())
    seen["unchanged"] = same(gathered(model), before) and not surgeon.merged
    return seen


def failures() -> dict:
    """A verb that fails leaves everything as it was, on each process; one that cannot write says so on each."""
    model, seen = fresh(), {}
    surgeon = perturbed(model, "lora", check=False)
    before = gathered(sharded(model))
    file = FOLDER / "a file"
    file.write_text("")
    seen["a file"] = refused(lambda: surgeon.save(file / "adapter"))
    real, calls = surgeon_module.put, []

    def failing(parameter: nn.Parameter, data: torch.Tensor) -> None:
        calls.append(1)
        real(parameter, data)
        if len(calls) == 5:
            raise KeyboardInterrupt

    surgeon_module.put = failing
    try:
        surgeon.merge()
    except KeyboardInterrupt:
        seen["interrupted"] = len(calls)
    surgeon_module.put = real
    seen["put back"] = same(gathered(model), before) and not surgeon.merged
    surgeon.merge()
    surgeon.unmerge()
    seen["and goes on"] = same(gathered(model), before)
    inner = fresh()
    surgeon, operated = perturbed(inner, "vera", check=False), logits(inner)
    outer = fully_shard(Outer(inner), mesh=MESH)  # which no verb knows of, and which holds whole tensors after this:
    outer(**demo_inputs(SMALL))
    seen["unseen"] = refused(surgeon.merge)
    outer.reshard()
    seen["unseen, forward"] = apart(outer(**demo_inputs(SMALL)).logits, operated)
    return seen


def flattened() -> dict:
    """FullyShardedDataParallel: refused outside of summon_full_params, right inside."""
    model, seen = fresh(), {}
    base = logits(model)
    surgeon = perturbed(model, "vera", check=False)
    operated, state = logits(model), {n: t.clone() for n, t in surgeon.state().items()}
    wrapped = flat(model)
    seen["forward"] = apart(logits(wrapped), operated)
    seen["merge"], seen["save"] = refused(surgeon.merge), refused(lambda: surgeon.save(FOLDER / "flat"))
    seen["apply"] = refused(lambda: surgery.apply(flat(fresh()), "lora"))
    with Flat.summon_full_params(wrapped):
        seen["state"] = same(surgeon.state(), state)
        surgeon.save(FOLDER / "flat")
        surgeon.merge()
    seen["merged"], seen["merging changes"] = apart(logits(wrapped), operated), apart(operated, base)
    with Flat.summon_full_params(wrapped):
        surgeon.unmerge()
    seen["unmerged"] = apart(logits(wrapped), operated)
    return seen


def divided_by_torch(model: nn.Module) -> None:
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    parallelize_module(model, MESH, {f"model.layers.*.mlp.{n}_proj": styles[how]() for n, how in DIVIDED.items()})


def divided_by_transformers(model: nn.Module) -> None:
    layers = [(f"model.layers.{i}.mlp.{n}_proj", how) for i in (0, 1) for n, how in DIVIDED.items()]
    apply_tensor_parallelism(model, MESH, {name + end: how for name, how in layers for end in (".weight", "")})


def tensor_parallel() -> dict:
    """Refused by name whatever comes first; merged for good, right."""
    seen = {}
    for by in (divided_by_torch, divided_by_transformers):
        model = fresh()
        by(model)
        before = [*model.state_dict(), *map(type, model.modules())]
        seen[f"{by.__name__}, apply"] = refused(lambda: surgery.apply(model, "lora"))
        seen[f"{by.__name__}, untouched"] = before == [*model.state_dict(), *map(type, model.modules())]
        model = fresh()
        perturbed(model, "lora", check=False).merge_and_remove()
        merged = logits(model)
        by(model)
        seen[f"{by.__name__}, merged"] = apart(logits(model), merged)
    for name, layer in (("dora", "down"), ("lora", "up")):  # a row norm of a part is a number, too
        model = fresh()
        perturbed(model, surgery.load(name).retarget(f"**.{layer}_proj"), check=False)
        seen[f"{name}, torch"] = refused(lambda: divided_by_torch(model))
        weights = [m.weight for n, m in model.named_modules() if n.endswith(f"{layer}_proj")]
        seen[f"{name}, no part"] = not any(hasattr(w, "placements") for w in weights)
        model = fresh()
        perturbed(model, surgery.load(name).retarget(f"**.{layer}_proj"), check=False)
        divided_by_transformers(model)
        seen[f"{name}, evaluating"] = refused(lambda: logits(model))
        seen[f"{name}, training"] = refused(lambda: model(**demo_inputs(SMALL)))
    return seen


def unshared() -> dict:
    """Only the layers are sharded, and what they share stands at the root, which is not."""
    seen = {}
    for name in ("unilora", "lora"):
        model = fresh()
        surgeon = perturbed(model, spec_of(name), check=False)
        for layer in model.model.layers:
            fully_shard(layer, mesh=MESH)
        before = {n: t.detach().clone() for n, t in model.named_parameters()}
        seen[f"{name}, step"] = refused(lambda: stepped(model, surgeon))
        seen[f"{name}, groups"] = refused(lambda: surgeon.parameter_groups(1e-3))
        seen[f"{name}, unchanged"] = all(torch.equal(t, before[n]) for n, t in model.named_parameters())
    return seen


def trainer(model: nn.Module, folder: Path, batch: int, rate: float, **more: Any) -> Trainer:
    rows = torch.randint(0, 256, (12, 6), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=batch, seed=1, learning_rate=rate,
                                  save_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True,
                                  **{"max_steps": 3, "save_steps": 3, "optim": "sgd", **more})
    return Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows])


def trained(name: str) -> dict:
    """The Trainer's DistributedDataParallel."""
    model = fresh()
    surgeon = surgery.apply(model, spec_of(name), check=False)
    run = trainer(model, FOLDER / f"{name} trained", 2, TRAINED[name], ddp_backend="gloo")
    run.train()
    return {"processes": run.args.world_size, "wrapped": type(run.model_wrapped).__name__,
            "state": {n: t.tolist() for n, t in surgeon.state().items()}}


LEARN = Training(lr=1e-2, epochs=2, batch=4, length=64)
FILES = {"choices": "causal", "texts": "bert"}  # what is learned, and the model that learns it
FEW = """target linear "**.{q_proj,up_proj}", "**.query" { add low_rank(2) post diagonal() }"""


def fine_tuned(name: str, folder: Path, batch: int, out: str) -> tuple[list[float], str]:
    """The losses of `surgery train`, step by step, and what this process says."""
    spec = folder / f"{out} {os.getpid()}.surg"
    spec.write_text(FEW)
    asked = {"data": next(folder.glob(f"{name}.*")), "out": folder / out, "lr": LEARN.lr, "epochs": LEARN.epochs,
             "length": LEARN.length, "batch": batch}
    options = [str(each) for key, value in asked.items() for each in (f"--{key}", value)]
    done = CliRunner().invoke(main, ["train", str(spec), str(folder / FILES[name]), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    if dist.is_initialized():
        dist.barrier()  # the first process alone saves
    logs = json.loads((folder / out / "trainer_state.json").read_text())["log_history"]
    return [each["loss"] for each in logs if "loss" in each], done.stdout


def learned(name: str) -> dict:
    """`surgery train` on two processes, each with half of the batch."""
    losses, said = fine_tuned(name, FOLDER, LEARN.batch // 2, f"{name} of two")
    return {"losses": losses, "said": said}


@contextmanager
def sharding_on_a_cpu() -> Iterator[None]:
    """accelerate's state takes a plugin of FSDP under MULTI_GPU and its like, and passes over it under MULTI_CPU."""
    real = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        real(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with patch.object(AcceleratorState, "__init__", init):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def thinned() -> dict:
    """The Trainer's FSDP2, its checkpoints whole and in shards: a run, and one that goes on from its first checkpoint."""
    folder, states = FOLDER / "thinned", []
    runs = [(at / out, at / start if start else None, kind)
            for at, kind in ((folder, "FULL_STATE_DICT"), (folder / "shards", "SHARDED_STATE_DICT"))
            for out, start in (("", ""), ("resumed", "checkpoint-1"))]
    with sharding_on_a_cpu():
        for out, start, kind in runs:
            model = fresh()
            surgeon = surgery.apply(model, spec_of("every kind"), check=False)
            run = trainer(model, out, 2, 0.05, max_steps=2, save_steps=1, optim="adamw_torch", fsdp=True, fsdp_config={
                "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind})
            run.add_callback(AdapterCheckpoints())
            run.train(resume_from_checkpoint=start and str(start))
            states.append(surgeon.state())
    file = folder / "checkpoint-2" / WHOLE
    attached = [surgery.attach(fresh(), at / "checkpoint-2").state() for at in (folder, folder / "shards")]
    return {"sharded": run.model_wrapped is model and all(hasattr(p, "placements") for p in model.parameters()),
            "size": file.stat().st_size, "whole": sum(p.nbytes for p in fresh().parameters()),
            "kept": sorted(torch.load(file)) == sorted(surgeon.named_tensors()),
            "exact": [same(each, states[0]) for each in (*states, *attached)]}


def attached() -> dict:
    """What one process saved, attached and then sharded."""
    model = fresh()
    surgery.attach(model, FOLDER / "of one process")
    operated = logits(model)
    return {"forward": apart(logits(sharded(model)), operated)}


def run(folder: Path, *asked: str) -> None:
    """The cases that are asked for, or all, in this process and in a copy of it."""
    global FOLDER, RANK, MESH
    warnings.filterwarnings("ignore")
    FOLDER = folder
    torch.set_num_threads(1)
    perturbed(fresh(), "lora", check=False)  # all is imported and compiled once, which takes longer than the cases
    other = os.fork()
    RANK = int(not other)
    os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/group", rank=RANK, world_size=2)
    MESH = init_device_mesh("cpu", (2,))
    cases = {**{name: lambda name=name: verbs(name) for name in SPECS}, "refusals": refusals, "failures": failures,
             "flattened": flattened, "attached": attached, "tensor parallel": tensor_parallel, "unshared": unshared, "thinned": thinned,
             **{f"{name} trained": lambda name=name: trained(name) for name in TRAINED},
             **{f"{name} learned": lambda name=name: learned(name) for name in FILES}}
    found = {}
    for case in asked or cases:
        found[case] = cases[case]()
        (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(os.waitpid(other, 0)[1] != 0 if other else 0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
