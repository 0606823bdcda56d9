"""What the suite takes: after a whole run it is said how many seconds of CPU went to each folder, and which files took
more than tests/cpu_seconds.txt has of them. Told, and never a failure: `--write-seconds` writes the file anew."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest

KEPT = Path(__file__).with_suffix(".txt")
COLLECTED, HANDED_OUT = "importing and collecting", "handing tests out"
SMALL = 2.0  # seconds: what is less, and what changes by less, is not looked at


def of_this_process() -> float:
    """Seconds of CPU until now, with those of processes that it began and that have ended."""
    return sum(os.times()[:4])


def known() -> dict[str, float]:
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return {file: float(seconds) for seconds, file in (line.split(maxsplit=1) for line in lines)}


def written(seconds: Mapping[str, float]) -> str:
    """The file's text: what is small is a sum."""
    large = {file: took for file, took in seconds.items() if took >= SMALL}
    rest = sum(seconds.values()) - sum(large.values())
    return "".join(f"{took:6.1f} {file}\n" for file, took in [*sorted(large.items()), ("the rest", rest)])


def summary(seconds: Mapping[str, float], known: Mapping[str, float]) -> list[str]:
    """What there is to say. The speed of this machine is that of the median file: one that has grown, or is new, stands
    out against the others."""
    folders: Counter[str] = Counter()
    for file, took in seconds.items():
        folders[file.split("/")[1] if file.count("/") > 1 else file if "/" not in file else "others"] += took
    said = [f"{sum(seconds.values()):.0f} seconds of CPU: " + ", ".join(f"{n} {s:.0f}" for n, s in folders.most_common())]
    ratios = [seconds[file] / took for file, took in known.items() if file in seconds]
    if not ratios:
        return said
    speed = median(ratios)
    grown = {file: took - speed * known.get(file, 0.0) for file, took in seconds.items()}
    said.append(f"tests/{KEPT.name} has {sum(known.values()):.0f}, which are {speed * sum(known.values()):.0f} here")
    for file, more in sorted(grown.items(), key=lambda each: -each[1]):
        if more > SMALL and file != HANDED_OUT and more > 0.25 * seconds[file]:
            was = f"{speed * known[file]:.1f}" if file in known else f"less than {SMALL:.0f}"
            said.append(f"  {file}: {seconds[file]:.1f}, and it was {was}")
    return said


class Seconds:
    """A pytest plugin, in each process that runs tests and in the one that hands them out."""

    def __init__(self, config: pytest.Config):
        self.config, self.took = config, Counter[str]()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = of_this_process()
        try:
            return (yield)
        finally:
            self.took[item.nodeid.partition("::")[0]] += of_this_process() - before

    def pytest_collection_finish(self) -> None:
        self.took[COLLECTED] += of_this_process()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["seconds"] = dict(self.took)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.took.update(getattr(node, "workeroutput", {}).get("seconds", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        options = self.config.option
        if options.keyword or options.file_or_dir or not options.markexpr.startswith("not gpu"):
            return  # of a part nothing can be said
        if getattr(options, "numprocesses", None):
            self.took[HANDED_OUT] = sum(os.times()[:2])
        if options.write_seconds:
            KEPT.write_text(written(self.took), encoding="utf-8")
        for line in summary(self.took, known()):
            terminalreporter.write_line(line)
