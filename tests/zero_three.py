"""What two processes do for tests/runtime/test_zero_three.py under DeepSpeed's ZeRO-3: `python zero_three.py FOLDER`. The
first writes what it saw into FOLDER/seen.json."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from models import perturbed
from torch import nn
from two_processes import apart, fresh, refused, spec_of

import surgery
from surgery.models.demo import demo_inputs

SPECS = ["lora", "sora", "vera", "delora", "fourierft", "dora"]
RATE, STEPS = 0.5, 3


def batch(rank: int | None = None) -> dict[str, torch.Tensor]:
    """Two texts, or one of them for each process."""
    ids = demo_inputs("llama:num_hidden_layers=2,hidden_size=32,intermediate_size=64")["input_ids"][:1]
    both = torch.cat([ids, ids.flip(1)])
    ids = both if rank is None else both[rank:rank + 1]
    return {"input_ids": ids, "labels": ids}


def operated(name: str) -> tuple[nn.Module, surgery.Surgeon]:
    model = fresh()
    surgeon = perturbed(model, spec_of(name), check=False)
    return model.eval(), surgeon  # without dropout, which each process draws for itself


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def sharded(model: nn.Module, stage: int = 3) -> nn.Module:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
              "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=RATE), config=config)
    return engine


def trained_alone(name: str) -> tuple[nn.Module, surgery.Surgeon]:
    model, surgeon = operated(name)
    optimiser = torch.optim.SGD(surgeon.parameters(), lr=RATE)
    for _ in range(STEPS):
        model(**batch()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, surgeon


def stepped(engine: nn.Module) -> None:
    engine.backward(engine(**batch(dist.get_rank())).loss)
    engine.step()


def seen(name: str, folder: Path) -> dict:
    """Training, saving and merging beside the same on one process."""
    model, surgeon = operated(name)
    before = {key: tensor.clone() for key, tensor in surgeon.state().items()}
    (alone, ours), engine, found = trained_alone(name), sharded(model), {}
    for _ in range(STEPS):
        stepped(engine)
    verbs = {"state": surgeon.state, "merge": surgeon.merge, "save": lambda: surgeon.save(folder / "never")}
    found["refused"] = {verb: refused(run) for verb, run in verbs.items()}
    whole = deepspeed.zero.GatheredParameters
    with whole(list(model.parameters()), modifier_rank=0):
        found["trained"] = max(apart(t, ours.state()[key]) for key, t in surgeon.state().items())
        found["training changes"] = max(apart(t, before[key]) for key, t in surgeon.state().items())
        if dist.get_rank() == 0:
            surgeon.save(folder / name)
    found["forward"] = apart(logits(engine), logits(alone))
    with whole(list(model.parameters()), modifier_rank=0):
        surgeon.merge()
    ours.merge()
    found["merged"] = apart(logits(engine), logits(alone))
    with whole(list(model.parameters()), modifier_rank=0):
        surgeon.unmerge()
    ours.unmerge()
    found["unmerged"] = apart(logits(engine), logits(alone))
    dist.barrier()
    other = fresh()
    surgery.attach(other, folder / name)
    found["attached"] = apart(logits(other), logits(alone))
    return found


def manifold(stage: int) -> str:
    """What is kept on a manifold, and would be stepped as a piece of a flat copy."""
    model = fresh()
    surgery.apply(model, surgery.load("stella").retarget("**.q_proj"), check=False)
    engine = sharded(model, stage)
    return refused(lambda: stepped(engine))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # DeepSpeed would compile an all-reduce by shared memory, for a minute: gloo does as well
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    deepspeed.init_distributed("gloo")
    everything = {name: seen(name, Path(sys.argv[1])) for name in SPECS}
    everything["manifold"] = {stage: manifold(stage) for stage in (1, 3)}
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "seen.json").write_text(json.dumps(everything))
