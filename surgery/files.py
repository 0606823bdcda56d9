"""Reading files that others may have written: with a bound, and of a folder's regular files alone.

Takes a path; gives bytes, or the values of a JSON file. Promises: no read waits for a pipe that nobody writes to or
follows a device that never ends; what cannot be read is an OSError or a ValueError that says why in a few words.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import sleep
from typing import Any, NoReturn

from surgery.text import size_text

SPEC_BYTES = 1 << 20  # a spec is written by hand: the largest that ship have a few KiB
WRITTEN = "another process wrote there while it was read"
_PAUSE = 0.3  # seconds between two looks at files that are watched
JSON_BYTES = 1 << 26  # a list of the tensors of the largest models has some MiB


def refuse_irregular(path: Path | int) -> None:
    """Raises: OSError unless a path is, or links to, a regular file, or an open file is one. (The files of a hub's
    cache are links.)"""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and no regular file", str(path))


def read_bytes(path: Path, limit: int, any_kind: bool = False) -> bytes:
    """The bytes of a regular file. `any_kind`: of a pipe or a device too, for a path that the user has named.

    Raises: OSError, also for a file of more than `limit` bytes.
    """
    if not any_kind:
        refuse_irregular(path)
    # Should a pipe have come in the file's place since, opening it does not wait for a writer.
    handle = os.open(path, os.O_RDONLY | (0 if any_kind else getattr(os, "O_NONBLOCK", 0)) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not any_kind:
            refuse_irregular(file.fileno())
        content = file.read(limit + 1)  # and not by the size that the system tells, which is 0 for a pipe
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {size_text(limit)}", str(path))
    return content


def changes(files: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Once at the beginning, and once after each time that one of the files has changed, come or gone."""
    while True:
        stamps = _stamps(files())
        yield
        while _stamps(files()) == stamps:
            sleep(_PAUSE)


def unchanged(*paths: Path) -> Callable[[], bool]:
    """Tells, whenever it is asked, whether files are still those that stand there now: what is read of several files
    says something together alone, and another process may have written new ones in between."""
    files = [*map(str, paths)]
    before = _stamps(files)
    return lambda: _stamps(files) == before


def as_written(path: Path) -> Path:
    """A path below the working directory relative to it, as a user would write it; any other as it is."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float can hold: not True or False, 1e999, nor one of a thousand
    digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _stamps(names: Iterable[str]) -> dict[str, tuple]:
    stamps: dict[str, tuple] = {}
    for name in names:
        try:
            found = os.stat(name)
            stamps[name] = found.st_mtime_ns, found.st_size, found.st_ino
        except OSError:
            stamps[name] = ()
    return stamps


def read_json(path: Path, allow_nan: bool = False) -> Any:
    """The values in a JSON file. `allow_nan`: NaN and Infinity too, which are no JSON, and which Python writes.

    Raises: OSError; ValueError for what is not UTF-8 or not JSON, is nested too deeply, or holds a number of more
    digits than Python reads.
    """
    text = read_bytes(path, JSON_BYTES).decode("utf-8")
    try:
        return json.loads(text, parse_constant=float if allow_nan else _no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
