"""Merging a saved adapter into a model's files, without the model in memory.

Takes the folder of an adapter, the name of its base model and a folder to write; gives what was done. Each W' is
computed by the program that `merge()` runs, of the stored tensor and the adapter's, and put at that tensor's place in a
file of the same layout; all other bytes are copied. Promises: at any moment the largest of those tensors is in memory,
in the forms that its formula takes; a run that was killed is gone on with; what is written is read back and compared
before the folder appears. Where the files do not hold each parameter so that it can be written back, that is said, and
the model is loaded and merged as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery import __version__
from surgery.diagnostics import SurgeryError, SurgeryWarning, fail
from surgery.ir.compose import stacked
from surgery.layers.wrappers import named_parameters, own_parameter
from surgery.matching.conflicts import tied
from surgery.models.checkpoint_files import INDEX, StoredTensor, TensorFile, chunks, opened_file, read_at, weight_files
from surgery.models.loading import (
    DEMO,
    OTHER_FOLDERS,
    OTHER_FORMATS,
    base_name,
    folder_of,
    load,
    load_with_saved_head,
    only_whole,
    preprocessors,
    skeleton,
    with_saved_head,
)
from surgery.models.stored_names import Piece, Unsure, pieces, reverses
from surgery.planning.compile import Placed
from surgery.planning.initial_values import departure
from surgery.runtime.adapter import SharedTensors
from surgery.runtime.atomic_folders import MANIFEST, Unfinished, flush, refuse_taken, resuming
from surgery.runtime.attach import fitted
from surgery.runtime.dequantise import merge_plainly, save_plain
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.merge import merged, refuse_called
from surgery.runtime.proof import outputs
from surgery.runtime.save import MODEL, save_merged
from surgery.runtime.saved_format import Saved
from surgery.runtime.stack import Known, Surgeries, together
from surgery.runtime.surgeon import Surgeon, adapter_of
from surgery.text import some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Floating types that a weight is stored in; what is stored in another is packed, and no plain weight.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RUN = 1 << 26  # bytes that one task copies
_CHUNK = 1 << 18  # bytes that are written at once

Step = Callable[[str], AbstractContextManager]


def _no_step(what: str) -> AbstractContextManager:
    return nullcontext()


@dataclass(frozen=True)
class MergedFiles:
    """What `merge_files` did. `errors`: the relative rounding error of each module; `in_memory`: why the model was
    loaded as a whole (empty where it was not); `left_out`: files of the base model's folder that were not copied, since
    they hold its weights in another format; `kept`: how many weights an earlier run had merged already.

    `logits`, for an adapter that was trained on a quantised model: the relative difference between what that gives and
    what is written, on a batch that is made up; `not_compared`: why it was not measured."""

    out: Path
    base: str
    errors: dict[str, float]
    in_memory: str = ""
    left_out: tuple[str, ...] = ()
    kept: int = 0
    logits: float | None = None
    not_compared: str = ""


def merge_files(folder: str | PathLike, out: str | PathLike, base: str | None = None, *,
                then: Iterable[str | PathLike] = (), dtype: str | None = None, jobs: int = 1, force: bool = False,
                trust: bool = False, dequantise: bool = False, step: Step = _no_step) -> MergedFiles:
    """Write the base model of a saved adapter (or another, `base`) with the adapter merged in, and the adapters `then`
    after it, as a plain model's folder: the same shards, index and other files. `step` stands around what takes time.

    `dtype`: the weights in another one; `jobs`: how many threads read and write beside the one that computes; `force`:
    in the place of one that we wrote; `trust`: Python code in the base model's folder may run; `dequantise`: of a base
    that is quantised, as the adapter says it was, write the plain weights that were trained, W' of the dequantised W
    (the model is then loaded).

    Killed, it goes on where it was when it is called again. Raises: SurgeryError (bad-output, bad-adapter,
    unknown-model, merge-error)."""
    folders = [Path(folder), *map(Path, then)]
    saved = [Saved(each) for each in folders]
    name = base_name(folders[0], base, saved[0].base)
    refuse_taken(Path(out), MODEL, force)
    if not isinstance(jobs, int) or jobs < 1:
        raise fail("bad-value", f"jobs is a number of threads from 1 on, not {jobs!r}")
    if dequantise:
        return _dequantised(folders, saved[0], Path(out), name, dtype, force, trust, step)
    done = _merged(folders, saved, Path(out), name, dtype, jobs, force, trust, step)
    return _with_logits(done, folders, saved[0], trust, step)


def _merged(folders: Sequence[Path], saved: Sequence[Saved], out: Path, name: str, dtype: str | None, jobs: int,
            force: bool, trust: bool, step: Step) -> MergedFiles:
    try:
        with step(f"reading the headers of {name}"):
            work = _work(name, saved, dtype, trust)
        with step(f"merging into {out}"):
            return _streamed(work, saved, out, name, jobs, force)
    except Unsure as why:
        return _in_memory(folders, saved[0], out, name, dtype, force, trust, step, str(why))


def _in_memory(folders: Sequence[Path], saved: Saved, out: Path, name: str, dtype: str | None, force: bool, trust: bool,
               step: Step, why: str) -> MergedFiles:
    """The way that takes any model: load it, merge, save it."""
    with step(f"loading {name}"):
        model = load_with_saved_head(name, saved, dtype, trust)
    with step("merging"):
        surgeon = _operated(model, folders)
        errors = surgeon.merge()
    with step(f"saving {out}"):
        save_merged(surgeon, out, preprocessors(name, trust), force)
    return MergedFiles(out, name, errors, why)


def _operated(model: nn.Module, folders: Sequence[Path]) -> Surgeon:
    surgeries = Surgeries(model)
    for i, each in enumerate(folders):
        surgeries.add(_called(i), each)
    surgeon = surgeries.use(*surgeries.names)
    assert surgeon is not None  # it is None where no name is given
    return surgeon


def _dequantised(folders: Sequence[Path], saved: Saved, out: Path, name: str, dtype: str | None, force: bool,
                 trust: bool, step: Step) -> MergedFiles:
    """Plain weights W' of the dequantised base. Raises: SurgeryError (merge-error), if nothing of it is quantised."""
    with step(f"loading {name}"):
        model = load_with_saved_head(name, saved, dtype, trust, saved.meta.get("quantization"))
    with step("merging"):
        surgeon = _operated(model, folders)
        before = outputs(model)
        errors = merge_plainly(surgeon)
        logits, why = _departure(before, outputs(model), model)
    with step(f"saving {out}"):
        save_plain(model, out, preprocessors(name, trust), force)
    return MergedFiles(out, name, errors, "the base model is quantised, and is written dequantised", logits=logits,
                       not_compared=why)


def _with_logits(done: MergedFiles, folders: Sequence[Path], saved: Saved, trust: bool, step: Step) -> MergedFiles:
    """With the difference between what was trained, on a quantised base, and what was written of a plain one."""
    quantisation, trained_on = saved.meta.get("quantization"), saved.base
    if quantisation is None or trained_on is None:
        return done
    try:
        with step(f"comparing with {trained_on} as it was trained"):
            model = load_with_saved_head(trained_on, saved, None, trust, quantisation)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SurgeryWarning)
                before = outputs(_operated(model, folders).model)
            del model  # the two are not in memory at once
            written = load(str(done.out), trust=trust)
            logits, why = _departure(before, outputs(written), written)
    except SurgeryError as error:
        logits, why = None, error.diagnostics[0].message
    return replace(done, logits=logits, not_compared=why)


def _departure(before: Tensor | None, after: Tensor | None, model: nn.Module) -> tuple[float | None, str]:
    if before is None or after is None or before.shape != after.shape:
        return None, f"no batch can be made up for a {type(model).__name__}"
    return departure(before, after), ""


def _called(i: int) -> str:
    return f"number_{i + 1}"


# -------------------------------------------------------------------------------------------------- what is to be done


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
    met: dict[str, str] = field(default_factory=dict)  # fingerprints of the operated weights
    where: Mapping[str, tuple[TensorFile, StoredTensor]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", {t.name: (file, t) for file in self.files for t in file.tensors})

    def read(self, name: str) -> Tensor:
        file, tensor = self.where[name]
        numbers = torch.frombuffer(file.bytes_of(tensor), dtype=_DTYPES[tensor.dtype]) if tensor.size else torch.empty(
            0, dtype=_DTYPES[tensor.dtype])
        return numbers.reshape(tensor.shape)


def _work(name: str, saved: Sequence[Saved], dtype: str | None, trust: bool) -> Work:
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
    if getattr(model.config, "quantization_config", None) is not None:
        raise Unsure("the base model is quantised, and its files hold no plain weights")
    root = folder_of(name, all_files=True)
    files = tuple(map(opened_file, weight_files(root)))
    if not files:
        raise Unsure("the base model has no safetensors files")
    if getattr(model.config, "transformers_weights", None) or (root / "adapter_config.json").exists():
        raise Unsure("the base model's folder has transformers load something else than its usual files")
    surgeon, trained = _on_skeleton(model, saved)
    refuse_called(surgeon.plan.placed)
    units, aliases = _units(model, surgeon, trained, files, dtype)
    return Work(root, files, surgeon, trained, units, aliases, _job(saved, files))


def _on_skeleton(model: PreTrainedModel, saved: Sequence[Saved]) -> tuple[Surgeon, dict[str, Tensor]]:
    """The surgeon of all adapters, one after the other, with their tensors; the model is not touched. And what they
    trained of the model's own parameters. Raises: SurgeryError."""
    known: dict[str, Known] = {}
    for i, each in enumerate(saved):
        surgeon, common = fitted(model, each), SharedTensors()
        tensors = surgeon.as_named(each.tensors)
        shared: dict[str, Tensor] = {}
        for placed in surgeon.plan.placed:
            values = {key: shared.setdefault(name := surgeon.name_of(placed, key), _held(tensors[name]))
                      for key in surgeon.adapters[placed.site.name].tensors()}
            # as they are held: of what is held for the largest of several users, each takes its part by itself
            surgeon.adapters[placed.site.name] = adapter_of(placed, values, common)
        known[_called(i)] = Known(surgeon, {name: tensors[name] for name in surgeon.plan.train})
    trained = {name: value for each in known.values() for name, value in each.trained.items()}
    return together(model, known, lambda formulas: reduce(stacked, formulas.values())), trained


def _held(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _units(model: PreTrainedModel, surgeon: Surgeon, trained: Mapping[str, Tensor], files: Sequence[TensorFile],
           dtype: str | None) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """What is computed, in the order in which it lies in the files, and each parameter's name there. Raises: Unsure."""
    stored = {t.name: t for file in files for t in file.tensors}
    empty = {name: torch.empty(t.shape, dtype=_DTYPES.get(t.dtype, torch.uint8), device="meta")
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
        kept = {t.dtype for t in self.stored.values() if t.dtype in _DTYPES}
        if said is None and len(kept) > 1:
            raise Unsure("its config.json does not say its dtype, and its files hold several")
        said = said or _DTYPES[min(kept, default="F32")]
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
            if _DTYPES.get(tensor.dtype) != loaded:
                raise Unsure(f"{tensor.name} is stored as {tensor.dtype}, and loaded as {_CODES[loaded]}")
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


# ------------------------------------------------------------------------------------------------------------ computing


@torch.no_grad()
def _computed(unit: Unit, work: Work) -> tuple[dict[str, Tensor], dict[str, float]]:
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
    # A weight or a bias that was trained is what the formula of its module acts on: it stands there first.
    loaded |= {alias: value.to(loaded[alias].dtype) for name, value in work.trained.items()
               if (alias := work.aliases[name]) in loaded}
    errors: dict[str, float] = {}
    for placed in unit.placed:
        names = {name.rpartition(".")[2]: work.aliases[name] for name in _written(placed)}
        result = _merged_alone(placed, work.surgeon, {own: loaded[name] for own, name in names.items()})
        errors[placed.site.name] = result.error
        loaded |= {names[own]: tensor for own, tensor in result.tensors.items()}
    return {name: tensor for piece in unit.pieces
            for name, tensor in piece.saved({n: loaded[n] for n in piece.parameters}).items()}, errors


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


# ------------------------------------------------------------------------------------------------------------- writing


def _streamed(work: Work, saved: Sequence[Saved], out: Path, name: str, jobs: int, force: bool) -> MergedFiles:
    """Raises: Unsure, and then nothing is left of it; SurgeryError."""
    beside, left_out = _beside(work)
    with resuming(out, MODEL, work.job, force, abandon=Unsure) as unfinished:
        writer = _Writer(work, unfinished)
        writer.run(jobs)
        for path in beside:
            target = unfinished.new / path.relative_to(work.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if path.read_bytes() != target.read_bytes():
                raise OSError(f"{target.name} reads back as something else than was written")
    for each in saved:
        for warning in each.differing(work.met):
            warnings.warn(SurgeryWarning(warning), stacklevel=3)
    return MergedFiles(out, name, {p.site.name: writer.errors[p.site.name] for p in work.surgeon.plan.placed},
                       left_out=tuple(left_out), kept=writer.kept)


def _beside(work: Work) -> tuple[list[Path], list[str]]:
    """The files of the base model's folder that are copied as they are, and the names of those that hold its weights in
    another format, or that no model is loaded from: a reader of one of those would get the model as it was."""
    copied, left_out = [], []
    weights = {file.path for file in work.files}
    is_sharded = len(weights) > 1 or weight_files(work.root)[0].name != "model.safetensors"
    for above, folders, files in os.walk(work.root):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for path in (Path(above, each) for each in files):
            inside = path.relative_to(work.root)
            is_index = path.name.endswith(".index.json") and not (is_sharded and inside == Path(INDEX))
            is_other = path.suffix in (*OTHER_FORMATS, ".safetensors") or is_index
            if path in weights or inside == Path(MANIFEST) or not path.is_file():
                continue
            if inside.parts[0] in OTHER_FOLDERS or len(inside.parts) == 1 and is_other:
                left_out.append(str(inside))
            else:
                copied.append(path)
    return sorted(copied), sorted(left_out)


class _Writer:
    """Writes the files of a merge into an unfinished folder. The main thread computes; the others copy what is between
    the computed tensors, write those, and read each file back when all of it is there."""

    def __init__(self, work: Work, unfinished: Unfinished):
        self.work, self.unfinished = work, unfinished
        self.errors: dict[str, float] = {}
        self.written = {name for unit in work.units for name in unit.stored}
        self.digests: dict[str, str] = {}  # of each computed tensor's bytes
        self.kept = 0
        noted = {kind: {entry[kind]: entry for entry in unfinished.done if kind in entry} for kind in ("unit", "file")}
        self._units, self._files = noted["unit"], noted["file"]

    def run(self, jobs: int) -> None:
        """Raises: OSError, SurgeryError, Unsure."""
        for file in self.work.files:
            if self._is_done(file):
                self.unfinished.digests[file.path.name] = self._files[file.path.name]["sha256"]
            else:
                self._lay_out(file)
        pool = ThreadPoolExecutor(jobs)
        try:
            self._run(pool, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, pool: ThreadPoolExecutor, jobs: int) -> None:
        units = {unit.stored: unit for unit in self.work.units}
        tasks: list[Future] = []
        waiting: list[Future] = []  # tensors in memory, to be written
        for file in self.work.files:
            mine = {t.name for t in file.tensors}
            here = [unit for key, unit in units.items() if not mine.isdisjoint(key)]
            if not self._is_done(file):
                tasks += [pool.submit(self._copy, file, *run) for run in self._runs(file)]
            for unit in here:
                del units[unit.stored]
                if not self._keep(unit):
                    while len(waiting) >= jobs:
                        waiting.pop(0).result()
                    waiting.append(pool.submit(self._put, unit, *_computed(unit, self.work)))
                    tasks.append(waiting[-1])
            if not self._is_done(file):
                # It waits for what was submitted before it, which a free thread has begun before it begins this.
                tasks.append(pool.submit(self._check, file, tuple(tasks)))
        for task in tasks:
            task.result()

    def _out(self, file: TensorFile) -> Path:
        return self.unfinished.new / file.path.name

    def _is_done(self, file: TensorFile) -> bool:
        return file.path.name in self._files

    def _lay_out(self, file: TensorFile) -> None:
        """The file in its length, with its header: each tensor has its place from the start."""
        header = read_at(file.path, 0, file.start)
        out = self._out(file)
        with out.open("r+b" if out.exists() else "xb") as new:
            new.write(header)
            new.truncate(file.size)

    def _runs(self, file: TensorFile) -> Iterator[tuple[int, int]]:
        """The bytes of a file that are copied: the tensors that nothing computes, in runs of a bounded length."""
        begin = file.start
        for tensor in (*(t for t in file.tensors if t.name in self.written), None):
            end = file.size if tensor is None else tensor.begin
            yield from ((at, min(at + _RUN, end)) for at in range(begin, end, _RUN))
            begin = end if tensor is None else tensor.end

    def _copy(self, file: TensorFile, begin: int, end: int) -> None:
        _write_at(self._out(file), begin, chunks(file.path, begin, end))

    def _keep(self, unit: Unit) -> bool:
        """Whether the run before has written a unit, and it is still there."""
        noted = self._units.get(unit.stored[0])
        if noted is None or {*noted["digests"]} != {*unit.stored}:
            return False
        for name, digest in noted["digests"].items():
            file, tensor = self.work.where[name]
            if not self._is_done(file) and _digest(self._out(file), tensor.begin, tensor.end) != digest:
                return False
        self._done(unit, noted["digests"], noted["errors"])
        self.kept += len(unit.placed)
        return True

    def _put(self, unit: Unit, tensors: Mapping[str, Tensor], errors: Mapping[str, float]) -> None:
        digests = {}
        for name, value in tensors.items():
            file, tensor = self.work.where[name]
            held = value.contiguous().flatten().view(torch.uint8).numpy().data
            if len(held) != tensor.size or _CODES[value.dtype] != tensor.dtype:
                raise Unsure(f"{name} does not fit the place that it has in the files")
            _write_at(self._out(file), tensor.begin, (held[at:at + _CHUNK] for at in range(0, len(held), _CHUNK)))
            digests[name] = hashlib.sha256(held).hexdigest()
        self._done(unit, digests, errors)
        self.unfinished.note({"unit": unit.stored[0], "digests": digests, "errors": errors})

    def _done(self, unit: Unit, digests: Mapping[str, str], errors: Mapping[str, float]) -> None:
        self.digests.update(digests)
        self.errors.update(errors)

    def _check(self, file: TensorFile, tasks: Sequence[Future]) -> None:
        """Read a file back: the header, what was copied beside the base model's, what was computed by its digest.

        Raises: OSError."""
        for task in tasks:
            task.result()
        out = self._out(file)
        flush(out)
        if opened_file(out).tensors != file.tensors:
            raise OSError(f"the header of {out.name} reads back as another one")
        seen = hashlib.sha256()
        places = [(0, file.start, ""), *((*run, "") for run in self._runs(file)),
                  *((t.begin, t.end, t.name) for t in file.tensors if t.name in self.written)]
        for begin, end, name in sorted(places):
            own, given = hashlib.sha256(), chunks(file.path, begin, end)
            for found in chunks(out, begin, end):
                seen.update(found)
                if name:
                    own.update(found)
                elif bytes(found) != bytes(next(given)):  # two memoryviews are compared byte by byte
                    raise OSError(f"{out.name} reads back otherwise than the base model's, after byte {begin}")
            if name and own.hexdigest() != self.digests[name]:
                raise OSError(f"{name} reads back otherwise than it was written")
        self.unfinished.digests[file.path.name] = seen.hexdigest()
        self.unfinished.note({"file": file.path.name, "sha256": seen.hexdigest()})


def _write_at(path: Path, begin: int, held: Iterable[memoryview]) -> None:
    """Raises: OSError."""
    with path.open("r+b", buffering=0) as file:
        file.seek(begin)
        for view in held:
            while view:
                view = view[file.write(view) or 0:]


def _digest(path: Path, begin: int, end: int) -> str:
    seen = hashlib.sha256()
    for chunk in chunks(path, begin, end):
        seen.update(chunk)
    return seen.hexdigest()
