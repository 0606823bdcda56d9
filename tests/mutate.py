"""Mistakes put into the heart of the package, one at a time, and whether the tests see them: by hand, not in CI.

    python dev.py mutate [--count 44] [--from 0] [--seed 0] [--seconds 1500] [--tests PATH ...] [MODULE or folder ...]

A mistake is one change of a module's syntax tree (a sign, a factor, a comparison, a condition, a constant, the order of
arguments, a statement left out), drawn by seed from all that there are, so that nothing here names a line that moves.
Each is made in a copy of the project; the tests run until one fails, with a bound on their time and on their memory: what
makes them endless or makes a tensor of everything is seen too. `--from` goes on where an earlier run of the same seed
stopped. What survives is printed: a mistake that changes
no result (a cheaper form is missed, a bound is wider) may, any other asks for a test. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEART = ("surgery/rewrite", "surgery/codegen", "surgery/runtime/adapter.py", "surgery/runtime/operated.py",
         "surgery/runtime/merge.py", "surgery/runtime/attach.py", "surgery/runtime/save.py",
         "surgery/runtime/frozen_layers.py", "surgery/planning/initial_values.py", "surgery/semantics/elaborate.py",
         "surgery/ir/primitives.py", "surgery/ir/orthogonal_maps.py", "surgery/ir/dense.py")
# The quickest to fail first; all of them say what a number must be.
TESTS = ("test_reference.py", "test_rules.py", "test_corners.py", "test_step.py", "test_activate.py", "test_verify.py",
         "test_solves.py", "test_store.py", "test_zero_rows.py", "test_zoo.py", "test_zoo_lifecycle.py",
         "test_called.py", "test_invented.py", "test_zoo_dropout.py", "test_random_specs.py", "test_starts.py",
         "test_matrix_free.py", "test_zoo_dtypes.py", "test_routed_experts.py", "test_effective.py", "test_grouped.py")
COUNTED = {"cost_model", "operation_counts"}  # modules whose figures choose between programs that give the same
PATIENCE = 4  # times what the tests take without a mistake
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


# ------------------------------------------------------------------------------------------------------------- the run


def is_seen(copy: Path, tests: list[str], log: Path, most: float = float("inf")) -> bool:
    """Whether the tests in a copy of the project fail, or do not end in `most` seconds. What all runs share is imported
    once, here."""
    child = os.fork()
    if not child:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        bound_memory(MEMORY)
        import pytest

        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])) != 0)
    end = time.monotonic() + most
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def bound_memory(most: int) -> None:
    """From now on this process is refused more memory of its own than that (what files are mapped to does not count)."""
    import resource  # of the systems that can fork

    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main() -> int:
    say = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    say.add_argument("paths", nargs="*", default=HEART, metavar="MODULE")
    say.add_argument("--count", type=int, default=44)
    say.add_argument("--from", type=int, default=0, dest="first", help="leave out so many of the first ones")
    say.add_argument("--seed", type=int, default=0)
    say.add_argument("--seconds", type=float, default=float("inf"), help="begin no new mistake after so many")
    say.add_argument("--tests", nargs="+", default=[f"{path.relative_to(ROOT)}" for name in TESTS
                                                  for path in (ROOT / "tests").rglob(name)])
    given = say.parse_args()
    if not hasattr(os, "fork"):
        return print("a system that can fork is needed", file=sys.stderr) or 2
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    import hypothesis  # noqa: E401, F401
    import torch
    torch.set_num_threads(1)

    files = [f for p in given.paths for f in (sorted((ROOT / p).rglob("*.py")) if (ROOT / p).is_dir() else [ROOT / p])]
    known = [m for file in files if file.stem not in COUNTED for m in mistakes(file.relative_to(ROOT))]
    chosen = drawn(known, given.seed)[given.first:given.count]
    print(f"{len(known)} mistakes can be made in {len(files)} modules; {len(chosen)} are tried", flush=True)
    begin, survivors, tried = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "*.egg-info"))
        tests = [t for t in given.tests if (copy / t.partition("::")[0]).exists()]
        begin = time.monotonic()
        if is_seen(copy, tests, Path(folder) / "log"):
            print((Path(folder) / "log").read_text()[-3000:])
            return print("the tests fail without a mistake", file=sys.stderr) or 2
        most = PATIENCE * (time.monotonic() - begin)
        for mistake in chosen:
            if time.monotonic() - begin > given.seconds:
                break
            source = (ROOT / mistake.path).read_bytes()
            (copy / mistake.path).write_bytes(mistake.put_in(source))
            seen = is_seen(copy, tests, Path(folder) / "log", most)
            (copy / mistake.path).write_bytes(source)
            tried += 1
            survivors += [] if seen else [mistake.shown(source)]
            print(f"{'seen    ' if seen else 'SURVIVED'} {mistake.shown(source)}", flush=True)
    print(f"{tried - len(survivors)} of {tried} seen ({(tried - len(survivors)) / max(tried, 1):.0%})")
    print(*survivors, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
