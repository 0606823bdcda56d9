"""Runs of a comparison on several devices at once: a worker process for each device.

Takes a comparison, what its runs are asked for, and devices by name; gives each run when it ends. Promises: a worker
sees its own device alone, and trains there as one process does; it keeps each run at once, so that a worker that is
lost loses the run that it was at and no other; which runs are lost is told, with why.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import torch

from surgery.diagnostics import SurgeryError, fail
from surgery.experiments.comparison_files import RUNS, Run, finished, keep
from surgery.experiments.timing import training_device
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.experiments.comparison import Comparison

VISIBLE = "CUDA_VISIBLE_DEVICES"  # which of a machine's GPUs a process sees
Asked = Mapping[str, Any]


def refuse_unknown(devices: Sequence[str]) -> None:
    """Raises: SurgeryError (bad-value) for a device that is not `cpu`, or `cuda:N` of a GPU that is here."""
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if wrong := [device for device in devices if device not in here]:
        raise fail("bad-value", f"there is no device `{wrong[0]}` to train on",
                   helps=(f"here are {', '.join(here)}; a device may be named twice",))


def performed(comparison: Comparison, asked: Mapping[str, Asked], folder: Path,
              devices: Sequence[str]) -> Iterator[tuple[str, Run]]:
    """Each run that is asked for, under its line, when it is finished and kept.

    A device whose worker is lost does no more, and the run is not tried on another: what a run asks too much of, it
    asks of all. Raises: SurgeryError (lost-run), after all that could be done."""
    waiting, lost = list(asked), []
    with ThreadPoolExecutor(len(devices)) as threads, ExitStack() as opened:  # the workers end before the threads do
        free = [opened.enter_context(worker(comparison, folder, device, len(devices)))
                for device in devices[: len(asked)]]
        at: dict[Future[str | None], tuple[Worker, str]] = {}
        while (waiting and free) or at:
            while waiting and free:
                each, what = free.pop(0), waiting.pop(0)
                at[threads.submit(each.perform, asked[what])] = each, what
            for ended in wait(at, return_when=FIRST_COMPLETED).done:
                each, what = at.pop(ended)
                why, run = ended.result(), finished(folder / RUNS, asked[what])
                if run is None:
                    lost.append(f"{what}, on {each.device}: {why}")
                else:
                    free.append(each)
                    yield what, run
    if lost:
        untried = [f"no device was left for {counted(len(waiting), 'other run')}"] if waiting else []
        raise fail("lost-run", f"{counted(len(lost), 'run')} came to no end", notes=(*lost, *untried),
                   helps=(f"the others are kept in {folder}: the same command goes on from there",))


def timed(comparison: Comparison, folder: Path, device: str) -> None:
    """Have the times of steps taken on a device, and kept. Raises: SurgeryError (lost-run)."""
    with worker(comparison, folder, device, 1) as alone:
        if why := alone.perform(None):
            raise fail("lost-run", f"the times of steps were not taken, on {device}: {why}")


class Worker:
    """A process that trains on one device. It ends with the block, or when the process that began it does."""

    def __init__(self, device: str, process: subprocess.Popen[bytes], errors: IO[bytes], about: bytes):
        self.device, self._process, self._errors, self._about = device, process, errors, about

    def perform(self, asked: Asked | None) -> str | None:
        """Have a run done and kept, or the times of steps. None, or why it was not: then the process has ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(self._about + pickle.dumps(asked))
            self._process.stdin.flush()
            self._about = b""  # what it works on is told once
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        return None if answer else self._why_lost()

    def _why_lost(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return ": ".join([f"its process ended with {how}", *said[-1:]])


@contextmanager
def worker(comparison: Comparison, folder: Path, device: str, among: int) -> Iterator[Worker]:
    """A worker on a device, one of several."""
    with TemporaryFile() as errors, subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=_environment(device, among), start_new_session=True) as process:  # Ctrl-C is for the one who asked
        try:
            yield Worker(device, process, errors, pickle.dumps((comparison, folder, device)))
        finally:
            process.kill()
            with suppress(OSError):  # what was not sent, to a process that is gone
                assert process.stdin
                process.stdin.close()


def _environment(device: str, among: int) -> dict[str, str]:
    """A worker's: its device as the only one, its part of the threads, the modules that are found here."""
    kind, _, index = device.partition(":")
    mine = os.environ.get(VISIBLE)
    names = mine.split(",") if mine else list(map(str, range(torch.cuda.device_count())))
    return {**os.environ, VISIBLE: "" if kind == "cpu" else names[int(index)],
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // among)),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


# ------------------------------------------------------------------------------------------------------- the worker


def main() -> None:
    """Do what is asked on stdin, one after the other, and answer each with a line on stdout when it is done."""
    from surgery.models.loading import quiet_libraries

    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    quiet_libraries(bars=False)
    comparison, folder, name = pickle.load(asked)
    if training_device().type != name.partition(":")[0]:
        raise SystemExit(f"it would train on {training_device()}")
    while True:
        try:
            _do(comparison, folder, pickle.load(asked))
        except EOFError:  # nothing more is asked
            return
        except SurgeryError as error:
            raise SystemExit("; ".join(each.message for each in error.diagnostics)) from None
        print("done", file=answers, flush=True)


def _do(comparison: Comparison, folder: Path, asked: Asked | None) -> None:
    if asked is None:
        comparison.steps(folder)
    else:
        keep(folder / RUNS, comparison.perform(asked))


if __name__ == "__main__":
    main()
