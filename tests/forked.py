"""A copy of this process in the place of a new one: what takes seconds to import is there already."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryFile


def run(call: Callable[[], object], seconds: float = 300) -> str:
    """What a copy of this process says when it calls that, on stdout and stderr. It must end well, and in this time."""
    with TemporaryFile() as said, open(os.devnull) as nothing:
        number = begin(call, nothing.fileno(), said.fileno(), said.fileno())
        late, status = time.monotonic() + seconds, (0, 0)
        while not status[0]:
            time.sleep(0.05)
            status = os.waitpid(number, os.WNOHANG)
            if time.monotonic() > late:
                os.kill(number, signal.SIGKILL)
        said.seek(0)
        text = said.read().decode(errors="replace")
    assert status[1] == 0, f"{os.waitstatus_to_exitcode(status[1])}: {text[-3000:]}"
    return text


def begin(call: Callable[[], object], stdin: int, stdout: int, stderr: int, closed: tuple[int, ...] = ()) -> int:
    """Make a call in a copy of this process that has these streams, and give its number. It ends as Python's would: with
    status 0, with that of a SystemExit, or with an error on stderr and 1. What is `closed` stays here."""
    if number := os.fork():
        return number
    status = 1
    try:
        for own, given in enumerate((stdin, stdout, stderr)):
            os.dup2(given, own)
        for each in closed:
            os.close(each)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        call()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stderr.write(ended.code if isinstance(ended.code, str) else "")
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
