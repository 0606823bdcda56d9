"""A copy of this process in the place of a new one: what takes seconds to import is there already."""

import os
import sys
from collections.abc import Callable


def begin(run: Callable[[], None], stdin: int, stdout: int, stderr: int, closed: tuple[int, ...] = ()) -> int:
    """Call `run` in a copy of this process that has these streams, and give its number. It ends as Python's would: with
    status 0, with that of a SystemExit, or with an error's last line on stderr and 1. What is `closed` stays here."""
    if number := os.fork():
        return number
    status = 1
    try:
        for own, given in enumerate((stdin, stdout, stderr)):
            os.dup2(given, own)
        for each in closed:
            os.close(each)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        run()
        status = 0
    except BaseException as ended:
        code = ended.code if isinstance(ended, SystemExit) else str(ended)
        status = code if isinstance(code, int) else int(code is not None)
        os.write(2, str(code).encode() if isinstance(code, str) else b"")
    finally:
        os._exit(status)
