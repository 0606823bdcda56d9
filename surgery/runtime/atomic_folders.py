"""Folders and files that appear whole: what a command writes takes its place in one step, or not at all.

Takes a path; gives a folder beside it to write into. Promises: whatever interrupts the writing, the path holds what it
held before or all that is new, and what an interrupted run has left beside it is cleared up by the next one; a folder
is replaced only where a list that lies in it says that every file of it was written by us and is still as we wrote it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from surgery.diagnostics import Diagnostic, SurgeryError, fail, tell
from surgery.files import read_json, refuse_irregular
from surgery.text import some

try:
    import fcntl
except ImportError:  # Windows, where nothing tells that the writer of a folder is dead
    fcntl = None

MANIFEST = "surgery-manifest.json"  # lists what we wrote into a folder, with the digest of each file
FORMAT = "1.0"
_STAGING, _LOCK = ".surgery-", "lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_TRIES = 100  # of writers that take turns at one path
_SETTLED = 10 * 10**9  # nanoseconds after which a file's next change bears another time, on any file system
_PAUSE = 0.01  # seconds between two tries to have an unfinished folder


@dataclass(frozen=True)
class Kind:
    """A kind of folder that we write: what it is called, and the names in one that a version without a manifest
    wrote, if no other program writes a folder of those names."""

    title: str
    earlier: frozenset[str] = frozenset()

    def foreign(self, folder: Path) -> list[str]:
        """What a folder holds that is not a file of this kind as we wrote it: nothing, of an empty one. Raises:
        OSError."""
        digests, names = None, sorted(os.listdir(folder))
        with suppress(OSError, ValueError, KeyError, TypeError):  # a list that is none of ours tells nothing
            manifest = read_json(folder / MANIFEST)
            digests = dict(manifest["files"]) if manifest["kind"] == self.title else None
        if digests is None:
            is_earlier = self.earlier and all(name in names and _digest(folder / name) for name in self.earlier)
            return [name for name in names if not is_earlier or name not in self.earlier]
        wrote = {MANIFEST, *digests, *(str(above) for name in digests for above in Path(name).parents)}
        present = _names(folder)
        changed = [f"{n} (changed since)" for n in present if n in digests and _digest(folder / n) != digests[n]]
        if _names(folder) != present:  # it takes a while to read a large model, and somebody was at work there
            return self.foreign(folder)
        return [name for name in present if name not in wrote] + changed

    def sign(self, folder: Path, known: Mapping[str, str] | None = None) -> None:
        """Write the list of what the folder holds into it; `known`: digests that are at hand."""
        files = {name: (known or {}).get(name) or _digest(folder / name) for name in _names(folder)
                 if not (folder / name).is_dir()}
        about = {"format_version": FORMAT, "kind": self.title, "files": files}
        (folder / MANIFEST).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _below(folder: Path) -> Iterator[Path]:
    """Everything in a folder, at any depth; links are not followed. Raises: OSError."""
    def stop(error: OSError) -> None:
        raise error

    for above, folders, files in os.walk(folder, onerror=stop):
        yield from (Path(above, name) for name in (*folders, *files))


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in _below(folder))


_read: dict[tuple[int, ...], str] = {}  # digests of files, by what the system says of each


def _digest(path: Path) -> str | None:
    """The digest of a file's bytes; None for what is no file itself (a link, a folder, a pipe). A large model is looked
    at several times before it is replaced: a file is read again only where the system says that it was changed. Of one
    that was changed just now it may not say so: two changes can bear the same time."""
    if path.is_symlink() or not path.is_file():
        return None
    before = _state(path)
    if before in _read:
        return _read[before]
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if before[-1] < time.time_ns() - _SETTLED and _state(path) == before:
        _read[before] = digest
    return digest


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's bytes, the time of its last change last."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


# ---------------------------------------------------------------------------------------------------- may it be taken


def refuse_taken(folder: Path, kind: Kind, force: bool) -> None:
    """Raises: SurgeryError (bad-output) for a file, for a folder that holds what we did not write and, unless `force`,
    for any that is not empty."""
    for tries in range(_TRIES):
        seen = _identity(folder)
        if seen is None:
            return
        try:
            if not folder.is_dir():
                what = "a file" if folder.exists() else "a link to nothing"
                raise fail("bad-output", f"{folder} is {what}", helps=("name a folder",))
            if foreign := kind.foreign(folder):
                raise fail("bad-output", f"{folder} is not {kind.title} as surgery wrote it, so it is not replaced: "
                           f"it holds {some(foreign)}", helps=("name a new folder",))
            if not force and os.listdir(folder):
                raise fail("bad-output", f"{folder} exists already",
                           helps=("--force replaces it; in Python, force=True",))
            return
        except (SurgeryError, OSError):
            # Another writer may have put a new folder there while we looked at an old one.
            if _identity(folder) == seen or tries == _TRIES - 1:
                raise


def _identity(path: Path) -> tuple[int, int] | None:
    """The identity of what is at a path now; None where there is nothing."""
    if os.path.lexists(path):
        with suppress(FileNotFoundError):
            state = path.stat() if path.exists() else path.lstat()
            return state.st_ino, state.st_ctime_ns  # an inode's number alone may be given out again


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
    if path.exists() and not os.access(path, os.W_OK):  # a rename would not ask
        raise fail("bad-output", f"cannot write {path}: it is write-protected")


# --------------------------------------------------------------------------------------------------------- replacing


@contextmanager
def replacing(folder: Path, kind: Kind, force: bool = True) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well: of nothing or an empty one, and of an
    older one of the kind if `force`. It keeps that one's permissions, file by file.

    Raises: SurgeryError (bad-output).
    """
    with _staged(folder) as (target, new):
        refuse_taken(folder, kind, force)
        yield new
        kind.sign(new)
        for path in _below(new):
            flush(path)
        _put(new, target, kind, force)
        flush(target.parent)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file's path, of the same ending, that takes the place of `path`, or of what that links to, when the block
    ends well, with the permissions that that has. Raises: SurgeryError (bad-output)."""
    refuse_file(path)
    with _staged(path) as (target, folder):
        new = folder / path.name
        yield new
        flush(new)
        if target.exists():
            _keep_permissions(target, new)
        new.replace(target)
        flush(target.parent)


def _put(new: Path, target: Path, kind: Kind, force: bool) -> None:
    """Move the new folder to its place; an old one comes to stand beside the place where the new one stood.

    Other writers may do the same at this moment: where a step finds another state than was seen, all is done again.
    """
    for _ in range(_TRIES):
        try:
            refuse_taken(target, kind, force)
            for path in (target, *_below(target)) if target.exists() else ():
                if (other := new / path.relative_to(target)).exists():
                    _keep_permissions(path, other)
            if not force and target.exists():
                target.rmdir()  # it is empty, or this fails
            if not force or not target.exists():
                new.rename(target)  # fails where another writer's folder has come since, which is then looked at
            elif not _exchange(new, target):
                _swap(new, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise fail("bad-output", f"cannot write {target}: others write there all the time")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, True; False where the system, or the file system, has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(other))
    return False


def _swap(new: Path, target: Path) -> None:
    """Exchange two folders in two steps. A run killed in between leaves the old one where `_clear_up` finds it."""
    aside = Path(tempfile.mkdtemp(prefix="old", dir=new.parent)) / "folder"
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise


def _keep_permissions(old: Path, new: Path) -> None:
    """Give what is new the owner, as far as we may, and the permissions of what it takes the place of."""
    was = old.stat()
    with suppress(OSError, AttributeError):
        if (was.st_uid, was.st_gid) != (new.stat().st_uid, new.stat().st_gid):
            os.chown(new, was.st_uid, was.st_gid)
    new.chmod(stat.S_IMODE(was.st_mode))


def flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------- resuming


@dataclass(frozen=True)
class Unfinished:
    """A new folder that outlives a run that is killed. `done` is what the run before has noted, `digests` those of the
    files that need not be read again to be listed."""

    new: Path
    journal: Path
    done: tuple[Any, ...]
    digests: dict[str, str] = field(default_factory=dict)

    def note(self, entry: Any) -> None:
        """Have the next run know of a step that is done. One write, so that a line is whole or the last."""
        handle = os.open(self.journal, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(handle)


@contextmanager
def resuming(folder: Path, kind: Kind, job: str, force: bool = False,
             abandon: type[Exception] = SurgeryError) -> Iterator[Unfinished]:
    """As `replacing`, for what takes long: after a kill, an interrupt or an error of the system the new folder stays
    beside `folder`, hidden, and the next run of the same `job` goes on with it; one of another job begins anew.

    Raises: SurgeryError (bad-output); after one of another code inside, or an error to `abandon` it, nothing stays.
    """
    target = Path(os.path.realpath(folder))
    staging = target.parent / f"{_STAGING}unfinished-{sha256(os.fsencode(target.name)).hexdigest()[:16]}"
    try:
        refuse_taken(folder, kind, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        _tell_others(target.parent, staging)
        with _alone(staging, folder, target.name):
            _put_back(staging, target)
            unfinished = _opened(staging, job)
            try:
                yield unfinished
                kind.sign(unfinished.new, unfinished.digests)
                for path in _below(unfinished.new):
                    flush(path)
                _put(unfinished.new, target, kind, force)
                flush(target.parent)
            except (SurgeryError, abandon) as error:
                if not _is_of_place(error):
                    _remove(staging)
                raise
            _remove(staging)
    except OSError as error:
        kept = f"what is done stays in {staging}, and the next run goes on with it; to give it up, remove that folder"
        raise fail("bad-output", f"cannot write {folder}: {error.strerror or error}",
                   helps=(kept,) if staging.is_dir() else ()) from error


def _tell_others(parent: Path, own: Path) -> None:
    """Warn of the unfinished folders of other runs, which nothing but those goes on with and nobody sees."""
    if fcntl is None:  # nothing tells whether such a run is at work
        return
    for staging in parent.glob(f"{_STAGING}unfinished-*"):
        with suppress(OSError, ValueError, KeyError, TypeError), (staging / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an OSError where its run is at work
            about = json.loads(lock.read(1 << 16))
            if staging != own and about["surgery"] == "goes on":
                left = Diagnostic("bad-output", f"{staging} is what an unfinished run has left of `{about['target']}`",
                                  severity="warning", helps=("run that again to go on with it, or remove the folder",))
                tell([left])


def _is_of_place(error: Exception) -> bool:
    """Whether it is the place that is at fault, and not what was to be written."""
    return isinstance(error, SurgeryError) and all(found.code == "bad-output" for found in error.diagnostics)


@contextmanager
def _alone(staging: Path, folder: Path, name: str) -> Iterator[None]:
    """Inside, the unfinished folder is this run's. Its lock says no `writes`, so that others do not clear it up."""
    with (staging / _LOCK).open("ab", buffering=0) as lock:
        for tries in range(_TRIES):
            if fcntl is None:  # nothing tells that another run is at work
                break
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries == _TRIES - 1:
                    raise fail("bad-output", f"another run is writing {folder}") from None
                time.sleep(_PAUSE)  # one that clears up holds it for a moment
        if not os.fstat(lock.fileno()).st_size:
            lock.write(json.dumps({"surgery": "goes on", "target": name}).encode())
        yield


def _opened(staging: Path, job: str) -> Unfinished:
    """What the run before has left, if that was the same job; else an empty folder."""
    new, journal = staging / "new", staging / "journal"
    first, *done = _lines(journal) or [None]
    if first != {"job": job} or not new.is_dir():
        for path in staging.glob("*"):
            if path.name != _LOCK:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        done = []
        new.mkdir()
    # What is noted from now on must not stand behind half a line.
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in ({"job": job}, *done)), encoding="utf-8")
    return Unfinished(new, journal, tuple(done))


def _lines(journal: Path) -> list[Any]:
    """The entries of a journal up to where a kill, or a disk that ended, has cut it."""
    found: list[Any] = []
    with suppress(OSError, ValueError):
        for line in journal.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            found.append(json.loads(line))
    return found


# ----------------------------------------------------------------------------------------------------------- staging


@contextmanager
def _staged(path: Path) -> Iterator[tuple[Path, Path]]:
    """What `path` is or links to, and a new folder beside that: within one file system a rename is one step.
    Raises: SurgeryError (bad-output)."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(target.parent)
        with _held(Path(tempfile.mkdtemp(prefix=_STAGING, dir=target.parent)), target.name) as staging:
            new = staging / "new"
            new.mkdir()
            yield target, new
    except OSError as error:
        raise fail("bad-output", f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _held(staging: Path, name: str) -> Iterator[Path]:
    """The folder, which is removed at the end. Inside, a file in it is locked, by which others know that its writer
    lives: the system lets go of a lock when the process ends, however it ends. The file gets its name once it is
    locked, so that none ever lies there free."""
    with (staging / "unlocked").open("xb", buffering=0) as lock:
        try:
            with suppress(OSError, AttributeError):  # a system without such locks: what is left there stays
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lock.write(json.dumps({"surgery": "writes", "target": name}).encode())
                    os.rename(staging / "unlocked", staging / _LOCK)
            yield staging
        finally:
            _remove(staging)


def _clear_up(folder: Path) -> None:
    """Remove what runs that were killed have left in a folder. Only what was ours and has no living writer goes."""
    if fcntl is None:
        return
    for staging in folder.glob(f"{_STAGING}*"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # whatever is odd about one, it stays
            if staging.is_symlink() or staging.lstat().st_uid != os.geteuid():
                continue
            refuse_irregular(staging / _LOCK)
            with (staging / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                about = json.loads(lock.read(1 << 16))
                if about["surgery"] != "writes":
                    continue
                _put_back(staging, folder / Path(about["target"]).name)
                _remove(staging)


def _put_back(staging: Path, target: Path) -> None:
    """Where the system cannot exchange two folders at once, the old one may have been away when the run ended."""
    for aside in staging.glob("old*/folder"):
        if not target.exists():
            aside.rename(target)


def _remove(staging: Path) -> None:
    """Remove a folder, its lock last: should this run be killed too, the next one knows it for ours."""
    for path in staging.glob("*"):
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)
