"""What a merge into a model's files has to do, told from headers and skeletons: which tensors of the checkpoint are
computed, of which operated weights, and what they become.

Takes saved adapters and the name of their base model; gives a `Work`, and for each of its units the tensors to be
written. Promises: no weight is in memory before its unit is computed, and one unit's alone then; where the files do not
hold each parameter so that it can be written back, `Unsure` says why.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery import __version__
from surgery.ir.compose import stacked
from surgery.models.checkpoint_files import TensorFile
from surgery.models.loading import folder_of, with_saved_head
from surgery.models.stored_names import Piece, Unsure, reverses
from surgery.planning.compile import Placed
from surgery.runtime.adapter import Adapter
from surgery.runtime.apply import adapter_of
from surgery.runtime.attach import fitted
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.merge import merged, refuse_called
from surgery.runtime.remade import Remade
from surgery.runtime.saved_format import Saved
from surgery.runtime.stack import Known, together
from surgery.runtime.step_tensors import SharedTensors
from surgery.runtime.stored_weights import CODES, DTYPES, StoredWeights, read_by, skeleton_of_files, standing_in
from surgery.runtime.surgeon import Surgeon
from surgery.text import some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Unit:
    """What is computed at once: operated weights (none, for parameters that were trained) and the pieces of the
    checkpoint that hold them. Mostly one module's weight and bias; more where the files hold several in one tensor."""

    placed: tuple[Placed, ...]
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for piece in self.pieces for name in piece.stored)


@dataclass(frozen=True, eq=False)
class Work:
    """A merge that can be done file by file: `trained` are values of the model's own parameters; `aliases` says by
    which of its names a parameter (one that is tied has several) is the checkpoint's."""

    root: Path
    weights: StoredWeights
    surgeon: Surgeon
    trained: Mapping[str, Tensor]
    units: tuple[Unit, ...]
    aliases: Mapping[str, str]
    job: str
    remade: Mapping[str, Remade] = field(default_factory=dict)  # by the names of the surgeries
    met: dict[str, str] = field(default_factory=dict)  # fingerprints of the operated weights

    @property
    def files(self) -> tuple[TensorFile, ...]:
        return self.weights.files


def work_of(name: str, saved: Sequence[Saved], dtype: str | None, trust: bool) -> Work:
    """Raises: Unsure, SurgeryError."""
    plain = skeleton_of_files(name, trust)
    model = with_saved_head(name, plain, saved[0], trust)
    if type(model) is not type(plain):
        raise Unsure(f"the adapter is one of a {type(model).__name__}, and the files are those of a "
                     f"{type(plain).__name__}")
    if model.config.id2label != plain.config.id2label:
        raise Unsure("the adapter's head tells classes apart that the model's config.json does not name")
    if saved[0].pads_with not in (None, getattr(model.config, "pad_token_id", None)):
        raise Unsure("the adapter was trained with another padding token than the model's config.json names")
    root = folder_of(name, all_files=True)
    weights = StoredWeights(model, root, dtype)
    surgeon, trained, remade = _on_skeleton(model, saved)
    refuse_called(surgeon.plan.placed)
    units, aliases = _units(weights, surgeon, trained)
    return Work(root, weights, surgeon, trained, units, aliases, job_of(saved, weights.files), remade)


def _on_skeleton(model: PreTrainedModel,
                 saved: Sequence[Saved]) -> tuple[Surgeon, dict[str, Tensor], dict[str, Remade]]:
    """The surgeon of all adapters, one after the other, with the tensors that they hold; the model is not touched. What
    they trained of the model's own parameters; and what makes the tensors that they do not hold: those that are made of
    W, and may be larger, for one unit at a time. Raises: SurgeryError."""
    known: dict[str, Known] = {}
    remade: dict[str, Remade] = {}
    for i, each in enumerate(saved):
        surgeon, common = fitted(model, each), SharedTensors()
        remade[numbered(i)] = made = Remade(surgeon, each)
        tensors = surgeon.as_named(each.tensors)
        shared: dict[str, Tensor] = {}
        for placed in surgeon.plan.placed:
            own = surgeon.adapters[placed.site.name].tensors() | made.drawn(placed)
            values = {key: shared.setdefault(name, _held(tensors.get(name, tensor))) for key, tensor in own.items()
                      if (name := surgeon.name_of(placed, key))}
            # as they are held: of what is held for the largest of several users, each takes its part by itself
            surgeon.adapters[placed.site.name] = adapter_of(placed, values, common)
        known[numbered(i)] = Known(surgeon, {name: tensors[name] for name in surgeon.plan.train})
    trained = {name: value for each in known.values() for name, value in each.trained.items()}
    return together(model, known, lambda formulas: reduce(stacked, formulas.values())), trained, remade


def _held(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _units(weights: StoredWeights, surgeon: Surgeon,
           trained: Mapping[str, Tensor]) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """What is computed, in the order in which it lies in the files, and each parameter's name there. Raises: Unsure."""
    untied = [p.site.weight_name for p in surgeon.plan.placed if p.target.untie]
    if untied:
        raise Unsure(f"`untie` gives {some(untied)} a tensor of its own, which the files have no place for")
    aliases: dict[str, str] = {}

    def written(name: str) -> Piece:
        aliases[name], piece = weights.piece(name)
        _refuse_converted(weights, aliases[name], piece)
        return piece

    owners = [((placed,), tuple(map(written, read_by(placed)))) for placed in surgeon.plan.placed]
    owners += [((), (written(name),)) for name in trained]
    order = {name: i for i, name in enumerate(weights.stored)}
    units = sorted(_joined(owners), key=lambda unit: min(order[name] for name in unit.stored))
    return tuple(units), aliases


def _refuse_converted(weights: StoredWeights, alias: str, piece: Piece) -> None:
    """Raises: Unsure, unless a parameter is stored in the dtype that it is loaded in."""
    loaded = weights.loaded_as(alias)
    for tensor in (weights.stored[name] for name in piece.stored):
        if DTYPES.get(tensor.dtype) != loaded:
            raise Unsure(f"{tensor.name} is stored as {tensor.dtype}, and loaded as {CODES[loaded]}")


def _joined(owners: Iterable[tuple[tuple[Placed, ...], tuple[Piece, ...]]]) -> Iterator[Unit]:
    """Units that no two hold a piece of."""
    units: list[Unit] = []
    for placed, held in owners:
        touching = [unit for unit in units if not {*unit.pieces}.isdisjoint(held)]
        units = [unit for unit in units if unit not in touching]
        every = [piece for unit in touching for piece in unit.pieces]
        units.append(Unit((*(p for unit in touching for p in unit.placed), *placed),
                          tuple(dict.fromkeys((*every, *held)))))
    yield from units


def job_of(saved: Sequence[Saved], files: Sequence[TensorFile]) -> str:
    """What a merge is made of: a run goes on with what was written from the very same."""
    seen = hashlib.sha256()
    for each in saved:
        for name in (each.file, "adapter.surg", "meta.json"):
            with (each.folder / name).open("rb") as file:
                seen.update(hashlib.file_digest(file, "sha256").digest())
    about = [(file.path.name, file.size, os.stat(file.path).st_mtime_ns) for file in files]
    # Another number of threads may add up in another order.
    seen.update(json.dumps([about, __version__, torch.__version__, torch.get_num_threads()]).encode())
    return seen.hexdigest()


def numbered(i: int) -> str:
    return f"number_{i + 1}"


# ------------------------------------------------------------------------------------------ what the end of it tells


def seen(unit: Unit, work: Work) -> dict[str, dict]:
    """What was seen of a unit that was computed and is told at the end: what its weights were, and which of the tensors
    that were made again for it are off by rounding, by surgery."""
    met = {name: work.met[name] for name in (p.site.weight_name for p in unit.placed)}
    modules = {placed.site.name for placed in unit.placed}
    rounded = {}
    for number, remade in work.remade.items():
        own = [name for p in remade.surgeon.plan.placed if p.site.name in modules for name in remade.names(p).values()]
        rounded[number] = {name: remade.rounded[name] for name in own if name in remade.rounded}
    return {"met": met, "rounded": rounded}


def see_again(work: Work, noted: Mapping[str, Mapping]) -> None:
    """Have the end tell of a unit that an earlier run has computed, by what that noted of it."""
    work.met.update(noted["met"])
    for number, rounded in noted["rounded"].items():
        work.remade[number].rounded.update(rounded)


# ------------------------------------------------------------------------------------------------------------ computing


@torch.no_grad()
def computed(unit: Unit, work: Work) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The stored tensors of a unit after the merge, and the rounding error of each of its modules. Raises: SurgeryError
    (merge-error); Unsure."""
    values = {name: work.weights.read(name) for name in unit.stored}
    loaded: dict[str, Tensor] = {}
    for piece in unit.pieces:
        made = piece.loaded({name: values[name] for name in piece.stored})
        if not reverses(piece, {name: values[name] for name in piece.stored}, made):
            raise Unsure(f"{piece.parameters[0]} is another one when it is loaded and saved")
        loaded |= made
    values.clear()
    work.met.update((p.site.weight_name, fingerprint_of(loaded[work.aliases[p.site.weight_name]])) for p in unit.placed)
    unset = _completed(unit, work, loaded)
    # A weight or a bias that was trained is what the formula of its module acts on: it stands there first.
    loaded |= {alias: value.to(loaded[alias].dtype) for name, value in work.trained.items()
               if (alias := work.aliases[name]) in loaded}
    errors: dict[str, float] = {}
    for placed in unit.placed:
        names = {name.rpartition(".")[2]: work.aliases[name] for name in read_by(placed)}
        with standing_in(placed.site.module, {own: loaded[name] for own, name in names.items()}):
            result = merged(placed, work.surgeon.adapters[placed.site.name])
        errors[placed.site.name] = result.error
        loaded |= {names[own]: tensor for own, tensor in result.tensors.items()}
    for adapter, key, tensor in unset:
        adapter.hold(key, tensor)
    return {name: tensor for piece in unit.pieces
            for name, tensor in piece.saved({n: loaded[n] for n in piece.parameters}).items()}, errors


def _completed(unit: Unit, work: Work, loaded: Mapping[str, Tensor]) -> list[tuple[Adapter, str, Tensor]]:
    """Put the tensors in that are made of the weights as they were loaded; gives what stood in their places.
    Raises: SurgeryError (not-remade)."""
    before: list[tuple[Adapter, str, Tensor]] = []
    for placed in unit.placed:
        adapter = work.surgeon.adapters[placed.site.name]
        weight = loaded[work.aliases[placed.site.weight_name]]
        for name, remade in work.remade.items():
            own = next((p for p in remade.surgeon.plan.placed if p.site.name == placed.site.name), None)
            made = remade.of_weight(own, weight) if own else {}
            before += [(adapter, f"{name}:{key}", adapter.tensors()[f"{name}:{key}"]) for key in made]
            for key, tensor in made.items():
                adapter.hold(f"{name}:{key}", tensor)
    return before
