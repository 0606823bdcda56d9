"""Mistakes put into the heart of the package, one at a time, and whether the tests see them: by hand, not in CI.

    python dev.py mutate [--count 44] [--only 8 26] [--seed 0] [--seconds 60] [--tests PATH ...] [MODULE or folder ...]

A mistake is one change of a module's syntax tree (a sign, a factor, a comparison, a condition, a constant, the order of
arguments, a statement left out), drawn by seed from all that there are, so that nothing here names a line that moves.
First each file of tests runs in a process of its own, which notes the tests that reach each mistake. Then each mistake is
made in a copy of the project, and the tests that reach it run until one fails, the quickest first; after them the others
of their files, which may use what an earlier test has kept. Their time and their memory are bounded: what makes them
endless or makes a tensor of everything is seen too. What survives is printed: a mistake that changes no result (a
cheaper form is missed, a bound is wider) may, any other asks for a test. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEART = ("surgery/rewrite", "surgery/codegen", "surgery/runtime/adapter.py", "surgery/runtime/operated.py",
         "surgery/runtime/merge.py", "surgery/runtime/attach.py", "surgery/runtime/save.py",
         "surgery/runtime/frozen_layers.py", "surgery/planning/initial_values.py", "surgery/semantics/elaborate.py",
         "surgery/ir/primitives.py", "surgery/ir/orthogonal_maps.py", "surgery/ir/dense.py")
# All of them say what a number must be.
TESTS = ("tests/test_corners.py", "tests/rewrite/test_*.py", "tests/ir/test_*.py", "tests/codegen/test_*.py",
         "tests/semantics/test_*.py", "tests/planning/test_starts.py", *(f"tests/runtime/test_{name}.py" for name in (
             "store", "zero_rows", "zoo*", "called", "routed_experts", "effective", "grouped")))
COUNTED = {"cost_model", "operation_counts"}  # modules whose figures choose between programs that give the same
ON_A_GPU = {"kernels_triton"}  # what no test runs where there is none
PATIENCE = 4  # times what the tests take of a processor without a mistake
START = 60  # seconds of a processor before the first test begins
MEMORY = 8 * 2**30  # bytes of a process; without a mistake the tests take a quarter of it

SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
FLIPPED = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
EDGES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mistake:
    """A text to stand in the place of another, between two offsets of a file's bytes."""

    path: Path
    line: int
    begin: int
    end: int
    text: str
    what: str

    def lines(self, source: bytes) -> range:
        return range(self.line, source.count(b"\n", 0, self.end) + 2)

    def put_in(self, source: bytes) -> bytes:
        return source[:self.begin] + self.text.encode() + source[self.end:]

    def shown(self, source: bytes) -> str:
        old = " ".join(source[self.begin:self.end].decode().split())
        return f"{self.path}:{self.line}: {self.what}: `{old}` -> `{' '.join(self.text.split())}`"


def mistakes(path: Path) -> Iterator[Mistake]:
    """All the mistakes that can be made in a module."""
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _meaningful(ast.parse(source)):
        for what, text in _changes(node):
            begin, end = (starts[line - 1] + column for line, column in (
                (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
            yield Mistake(path, node.lineno, begin, end, text, what)


def _meaningful(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that say what is computed: no annotations, messages, imports."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arguments)):
            continue
        if isinstance(child, ast.AnnAssign):
            if child.value is not None:
                yield from _meaningful(ast.Expression(child.value))
            continue
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield from _meaningful(ast.Module(child.body, []))
            continue
        yield child
        yield from _meaningful(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Each other text of a node, with what it is called."""
    if isinstance(node, ast.BinOp) and not _is_type(node):
        if type(node.op) in SIGNS:
            yield "another operator", _text(ast.BinOp(node.left, SIGNS[type(node.op)](), node.right))
        if isinstance(node.op, (ast.Mult, ast.MatMult)):
            yield "a factor forgotten", _text(node.right)
            yield "a factor forgotten", _text(node.left)
        if isinstance(node.op, (ast.MatMult, ast.Sub, ast.Div)):
            yield "sides swapped", _text(ast.BinOp(node.right, node.op, node.left))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for table, what in ((FLIPPED, "a comparison flipped"), (EDGES, "an edge moved")):
            if type(node.ops[0]) in table:
                yield what, _text(ast.Compare(node.left, [table[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "a sign or a not forgotten", _text(node.operand)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and for or", _text(ast.BoolOp(other, node.values))
        rest = node.values[1:]
        yield "a condition forgotten", _text(ast.BoolOp(node.op, rest) if rest[1:] else rest[0])
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        value = node.value
        yield "another constant", repr(not value if isinstance(value, bool) else value + 1)
    elif isinstance(node, ast.IfExp):
        yield "one branch always", _text(node.body)
        yield "the other branch always", _text(node.orelse)
    elif isinstance(node, ast.Call):
        named = bool(node.args) and isinstance(node.args[0], ast.Constant)  # `make("matmul", a, b)`
        first, pair = node.args[:named], node.args[named:named + 2]
        if len(pair) > 1 and not any(isinstance(a, ast.Starred) for a in pair):
            yield "arguments swapped", _text(ast.Call(node.func, [*first, *pair[::-1], *node.args[named + 2:]],
                                                      node.keywords))
        for i in range(len(node.keywords)):
            yield "an argument forgotten", _text(ast.Call(node.func, node.args,
                                                          node.keywords[:i] + node.keywords[i + 1:]))
    elif isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "a statement forgotten", "pass"
    elif isinstance(node, ast.Starred) and isinstance(node.value, ast.Call) and node.value.args:
        yield "a part forgotten", "*()"


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


def _is_type(node: ast.BinOp) -> bool:
    """Whether it can be a text or a tuple of texts, which no operator but + joins."""
    return any(isinstance(side, (ast.JoinedStr, ast.Tuple, ast.List, ast.Dict))
               or isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right))


def drawn(known: list[Mistake], seed: int) -> list[Mistake]:
    """The mistakes in an order drawn by seed, each kind as often as the others while it lasts."""
    draw, kinds = random.Random(seed), {}
    for mistake in known:
        kinds.setdefault(mistake.what, []).append(mistake)
    rounds = zip_longest(*(draw.sample(of_kind, len(of_kind)) for of_kind in kinds.values()))
    return [mistake for each in rounds for mistake in each if mistake is not None]


# ----------------------------------------------------------------------------------------------------- tests and mistakes


class Watch:
    """A plugin of pytest that notes which of the `wanted` lines of modules each test reaches (what importing reaches: the
    test ""), how long each takes, and what else is imported."""

    def __init__(self, wanted: dict[str, set[int]]):
        self.wanted, self.test = wanted, ""
        self.reached: dict[str, set[tuple[str, int]]] = {"": set()}
        self.seconds: dict[str, float] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        lines = self.wanted.get(frame.f_code.co_filename)
        return self.note if lines and not lines.isdisjoint(lines_of(frame.f_code)) else None

    def note(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_lineno in self.wanted[frame.f_code.co_filename]:
            self.reached[self.test].add((frame.f_code.co_filename, frame.f_lineno))
        return self.note

    def pytest_sessionstart(self) -> None:
        sys.settrace(self.trace)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid
        self.reached[nodeid] = set()
        sys.settrace(self.trace), threading.settrace(self.trace)  # anew, for a test may have set another

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def answer(self) -> dict[str, Any]:
        sys.settrace(None), threading.settrace(None)
        imported = [name for name, m in sys.modules.items() if "site-packages" in (getattr(m, "__file__", None) or "")]
        reached = {test: [(os.path.relpath(path), line) for path, line in sorted(lines)]
                   for test, lines in self.reached.items() if lines}
        return {"reached": reached, "seconds": self.seconds, "imported": imported}


class Order:
    """A plugin of pytest that runs some of the tests that are collected, in this order, and begins none after so many
    seconds of a processor."""

    def __init__(self, tests: list[str], seconds: float):
        self.place, self.seconds = {test: i for i, test in enumerate(tests)}, seconds
        self.failed, self.is_open = "", False

    def pytest_collection_finish(self, session: Any) -> None:
        chosen = [item for item in session.items if item.nodeid in self.place]
        session.items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed and report.nodeid

    def pytest_runtest_protocol(self, item: Any) -> None:
        if time.process_time() > self.seconds:
            self.is_open, item.session.shouldstop = True, "no more time"

    def answer(self) -> tuple[str, bool]:
        return self.failed, self.is_open


def apart(copy: Path, tests: list[str], plugin: Watch | Order, most: float = 3600) -> tuple[int | None, Any, float]:
    """Run files of tests in a copy of the project and in a process of its own, which ends after `most` seconds of a
    processor: pytest's code (None where it was ended), the plugin's answer, and the seconds that it took."""
    log, answer = copy.with_name("log"), copy.with_name("answer")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        sys.dont_write_bytecode = True  # of a mistake nothing stays
        bound_memory(MEMORY)
        bound_time(most)
        import pytest

        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[plugin]))
        answer.write_text(json.dumps((code, plugin.answer())))
        os._exit(0)
    usage = os.wait4(child, 0)[2]
    code, said = json.loads(answer.read_text()) if answer.exists() else (None, None)
    return code, said, usage.ru_utime + usage.ru_stime


def bound_memory(most: int) -> None:
    """From now on this process is refused more memory of its own than that (what files are mapped to does not count)."""
    import resource  # of the systems that can fork

    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def bound_time(most: float) -> None:
    """This process ends when it has had a processor for so long, or waits for itself."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (int(most), int(most)))
    signal.alarm(int(20 * most))


def lines_of(code: CodeType) -> frozenset[int]:
    """The lines of a code object that can be run, without those of the functions in it."""
    if code not in _LINES:
        _LINES[code] = frozenset(line for _, _, line in code.co_lines() if line)
    return _LINES[code]


_LINES: dict[CodeType, frozenset[int]] = {}


def studied(copy: Path, tests: list[str], chosen: list[Mistake]) -> dict[str, Any]:
    """What each file of tests says under `Watch`; kept until a module or a test changes. Raises: SystemExit where a test
    fails."""
    texts = b"".join(path.read_bytes() for folder in ("surgery", "tests") for path in sorted((copy / folder).rglob("*.py")))
    known = Path(tempfile.gettempdir()) / f"surgery-mutate-{sha256(texts + repr((tests, chosen)).encode()).hexdigest()[:16]}.json"
    if known.exists():
        study = json.loads(known.read_text())
        for found in study.values():
            share_imports(found)
        return study
    wanted: dict[str, set[int]] = {}
    for mistake in chosen:
        wanted.setdefault(str(copy / mistake.path), set()).update(mistake.lines((copy / mistake.path).read_bytes()))
    study = {}
    for file in tests:
        code, study[file], seconds = apart(copy, [file], Watch(wanted))
        if code not in (0, 5):
            raise SystemExit(f"{copy.with_name('log').read_text()[-3000:]}\n{file} fails without a mistake")
        study[file]["took"] = seconds
        share_imports(study[file])
        print(f"{seconds:6.1f} s {len(study[file]['seconds']):5} tests in {file}", flush=True)
    known.write_text(json.dumps(study))
    return study


def share_imports(found: dict[str, Any]) -> None:
    """Import here, and once, what all runs import of other packages."""
    for name in found["imported"]:
        with suppress(Exception):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()


def order_for(mistake: Mistake, copy: Path, study: dict[str, Any]) -> list[str]:
    """The tests that may see a mistake: of those that reach it one case of each, the quickest first, then another; then
    the others of their files, which may use what one of them has kept, or all where it is reached by importing."""
    path, source = str(mistake.path), (copy / mistake.path).read_bytes()
    lines, seconds, direct, files = mistake.lines(source), {}, set(), set()
    has_code = not compiled_lines(compile(source, path, "exec")).isdisjoint(lines)  # a constant may stand in no line
    for file, found in study.items():
        seconds |= found["seconds"]
        at = {test for test, reached in found["reached"].items() if any(p == path and n in lines for p, n in reached)}
        direct |= at - {""}
        if at or not has_code:
            files.add(file)
    cases: dict[str, list[str]] = {}
    for test in sorted(direct, key=seconds.__getitem__):
        cases.setdefault(test.partition("[")[0], []).append(test)
    quick = [test for each in zip_longest(*cases.values()) for test in each if test is not None]
    others = [test for file in sorted(files, key=lambda file: study[file]["took"]) for test in study[file]["seconds"]]
    return [*quick, *(test for test in others if test not in direct)]


def compiled_lines(code: CodeType) -> set[int]:
    """The lines of a module that can be run."""
    return set(lines_of(code)).union(*(compiled_lines(c) for c in code.co_consts if isinstance(c, CodeType)))


def verdict(mistake: Mistake, copy: Path, study: dict[str, Any], seconds: float) -> tuple[str, str]:
    """Whether a mistake is seen, and by what; OPEN where its tests take longer than that."""
    order = order_for(mistake, copy, study)
    if mistake.path.stem in ON_A_GPU:
        return "a GPU's", ""
    if not order:
        return "SURVIVED", "no test, for none reaches it"
    files = list(dict.fromkeys(test.partition("::")[0] for test in order))
    most = START + PATIENCE * sum(study[file]["took"] for file in files)
    source = (copy / mistake.path).read_bytes()
    (copy / mistake.path).write_bytes(mistake.put_in(source))
    try:
        code, said, _ = apart(copy, files, Order(order, seconds), most)
    finally:
        (copy / mistake.path).write_bytes(source)
    if code is None:
        return "seen", "the bound on time"
    failed, is_open = said
    if failed or code and not is_open:
        return "seen", failed or "what collects the tests"
    return "OPEN" if is_open else "SURVIVED", ""


def main() -> int:
    say = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    say.add_argument("paths", nargs="*", default=HEART, metavar="MODULE")
    say.add_argument("--count", type=int, default=44)
    say.add_argument("--only", type=int, nargs="+", help="those of these numbers")
    say.add_argument("--seed", type=int, default=0)
    say.add_argument("--seconds", type=float, default=float("inf"), help="of a processor for the tests of a mistake")
    say.add_argument("--tests", nargs="+", default=TESTS)
    given = say.parse_args()
    if not hasattr(os, "fork"):
        return print("a system that can fork is needed", file=sys.stderr) or 2
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    files = [f for p in given.paths for f in (sorted((ROOT / p).rglob("*.py")) if (ROOT / p).is_dir() else [ROOT / p])]
    known = [m for file in files if file.stem not in COUNTED for m in mistakes(file.relative_to(ROOT))]
    chosen = drawn(known, given.seed)[:given.count]
    print(f"{len(known)} mistakes can be made in {len(files)} modules; of {len(chosen)}:", flush=True)
    outcome: dict[str, list[str]] = {"seen": [], "OPEN": [], "SURVIVED": [], "a GPU's": []}
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "*.egg-info"))
        tests = sorted({str(path.relative_to(copy)) for of in given.tests for path in copy.glob(of)})
        study = studied(copy, tests, chosen)
        for number in given.only or range(len(chosen)):
            mistake, begin = chosen[number], time.monotonic()
            kind, by = verdict(mistake, copy, study, given.seconds)
            outcome[kind].append(f"{number:2} {kind:8} {mistake.shown((copy / mistake.path).read_bytes())}")
            print(f"{outcome[kind][-1]}{by and f'  by {by}'} ({time.monotonic() - begin:.0f} s)", flush=True)
    tried = sum(len(outcome[kind]) for kind in ("seen", "SURVIVED", "OPEN"))
    print(f"{len(outcome['seen'])} of {tried} seen ({len(outcome['seen']) / max(tried, 1):.0%})")
    print(*outcome["SURVIVED"], *outcome["OPEN"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
