"""Merging a saved adapter into a model's files, without the model in memory.

Takes the folder of an adapter, the name of its base model and a folder to write; gives what was done. Each W' is
computed by the program that `merge()` runs, of the stored tensor and the adapter's, and put at that tensor's place in a
file of the same layout; all other bytes are copied. Promises: at any moment the largest of those tensors is in memory,
in the forms that its formula takes; a run that was killed is gone on with; what is written is read back and compared
before the folder appears. Where the files do not hold each parameter so that it can be written back, that is said, and
the model is loaded and merged as a whole.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.diagnostics import SurgeryError, SurgeryWarning, fail, tell
from surgery.models.checkpoint_files import INDEX, weight_files
from surgery.models.loading import OTHER_FOLDERS, OTHER_FORMATS, load, load_with_saved_head, preprocessors
from surgery.models.names import base_name
from surgery.models.stored_names import Unsure
from surgery.planning.initial_values import departure
from surgery.runtime.atomic_folders import MANIFEST, refuse_taken, resuming
from surgery.runtime.dequantise import merge_plainly, save_plain
from surgery.runtime.merge_work import Work, job_of, numbered, work_of
from surgery.runtime.merge_writer import Writer
from surgery.runtime.proof import outputs
from surgery.runtime.save import MODEL, save_merged
from surgery.runtime.saved_format import Saved
from surgery.runtime.stack import Surgeries
from surgery.runtime.surgeon import Surgeon

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Step = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class MergedFiles:
    """The result of `merge_files`. `errors`: the relative rounding error of each module; `in_memory`: why the whole
    model was loaded (empty if it was not); `left_out`: files of the base model's folder that were not copied, since
    they hold its weights in another format; `kept`: how many weights an earlier, interrupted run had merged already.

    `logits`, for an adapter that was trained on a quantised model: the relative difference between the outputs of that
    model and those of the written one, on a batch that is made up; `not_compared`: why it was not measured."""

    out: Path
    base: str
    errors: dict[str, float]
    in_memory: str = ""
    left_out: tuple[str, ...] = ()
    kept: int = 0
    logits: float | None = None
    not_compared: str = ""


def merge_files(folder: str | PathLike, out: str | PathLike, base: str | None = None, *,
                then: Iterable[str | PathLike] = (), dtype: str | None = None, jobs: int = 2, force: bool = False,
                trust: bool = False, dequantise: bool = False, step: Step = nullcontext) -> MergedFiles:
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
    merge = _Merge(folders, saved, name, Path(out), dtype, force, trust, step)
    return merge.dequantised() if dequantise else merge.with_logits(merge.merged(jobs))


@dataclass(frozen=True)
class _Merge:
    """One call of `merge_files`: the adapters' `folders` and what is `saved` in them, the base model's `name`."""

    folders: Sequence[Path]
    saved: Sequence[Saved]
    name: str
    out: Path
    dtype: str | None = None
    force: bool = False
    trust: bool = False
    step: Step = nullcontext

    def merged(self, jobs: int) -> MergedFiles:
        """Weight by weight where the files allow it, else with the whole model in memory."""
        try:
            with self.step(f"reading the headers of {self.name}"):
                work = work_of(self.name, self.saved, self.dtype, self.trust)
            with self.step(f"merging into {self.out}"):
                return self._streamed(work, jobs)
        except Unsure as why:
            return self.in_memory(str(why))

    def in_memory(self, why: str) -> MergedFiles:
        """Load the model, merge, save it: works for any model. `why`: the reason for doing so."""
        model = self._loaded()
        with self.step("merging"):
            surgeon = self._operated(model)
            errors = surgeon.merge()
        with self.step(f"saving {self.out}"):
            save_merged(surgeon, self.out, preprocessors(self.name, self.trust), self.force)
        return MergedFiles(self.out, self.name, errors, why)

    def dequantised(self) -> MergedFiles:
        """Write plain weights W' of the dequantised base. Raises: SurgeryError (merge-error), if nothing of it is
        quantised."""
        model = self._loaded(self.saved[0].meta.get("quantization"))
        with self.step("merging"):
            surgeon = self._operated(model)
            before = outputs(model)
            errors = merge_plainly(surgeon)
            logits, why = _departure(before, outputs(model), model)
        with self.step(f"saving {self.out}"):
            save_plain(model, self.out, preprocessors(self.name, self.trust), self.force)
        return MergedFiles(self.out, self.name, errors, "the base model is quantised, and is written dequantised",
                           logits=logits, not_compared=why)

    def with_logits(self, done: MergedFiles) -> MergedFiles:
        """Add the difference between the model that was trained, on a quantised base, and the plain one written."""
        first = self.saved[0]
        quantisation, trained_on = first.meta.get("quantization"), first.base
        if quantisation is None or trained_on is None:
            return done
        try:
            with self.step(f"comparing with {trained_on} as it was trained"):
                model = load_with_saved_head(trained_on, first, None, self.trust, quantisation)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SurgeryWarning)
                    before = outputs(self._operated(model).model)
                del model  # the two are not in memory at once
                written = load(str(done.out), trust=self.trust)
                logits, why = _departure(before, outputs(written), written)
        except SurgeryError as error:
            logits, why = None, error.diagnostics[0].message
        return replace(done, logits=logits, not_compared=why)

    def _loaded(self, quantisation: Mapping[str, Any] | None = None) -> PreTrainedModel:
        with self.step(f"loading {self.name}"):
            return load_with_saved_head(self.name, self.saved[0], self.dtype, self.trust, quantisation)

    def _operated(self, model: nn.Module) -> Surgeon:
        """The surgeon of all the adapters on a model, one after the other."""
        surgeries = Surgeries(model)
        for i, each in enumerate(self.folders):
            surgeries.add(numbered(i), each)
        surgeon = surgeries.use(*surgeries.names)
        assert surgeon is not None  # it is None where no name is given
        return surgeon

    def _streamed(self, work: Work, jobs: int) -> MergedFiles:
        """Raises: Unsure, and then nothing is left of it; SurgeryError."""
        copied, left_out = _other_files(work)
        with resuming(self.out, MODEL, work.job, self.force, abandon=Unsure) as unfinished:
            writer = Writer(work, unfinished)
            writer.run(jobs)
            for path in copied:
                target = unfinished.new / path.relative_to(work.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                if not filecmp.cmp(path, target, shallow=False):  # by their bytes, a few at a time
                    raise OSError(f"{target.name} reads back as something else than was written")
            if job_of(self.saved, work.files) != work.job:
                raise fail("merge-error", f"files of {self.name} or of an adapter were changed while they were merged",
                           helps=("merge again, when nothing writes there",))
        for each in self.saved:
            tell(each.differing(work.met))
        for remade in work.remade.values():
            tell(remade.warnings())
        errors = {p.site.name: writer.errors[p.site.name] for p in work.surgeon.plan.placed}
        return MergedFiles(self.out, self.name, errors, left_out=tuple(left_out), kept=writer.kept)


def _departure(before: Tensor | None, after: Tensor | None, model: nn.Module) -> tuple[float | None, str]:
    if before is None or after is None or before.shape != after.shape:
        return None, f"no batch can be made up for a {type(model).__name__}"
    return departure(before, after), ""


def _other_files(work: Work) -> tuple[list[Path], list[str]]:
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
