"""What all tests share: no network, one thread each since two workers run side by side, and a terminal of one width."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cpu_seconds import Seconds
from each import SWEEP, is_its_turn
from workers import is_daily, is_fast, is_left_out, is_of_zoo, piece

pytest.register_assert_rewrite("formatting", "interrupted")

WHOLE = "SURGERY_WHOLE_SUITE"  # set where nobody has named a part of it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help="write tests/cpu_seconds.txt anew, after a whole run")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seconds(config))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ["SURGERY_CACHE"] = os.devnull  # whoever has measured their machine tests the same programs
    if config.getoption("markexpr") == "sweep":
        os.environ[SWEEP] = "1"
    is_worker = hasattr(config, "workerinput")  # it is given its arguments, whoever named them
    if not is_worker and config.args_source is pytest.Config.ArgsSource.TESTPATHS and SWEEP not in os.environ:
        os.environ[WHOLE] = "1"
    if getattr(config.option, "numprocesses", None) and not is_worker:
        return  # it hands out the tests and runs none
    gc.disable()  # until all is imported: nearly all of it stays, and to look through it again and again takes long
    import torch

    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file of which nothing is asked for is not even imported."""
    return is_left_out(collection_path.name, config.getoption("markexpr")) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of what takes turns, the whole suite tries a part. The pieces of the zoo come last: they are short, so that at the
    end no worker waits long for the other. All tests of a case stand together, for which they share what they operate
    on."""
    waiting = []
    for item in items:
        if turns := item.get_closest_marker("in_turns"):
            item.add_marker("sweep")
            if WHOLE in os.environ and not is_daily(item.nodeid) and not is_its_turn(item.nodeid, *turns.args):
                waiting.append(item)
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        out = {*waiting}
        items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: (is_of_zoo(item.nodeid), is_of_zoo(item.nodeid) and piece(item.nodeid)))
    for item in items:
        if is_fast(item.nodeid):
            item.add_marker("fast")


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: no collection of garbage need look at it again."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 10)  # most of what a compiler makes stays or goes at once
    if "accelerate.utils.memory" in sys.modules:  # the Trainer collects all of it before and after each run
        from accelerate.utils import memory

        memory.clear_device_cache = lambda garbage_collection=False: None  # type: ignore[assignment]  (a CPU has no cache)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """The process is about to end: pytest need not look, again and again, for what could be let go of. (Python does at
    the very end, else Triton complains of what has stayed.)"""
    gc.freeze()
    atexit.register(gc.unfreeze)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A worker tells the process that hands out tests what that has a use for: nothing of a test that begins, or of
    what goes well before and after one. A third of that process's time went by taking note of it."""
    of_worker = (p for p in session.config.pluginmanager.get_plugins() if type(p).__name__ == "WorkerInteractor")
    for worker in of_worker:
        def send(name: str, send: Any = worker.sendevent, **about: Any) -> None:
            of_report = about.get("data", {})
            is_around = name == "testreport" and of_report["when"] != "call" and of_report["outcome"] == "passed"
            if name != "logstart" and not is_around:
                send(name, **about)

        worker.sendevent = send


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Numbered(list):
        """The names of all tests; where one stands is looked up, and not searched for each time one is handed out."""

        def __init__(self, names: Sequence[str]):
            super().__init__(names)
            self.index = {name: i for i, name in enumerate(names)}.__getitem__

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return piece(nodeid)

        def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
            super().add_node_collection(node, collection)
            if node in self.registered_collections:
                self.registered_collections[node] = Numbered(collection)

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            """A piece that is done is let go of: what is left is counted anew for each test."""
            work, scope = self.assigned_work[node], piece(self.registered_collections[node][item_index])
            super().mark_test_complete(node, item_index, duration)
            if scope in work and all(work[scope].values()):
                del work[scope]

    config.option.loadscopereorder = False  # in the order in which they are collected
    return Pieces(config, log)


@pytest.fixture(scope="session", autouse=True)
def _width() -> Iterator[None]:
    """What a command shows is as wide as COLUMNS says. (Set while tests run and not before: what pytest itself shows is
    as wide as the terminal.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="session", autouse=True)
def _seeds() -> Iterator[None]:
    """Where there is no GPU a seed is for the CPU alone. (torch notes the whole stack of calls for each kind of device
    that may still be found, which takes longer than many a test.)"""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _proven() -> Iterator[None]:
    """Every program and every step that a test runs is proven to compute its expressions; of equal ones, the first."""
    from surgery.codegen import autograd_node, program
    from surgery.codegen.validate import program_faults, step_faults

    write_program, write_step = program.program_text, autograd_node.step_text
    of_program, of_step = cache(program_faults), cache(step_faults)

    def proven_program(plan: Any, **settings: Any) -> str:
        source = write_program(plan, **settings)
        assert of_program(source, tuple(plan.outputs), plan.is_called) == [], source
        return source

    def proven_step(*of: Any) -> Any:
        text = write_step(*of)
        assert text is None or of_step(
            text.source, text.body, tuple(text.gradients), tuple(text.forwarded)) == [], text.source
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "program_text", proven_program)
        patch.setattr(autograd_node, "step_text", proven_step)
        yield
