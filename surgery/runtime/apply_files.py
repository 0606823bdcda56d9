"""Applying a spec to a model's files: the adapter is saved, and the model is never in memory.

Takes a model's name, a spec and a folder to write. Each weight is read by itself, the tensors that start from it are
made and checked, and written before the next one is read. Promises: the folder is the one that `apply` and `save` write
of the model in memory; at any moment one weight is in memory, in the forms that its starts and its formula take;
tensors that modules share are, too. Nothing runs, so no forward pass proves that each adapter acts: what was checked
instead is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.diagnostics import fail
from surgery.language.tree import Spec
from surgery.models.checkpoint_files import GrowingFile
from surgery.models.loading import folder_of
from surgery.models.stored_names import Unsure
from surgery.planning.compile import Placed, Plan
from surgery.planning.figures import Report
from surgery.planning.initial_values import Origin, Shared, is_finite, tensors
from surgery.rewrite.prove_identity import starts_as_weight
from surgery.runtime.apply import adapter_of, prepare
from surgery.runtime.atomic_folders import refuse_taken, replacing
from surgery.runtime.calibration import needs_data
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.identity_check import moved_by, refuse_moved
from surgery.runtime.remade import latest_origin, made_again, summary_of
from surgery.runtime.save import texts_of, write_texts
from surgery.runtime.saved_format import ADAPTER, TENSORS
from surgery.runtime.step_tensors import SharedTensors, as_held
from surgery.runtime.stored_weights import CODES, StoredWeights, read_by, skeleton_of_files, standing_in
from surgery.runtime.surgeon import Surgeon
from surgery.text import counted

Step = Callable[[str], AbstractContextManager]
_CODES = {**CODES, torch.int64: "I64", torch.int32: "I32"}


@dataclass(frozen=True)
class AppliedFiles:
    """The result of `apply_files`. `computed`: for how many weights the first W' was computed and compared with W;
    `proven`: for how many the formula alone proves that W' = W (W was found finite)."""

    out: Path
    base: str
    plan: Plan
    report: Report
    computed: int
    proven: int

    @property
    def proof(self) -> str:
        """What was checked, and what was not."""
        parts = [f"of {counted(self.computed, 'weight')} W' was computed and is W"] * bool(self.computed)
        parts += [f"of {counted(self.proven, 'weight')} W' = W follows from the formula"] * bool(self.proven)
        return "; ".join([*parts, "no forward pass was made, since the model was not loaded: that each adapter acts, "
                          "and acts as it does merged, was not tried"])


def apply_files(name: str, spec: Spec | str | PathLike, out: str | PathLike, *, seed: int = 0, dtype: str | None = None,
                strict: bool = False, force: bool = False, trust: bool = False, self_contained: bool = False,
                step: Step = nullcontext) -> AppliedFiles:
    """Save the adapter that `apply` would make of a spec and the model of that name (a hub id or a folder), without the
    model in memory: its safetensors files are read one weight at a time. `step` stands around what takes time.

    `dtype`: as if the model were loaded in another one; `strict`: a warning is an error; `force`: in the place of an
    adapter that we wrote; `trust`: Python code in the model's folder may run; `self_contained`: as `save` takes it.

    Raises: SurgeryError (unknown-model, where the files do not hold each weight as a plain tensor; and as `apply`)."""
    refuse_taken(Path(out), ADAPTER, force)
    try:
        with step(f"reading the headers of {name}"):
            weights = _opened(name, dtype, trust)
            surgeon = prepare(weights.model, spec, seed=seed, strict=strict)
        if needy := [placed for placed in surgeon.plan.placed if placed.formula.of_data]:
            raise needs_data(needy)
        with step(f"operating, a weight at a time, and saving {out}"), replacing(Path(out), ADAPTER, force) as new:
            with GrowingFile(new / TENSORS) as file:
                work = _Work(surgeon, weights, file, self_contained, latest_origin(surgeon.plan))
                work.run()
            write_texts(new, texts_of(surgeon, work.forms, work.remade, name))
    except Unsure as why:
        raise fail("unknown-model", f"the weights of {name} cannot be read one at a time: {why}",
                   helps=("load the model, and apply the spec to that (`surgery apply` without --no-load)",)) from None
    return AppliedFiles(Path(out), name, surgeon.plan, surgeon.report(), work.computed, work.proven)


def too_large(name: str, dtype: str | None = None, trust: bool = False) -> str:
    """Why a model should not be loaded to be operated on; empty if it fits into the memory that is free, if nothing
    says how much that is, and where its weights cannot be read one at a time. Raises: SurgeryError (unknown-model)."""
    free = _free_memory()
    try:
        model = skeleton_of_files(name, trust) if free is not None else None
        if free is None or model is None or sum(p.numel() for p in model.parameters()) < free // 8:
            return ""
        weights = _opened(name, dtype, trust)
    except Unsure:
        return ""
    size = sum(p.numel() for p in weights.model.parameters()) * weights.dtype.itemsize
    return "" if size < free else f"its weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"


def _opened(name: str, dtype: str | None, trust: bool) -> StoredWeights:
    return StoredWeights(skeleton_of_files(name, trust), folder_of(name), dtype)


def _free_memory() -> int | None:
    """The bytes that a program can still have, as the system says; None where it does not."""
    free: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
        group = Path("/sys/fs/cgroup")  # a container's limit
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=None)


@dataclass
class _Work:
    """One run: `forms` are tensors without numbers, of the shapes and dtypes of those that were saved."""

    surgeon: Surgeon
    weights: StoredWeights
    file: GrowingFile
    self_contained: bool
    latest: Origin | None  # of what is made again
    shared: Shared = field(default_factory=dict)
    forms: dict[str, Tensor] = field(default_factory=dict)
    remade: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    computed: int = 0
    proven: int = 0

    @torch.no_grad()
    def run(self) -> None:
        """Raises: SurgeryError, Unsure, OSError."""
        plan = self.surgeon.plan
        moved = [(placed, self._one(placed)) for placed in plan.placed]
        refuse_moved(plan.spec.targets, moved)
        for name in plan.train:
            self._add(name, self.weights.parameter(name))

    def _one(self, placed: Placed) -> float:
        """Make and write what one weight's adapter holds; how far W' starts from W."""
        seed, dtype, site = self.surgeon.seed, self.surgeon.made_in, placed.site
        own = {name.rpartition(".")[2]: self.weights.parameter(name) for name in read_by(placed)}
        with standing_in(site.module, own):
            made = tensors(placed, seed, dtype, self.shared)
            again = made_again(placed, made, self.latest, seed, dtype)
            self.surgeon.base[site.weight_name] = fingerprint_of(site.weight)
            moved = self._moved(placed, made, own.values())
        for key, tensor in ((key, as_held(tensor)) for key, tensor in made.items()):
            name = self.surgeon.name_of(placed, key)
            if name in self.forms:  # which modules share
                continue
            if key in again and not self.self_contained:
                self.remade[name] = summary_of(tensor)
                self.forms[name] = tensor.to("meta")
            else:
                self._add(name, tensor)
        return moved

    def _moved(self, placed: Placed, made: Mapping[str, Tensor], read: Iterable[Tensor]) -> float:
        if placed.target.shifted:
            return 0.0
        # W' takes several copies of W in float32: it is computed where the formula alone does not say that it is W
        if starts_as_weight(placed.formula, generic=False) and all(map(is_finite, read)):
            self.proven += 1
            return 0.0
        self.computed += 1
        return moved_by(placed, adapter_of(placed, made, SharedTensors()))

    def _add(self, name: str, tensor: Tensor) -> None:
        held = as_held(tensor).detach().contiguous()
        self.forms[name] = held.to("meta")
        self.file.add(name, _CODES[held.dtype], tuple(held.shape), held.flatten().view(torch.uint8).numpy().data)

