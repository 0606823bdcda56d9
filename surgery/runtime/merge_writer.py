"""Writes the files of a merge into an unfinished folder, computed tensors among copied bytes, and reads them back.

Takes a `Work` and the unfinished folder; a run that was killed is gone on with where its notes end. Promises: what is
called done has been read back: copied bytes beside the base model's, computed ones by their checksum.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.models.checkpoint_files import TensorFile, chunks, opened_file, read_at
from surgery.models.stored_names import Unsure
from surgery.runtime.atomic_folders import Unfinished, flush
from surgery.runtime.merge_work import Unit, Work, computed, see_again, seen
from surgery.runtime.stored_weights import CODES

if TYPE_CHECKING:
    from torch import Tensor

_RUN = 1 << 26  # bytes that one task copies
_CHUNK = 1 << 18  # bytes that are written at once


class Writer:
    """Writes the files of a merge into an unfinished folder. The main thread computes; the others copy what is between
    the computed tensors, write those, and read each file back when all of it is there."""

    def __init__(self, work: Work, unfinished: Unfinished):
        self.work, self.unfinished = work, unfinished
        self.errors: dict[str, float] = {}
        self.written = {name for unit in work.units for name in unit.stored}
        self.checksums: dict[str, int] = {}  # of each computed tensor's bytes
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
                tasks += [pool.submit(_write_at, self._out(file), begin, chunks(file.path, begin, end))
                          for begin, end in self._runs(file)]
            for unit in here:
                del units[unit.stored]
                if not self._keep(unit):
                    while len(waiting) >= jobs:
                        waiting.pop(0).result()
                    waiting.append(pool.submit(self._put, unit, *computed(unit, self.work)))
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

    def _keep(self, unit: Unit) -> bool:
        """Whether the run before has written a unit, and it is still there."""
        noted = self._units.get(unit.stored[0])
        if noted is None or {*noted.get("checksums", ())} != {*unit.stored} or "rounded" not in noted:
            return False
        for name, checksum in noted["checksums"].items():
            file, tensor = self.work.weights.where[name]
            if not self._is_done(file) and _checksum(chunks(self._out(file), tensor.begin, tensor.end)) != checksum:
                return False
        see_again(self.work, noted)
        self._done(noted["checksums"], noted["errors"])
        self.kept += len(unit.placed)
        return True

    def _put(self, unit: Unit, tensors: Mapping[str, Tensor], errors: Mapping[str, float]) -> None:
        checksums = {}
        for name, value in tensors.items():
            file, tensor = self.work.weights.where[name]
            held = value.contiguous().flatten().view(torch.uint8).numpy().data
            if len(held) != tensor.size or CODES[value.dtype] != tensor.dtype:
                raise Unsure(f"{name} does not fit the place that it has in the files")
            views = [held[at:at + _CHUNK] for at in range(0, len(held), _CHUNK)]
            _write_at(self._out(file), tensor.begin, views)
            checksums[name] = _checksum(views)
        self._done(checksums, errors)
        about = {"unit": unit.stored[0], "checksums": checksums, "errors": errors}
        self.unfinished.note({**about, **seen(unit, self.work)})

    def _done(self, checksums: Mapping[str, int], errors: Mapping[str, float]) -> None:
        self.checksums.update(checksums)
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
        digest = hashlib.sha256()
        places = [(0, file.start, ""), *((*run, "") for run in self._runs(file)),
                  *((t.begin, t.end, t.name) for t in file.tensors if t.name in self.written)]
        for begin, end, name in sorted(places):
            own, given = 0, chunks(file.path, begin, end)
            for found in chunks(out, begin, end):
                digest.update(found)
                if name:
                    own = zlib.crc32(found, own)
                elif bytes(found) != bytes(next(given)):  # two memoryviews are compared byte by byte
                    raise OSError(f"{out.name} reads back otherwise than the base model's, after byte {begin}")
            if name and own != self.checksums[name]:
                raise OSError(f"{name} reads back otherwise than it was written")
        self.unfinished.digests[file.path.name] = digest.hexdigest()
        self.unfinished.note({"file": file.path.name, "sha256": digest.hexdigest()})


def _write_at(path: Path, begin: int, held: Iterable[memoryview]) -> None:
    """Raises: OSError."""
    with path.open("r+b", buffering=0) as file:
        file.seek(begin)
        for view in held:
            while view:
                view = view[file.write(view) or 0:]


def _checksum(held: Iterable[memoryview]) -> int:
    """What tells the mistakes of a disk, which nobody forges: in less than half the time of a digest."""
    return reduce(lambda so_far, view: zlib.crc32(view, so_far), held, 0)
