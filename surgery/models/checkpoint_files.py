"""A model's safetensors files: which they are, and where in them each tensor's bytes lie.

Takes a folder; gives `TensorFile`s. Promises: opening reads headers alone; a header is believed only where safetensors
itself reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError, safe_open

from surgery.diagnostics import fail
from surgery.files import read_json, refuse_irregular

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_CHUNK = 1 << 18  # bytes: larger reads are slower, since the buffer leaves the cache


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes in a file: `begin` and `end` count from the file's first byte; `dtype` as safetensors spells
    it (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class TensorFile:
    """One file: `tensors` in the order in which their bytes lie, which begin at `start`."""

    path: Path
    start: int
    tensors: tuple[StoredTensor, ...]

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size


class GrowingFile:
    """A safetensors file whose tensors come one at a time, as many as memory would not hold: until the last has come,
    at the end of a `with` block, they wait in a file beside it."""

    def __init__(self, path: Path):
        self.path, self._waiting = path, path.with_name(f"{path.name}.part")
        self._tensors: list[StoredTensor] = []
        self._file = self._waiting.open("xb")

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        if kind is None:
            self._write()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], numbers: memoryview) -> None:
        """A tensor by its bytes; `dtype` as safetensors spells it. Raises: OSError."""
        begin = self._file.tell()
        self._file.write(numbers)
        self._tensors.append(StoredTensor(name, dtype, shape, begin, self._file.tell()))

    def _write(self) -> None:
        """In the order that safetensors has: the wide dtypes first, so that each number lies at a multiple of its
        size. Raises: OSError."""
        ordered = sorted(self._tensors, key=lambda t: (-int(t.dtype.lstrip("BFI")), t.name))
        header, end = {}, 0
        for t in ordered:
            header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.size]}
            end += t.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for t in ordered:
                file.writelines(chunks(self._waiting, t.begin, t.end))
        self._waiting.unlink()


def chunks(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes of a file from a place to another, by so many but for the last ones, in one buffer again and again.
    Raises: OSError, where it ends before that."""
    buffer = memoryview(bytearray(min(_CHUNK, end - begin)))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        for at in range(begin, end, _CHUNK):
            wanted = buffer[:end - at]
            _fill(wanted, file)
            yield wanted


def read_into(held: memoryview, path: Path, begin: int) -> None:
    """Fill a buffer with the bytes of a file from a place on. Raises: OSError, where it ends before that."""
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        _fill(held, file)


def _fill(held: memoryview, file: FileIO) -> None:
    have = 0
    while have < len(held):
        count = file.readinto(held[have:])
        if not count:
            raise OSError(f"{file.name} ends before byte {file.tell() + len(held) - have}")
        have += count


def read_at(path: Path, begin: int, end: int) -> bytearray:
    """The bytes of a file from a place to another. Raises: OSError, where it ends before that."""
    found = bytearray(end - begin)
    read_into(memoryview(found), path, begin)
    return found


def opened_file(path: Path) -> TensorFile:
    """Raises: SurgeryError (unknown-model) for what is no safetensors file."""
    try:
        refuse_irregular(path)
        with safe_open(path, "pt"):  # which checks that no two tensors overlap, and that all bytes are some tensor's
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise fail("unknown-model", f"cannot read {path}: {error}") from None
    header.pop("__metadata__", None)
    found = [StoredTensor(name, about["dtype"], tuple(about["shape"]), *(8 + length + at for at in
             about["data_offsets"])) for name, about in header.items()]
    return TensorFile(path, 8 + length, tuple(sorted(found, key=lambda tensor: (tensor.begin, tensor.end))))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, in the order in which transformers looks; none without such
    files. Raises: SurgeryError (unknown-model) for an index that is none."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        try:
            listed = list(dict.fromkeys(read_json(folder / INDEX)["weight_map"].values()))
            if all(Path(name).name == name and (folder / name).is_file() for name in listed):
                return [folder / name for name in listed]
            reason = "it names what is no file beside it"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or "it is no list of a model's files"
        raise fail("unknown-model", f"cannot read {folder / INDEX}: {reason}")
    return []
