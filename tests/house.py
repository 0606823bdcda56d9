"""The shape of the code in figures: `python dev.py house` prints a table.

Counts, over `surgery/`: files and folders at the top, circles of imports between modules and between folders, private
helpers that are used once, the length of functions, comments, and what ruff and pyright say."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "surgery"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of each module."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in trees().items():
        yield from ((name, n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def used_once() -> list[str]:
    """Private functions and methods that their own module names once beside the definition."""
    words = {name: Counter(re.findall(r"\w+", path.read_text(encoding="utf-8"))) for name, path in FILES.items()}
    return [
        f"{module}.{f.name}"
        for module, f in functions()
        if f.name.startswith("_") and not f.name.startswith("__") and words[module][f.name] == 2
    ]


def rows(tree: ast.AST) -> set[str]:
    """The names that stand as values outside all functions: in a table of rules, mostly."""
    values, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        # what a call at the top of a module calls is no value: `_TABLE = _read()`
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            nodes += [*node.args, *(keyword.value for keyword in node.keywords)]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
            values |= {node.id} if isinstance(node, ast.Name) else set()
    return values


def imported(tree: ast.AST) -> set[str]:
    """The modules of the package that a tree imports when it runs, wherever in it."""
    found = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        # what a type checker alone reads imports nothing
        is_type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        nodes += [] if is_type_checking else ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in FILES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        stack = [start]
        while stack:
            for node in edges.get(stack.pop(), set()) - found:
                found.add(node)
                stack.append(node)
        return found

    reached = {node: reach(node) for node in edges}
    groups = {frozenset({n} | {m for m in reached[n] if n in reached.get(m, set())}) for n in edges}
    return [set(g) for g in groups if len(g) > 1]


def folder(module: str) -> str:
    """The part of the package that a module belongs to: its folder, or itself at the top."""
    return f"{module}.".split(".")[1]


def comments() -> float:
    """Comments (not rulers) per 100 lines that are not empty."""
    count = lines = 0
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        lines += sum(bool(line.strip()) for line in text.splitlines())
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            is_ruler = "----" in token.string
            count += token.type == tokenize.COMMENT and bool(re.search(r"\w", token.string)) and not is_ruler
    return 100 * count / lines


def findings(tool: str, *arguments: str) -> str:
    """How many findings a checker has; a word where it is not installed."""
    try:
        run = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True)
        found = json.loads(run.stdout)
    except (OSError, json.JSONDecodeError):
        return "not installed"
    return str(len(found) if isinstance(found, list) else found["summary"]["errorCount"])


def main() -> None:
    lengths = [f.end_lineno - f.lineno + 1 for _, f in functions()]
    modules = {name: imported(tree) - {name} for name, tree in trees().items()}
    folders: dict[str, set[str]] = {}
    for name, others in modules.items():
        folders.setdefault(folder(name), set()).update({folder(o) for o in others} - {folder(name)})
    # the package itself finds its public names when they are asked for, and everybody may read its version
    folders.pop("", None)
    once = used_once()
    values = {f"{module}.{name}" for module, tree in trees().items() for name in rows(tree)}
    called = [name for name in once if name not in values]
    top = [p for p in PACKAGE.iterdir() if p.suffix == ".py" and not p.name.startswith("__")]
    figures = {
        "files at the top": len(top),
        "folders at the top": len([p for p in PACKAGE.iterdir() if (p / "__init__.py").exists()]),
        "circles of modules": len(circles(modules)),
        "circles of folders": len(circles(folders)),
        "functions": len(lengths),
        "private helpers used once": f"{len(once)} ({100 * len(once) / len(lengths):.0f} %)",
        "of these, called (not rows of a table)": f"{len(called)} ({100 * len(called) / len(lengths):.0f} %)",
        "function length, median / 90 %": f"{median(lengths):.0f} / {quantiles(lengths, n=10)[-1]:.0f}",
        "functions over 40 lines": sum(n > 40 for n in lengths),
        "comments per 100 lines": f"{comments():.1f}",
        "ruff": findings("ruff", "check", "--output-format", "json", "."),
        "pyright": findings("pyright", "--outputjson", "surgery"),
    }
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    for group in (*circles(modules), *circles(folders)):
        print("circle:", ", ".join(sorted(group)))
    if "--once" in sys.argv:
        print(*(f"{name}{' (row)' * (name in values)}" for name in once), sep="\n")


if __name__ == "__main__":
    main()
