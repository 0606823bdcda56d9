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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery import __version__
from surgery.ir.compose import stacked
from surgery.layers.wrappers import named_parameters, own_parameter
from surgery.matching.conflicts import tied
from surgery.models.checkpoint_files import StoredTensor, TensorFile, opened_file, read_into, weight_files
from surgery.models.loading import (
    DEMO,
    folder_of,
    only_whole,
    skeleton,
    with_saved_head,
)
from surgery.models.stored_names import Piece, Unsure, pieces, reverses
from surgery.planning.compile import Placed
from surgery.runtime.adapter import Adapter
from surgery.runtime.attach import fitted
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.merge import merged, refuse_called
from surgery.runtime.remade import Remade
from surgery.runtime.saved_format import Saved
from surgery.runtime.stack import Known, together
from surgery.runtime.step_tensors import SharedTensors
from surgery.runtime.surgeon import Surgeon, adapter_of
from surgery.text import some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Floating types that a weight is stored in; what is stored in another is packed, and no plain weight.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


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
    files: tuple[TensorFile, ...]
    surgeon: Surgeon
    trained: Mapping[str, Tensor]
    units: tuple[Unit, ...]
    aliases: Mapping[str, str]
    job: str
    remade: Mapping[str, Remade] = field(default_factory=dict)  # by the names of the surgeries
    met: dict[str, str] = field(default_factory=dict)  # fingerprints of the operated weights
    where: Mapping[str, tuple[TensorFile, StoredTensor]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", {t.name: (file, t) for file in self.files for t in file.tensors})

    def read(self, name: str) -> Tensor:
        file, tensor = self.where[name]
        numbers = torch.empty(tensor.size, dtype=torch.uint8)
        if tensor.size:
            read_into(numbers.numpy().data, file.path, tensor.begin)
        return numbers.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def work_of(name: str, saved: Sequence[Saved], dtype: str | None, trust: bool) -> Work:
    """Raises: Unsure, SurgeryError."""
    if only_whole(name):
        raise Unsure("a demo has no files" if name.startswith(DEMO) else "a GGUF file holds no plain weights")
    plain = skeleton(name, trust)
    model = with_saved_head(name, plain, saved[0], trust)
    if type(model) is not type(plain):
        raise Unsure(f"the adapter is one of a {type(model).__name__}, and the files are those of a "
                     f"{type(plain).__name__}")
    if model.config.id2label != plain.config.id2label:
        raise Unsure("the adapter's head tells classes apart that the model's config.json does not name")
    if saved[0].pads_with not in (None, getattr(model.config, "pad_token_id", None)):
        raise Unsure("the adapter was trained with another padding token than the model's config.json names")
    if getattr(model.config, "quantization_config", None) is not None:
        raise Unsure("the base model is quantised, and its files hold no plain weights")
    root = folder_of(name, all_files=True)
    files = tuple(map(opened_file, weight_files(root)))
    if not files:
        raise Unsure("the base model has no safetensors files")
    if getattr(model.config, "transformers_weights", None) or (root / "adapter_config.json").exists():
        raise Unsure("the base model's folder has transformers load something else than its usual files")
    surgeon, trained, remade = _on_skeleton(model, saved)
    refuse_called(surgeon.plan.placed)
    units, aliases = _units(model, surgeon, trained, files, dtype)
    return Work(root, files, surgeon, trained, units, aliases, _job(saved, files), remade)


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


def _units(model: PreTrainedModel, surgeon: Surgeon, trained: Mapping[str, Tensor], files: Sequence[TensorFile],
           dtype: str | None) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """What is computed, in the order in which it lies in the files, and each parameter's name there. Raises: Unsure."""
    stored = {t.name: t for file in files for t in file.tensors}
    empty = {name: torch.empty(t.shape, dtype=DTYPES.get(t.dtype, torch.uint8), device="meta")
             for name, t in stored.items()}
    found = pieces(model, empty)
    finder = _Finder(model, found, stored, dtype)
    finder.assert_whole()
    untied = [p.site.weight_name for p in surgeon.plan.placed if p.target.untie]
    if untied:
        raise Unsure(f"`untie` gives {some(untied)} a tensor of its own, which the files have no place for")
    owners = [((placed,), tuple(finder.of(name) for name in _written(placed))) for placed in surgeon.plan.placed]
    owners += [((), (finder.of(name),)) for name in trained]
    order = {name: i for i, name in enumerate(stored)}
    units = sorted(_joined(owners), key=lambda unit: min(order[name] for name in unit.stored))
    return tuple(units), finder.aliases


def _written(placed: Placed) -> list[str]:
    """The names of the parameters that a merge of a weight reads."""
    site = placed.site
    owner = site.weight_name.removesuffix(site.parameter)
    return [site.weight_name, *([f"{owner}bias"] if site.has_bias else [])]


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


class _Finder:
    """The piece of the checkpoint that each parameter of a model is made of."""

    def __init__(self, model: PreTrainedModel, found: Sequence[Piece], stored: Mapping[str, StoredTensor],
                 dtype: str | None):
        from surgery.layers.survey import Survey

        self.model, self.stored = model, stored
        self.pieces = {name: piece for piece in found for name in piece.parameters}
        self.repeated = {name for piece in found for name in piece.parameters if self.pieces[name] is not piece}
        self.parameters = dict(named_parameters(model))
        names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        others = tied(Survey(model))
        self.names = {name: list(dict.fromkeys([*names[id(p)], *others.get(name, ())]))
                      for name, p in self.parameters.items()}
        self.dtype = getattr(torch, dtype) if dtype else self._loaded_as()
        self.aliases: dict[str, str] = {}

    def _loaded_as(self) -> torch.dtype:
        """The dtype that transformers loads the model in. Raises: Unsure."""
        said = self.model.config.dtype
        kept = {t.dtype for t in self.stored.values() if t.dtype in DTYPES}
        if said is None and len(kept) > 1:
            raise Unsure("its config.json does not say its dtype, and its files hold several")
        said = said or DTYPES[min(kept, default="F32")]
        return getattr(torch, said) if isinstance(said, str) else said

    def assert_whole(self) -> None:
        """Raises: Unsure, where the model has a parameter that the files hold nothing for (a new head), or none of its
        shape."""
        lacking = [name for name in self.parameters if not any(alias in self.pieces for alias in self.names[name])]
        if lacking:
            raise Unsure(f"the files hold no {some(lacking)}")
        for piece in self.pieces.values():
            name, here = piece.parameters[0], self.stored[piece.stored[0]].shape
            if piece.converter is None and name in self.parameters and here != (shape := self.parameters[name].shape):
                raise Unsure(f"{piece.stored[0]} is {list(here)} in the files, and {list(shape)} in the model")

    def of(self, name: str) -> Piece:
        """Raises: Unsure, unless that parameter alone is written where the piece is, as it was loaded."""
        held = {alias: self.pieces[alias] for alias in self.names[name] if alias in self.pieces}
        if len(held) > 1 or not self.repeated.isdisjoint(held):
            raise Unsure(f"the files hold {name} several times")
        ((alias, piece),) = held.items()
        self.aliases[name] = alias
        if piece.fault:
            raise Unsure(piece.fault)
        patterns = {*(getattr(self.model, "_keep_in_fp32_modules", None) or ()),
                    *(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())}
        wide = any(pattern.strip(".*") in alias for pattern in patterns)
        for tensor in (self.stored[n] for n in piece.stored):
            loaded = torch.float32 if wide and self.dtype.itemsize < 4 else self.dtype
            if DTYPES.get(tensor.dtype) != loaded:
                raise Unsure(f"{tensor.name} is stored as {tensor.dtype}, and loaded as {CODES[loaded]}")
        return piece


def _job(saved: Sequence[Saved], files: Sequence[TensorFile]) -> str:
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


# ------------------------------------------------------------------------------------------------------------ computing


@torch.no_grad()
def computed(unit: Unit, work: Work) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The stored tensors of a unit after the merge, and the rounding error of each of its modules. Raises: SurgeryError
    (merge-error); Unsure."""
    values = {name: work.read(name) for name in unit.stored}
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
        names = {name.rpartition(".")[2]: work.aliases[name] for name in _written(placed)}
        result = _merged_alone(placed, work.surgeon, {own: loaded[name] for own, name in names.items()})
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


def _merged_alone(placed: Placed, surgeon: Surgeon, own: Mapping[str, Tensor]) -> Any:
    """W' of one module of the skeleton, in which its tensors stand meanwhile."""
    module = placed.site.module
    before = dict(module._parameters)
    try:
        for name, tensor in own.items():
            if tensor.shape != own_parameter(module, name).shape:
                raise Unsure(f"{placed.site.name} has another shape in the files")
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        return merged(placed, surgeon.adapters[placed.site.name])
    finally:
        module._parameters.update(before)
