"""Folders that appear whole: what a command writes takes its place in one step, or not at all.

Takes a path; gives a folder beside it to write into. Promises: whatever interrupts the writing, the path holds what it
held before or all that is new; only a folder of the kind that we write is ever replaced.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surgery.diagnostics import fail
from surgery.words import some

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Kind:
    """A kind of folder that we write: what it is called, the names that one of it always has, and whether it may have
    an entry of a name."""

    title: str
    marks: frozenset[str]
    may_have: Callable[[str], bool]

    def foreign(self, names: Iterable[str]) -> list[str]:
        """The names that show that a folder is not of this kind (none of an empty one)."""
        names = sorted(names)
        return [n for n in names if not self.may_have(n)] or (names if names and not self.marks <= set(names) else [])


@contextmanager
def replacing(folder: Path, kind: Kind) -> Iterator[Path]:
    """A new folder that takes the place of `folder`, an older one of the kind, when the block ends well.

    Raises: SurgeryError (bad-output).
    """
    refuse_foreign(folder, kind)
    with _beside(folder) as (target, beside):
        new = beside / "new"
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            _flush(path)
        _put(new, target)
        _flush(target.parent)


def refuse_foreign(folder: Path, kind: Kind) -> None:
    """Raises: SurgeryError (bad-output) if a folder holds what is not ours to replace, or is a file."""
    if folder.is_dir():
        foreign = kind.foreign(p.name for p in folder.iterdir())
        if foreign:
            raise fail("bad-output", f"{folder} is not {kind.title}, so it is not replaced: it holds {some(foreign)}",
                       helps=("name a new folder",))
    elif folder.exists():
        raise fail("bad-output", f"{folder} is a file", helps=("name a folder",))


def refuse_unwritable(path: Path) -> None:
    """Raises: SurgeryError (bad-output) if no file or folder can be made at a path,
    in the first folder above that exists."""
    above = next((p for p in path.parents if p.exists()), Path())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise fail("bad-output", f"cannot write {path}: {above} is {'not writable' if above.is_dir() else 'a file'}")


def refuse_file(path: Path) -> None:
    """Raises: SurgeryError (bad-output) unless a file can be written at a path,
    in a folder that is there or can be made."""
    refuse_unwritable(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe, which nothing can take the place of"
        raise fail("bad-output", f"{path} is {what}", helps=("name a file",))


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file's path, of the same ending, that takes the place of `path`, or of what that links to, when the block
    ends well. Raises: SurgeryError (bad-output)."""
    refuse_file(path)
    with _beside(path) as (target, beside):
        new = beside / path.name
        yield new
        new.replace(target)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """What `path` is or links to, and a folder beside that for what is to take its place: within one file system a
    rename is one step. Raises: SurgeryError (bad-output)."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent,
                                         ignore_cleanup_errors=True) as beside:
            yield target, Path(beside)
    except OSError as error:
        raise fail("bad-output", f"cannot write {path}: {error.strerror or error}") from error


def _put(new: Path, target: Path) -> None:
    """Move the new folder to its place; an old one comes to stand where the new one stood."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        aside = new.with_name("old")
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other),
                                         _RENAME_EXCHANGE) == 0


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
