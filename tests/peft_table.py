"""Writes the tables of docs/peft.md, docs/speed.md and README.md: every figure is measured or counted here, or stands in
what `surgery bench --json` wrote into docs/bench. Run as `python tests/peft_table.py`."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
from methods_table import lines_of
from peft_cases import SINGLE, WRONG_IN_PEFT, cases
from peft_differences import DIFFERENCES
from peft_pair import compare, pair

from surgery.language.library import shipped
from surgery.peft.table.method import Family, Method
from surgery.peft.table.methods import METHODS, WITHOUT_ROW

ROOT = Path(__file__).parents[1]
README, PAGE, SPEED, BENCH = (ROOT / path for path in ("README.md", "docs/peft.md", "docs/speed.md", "docs/bench"))
PEERS = ("lora", "dora", "pissa", "oft", "hra", "loha", "c3a", "vera")
COSTS = ("step", "PEFT's", "memory", "PEFT's")
FILES = ("config", "layer", "model")
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_LAYERS = {"transposed linear": "Conv1D", "convolution": "conv", "trained": "a whole module", "turned experts": "experts"}


def spec_lines(method: Method) -> int:
    """The lines of the row's spec that say something."""
    return lines_of(method.spec if "\n" in method.spec else shipped()[method.spec].read_text(encoding="utf-8"))


def peft_lines(family: Family) -> int:
    """The lines of PEFT's configuration, layer and model that hold code: no comment, no text of documentation."""
    folder = peft.PEFT_TYPE_TO_TUNER_MAPPING[family.peft_type].__module__.rpartition(".")[0]
    files = (Path(import_module(f"{folder}.{name}").__file__) for name in FILES)
    return sum(_code_lines(file.read_text(encoding="utf-8")) for file in files)


def _code_lines(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for t in tokens if t.type not in _SILENT for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - set(_documentation(text)))


def _documentation(text: str) -> Iterable[int]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def errors() -> dict[str, float]:
    """The largest relative difference between PEFT's layer and ours, of the outputs and the gradients, by row."""
    found: dict[str, float] = {}
    for method, layer, config in cases():
        error = compare(pair(method, layer, config)).without(WRONG_IN_PEFT.get(method.name, ())).error
        found[method.name] = max(found.get(method.name, 0.0), error)
    return found


def methods(measured: dict[str, float]) -> list[str]:
    rows = [[method.name, f"`{method.spec}`" if method.spec in shipped() else "", f"`{method.family.config_class}`",
             ", ".join(dict.fromkeys(_LAYERS.get(layout, layout) for layout in method.tensors)), spec_lines(method),
             peft_lines(method.family), _error(measured, method.name)] for method in METHODS]
    return _table(["method", "spec", "PEFT's", "layers", "lines here", "lines in PEFT", "largest difference"], rows)


def _error(measured: dict[str, float], name: str) -> str:
    return f"{measured[name]:.0e}{' *' * (name in SINGLE)}" if name in measured else "0: the same parameters"


def costs() -> list[str]:
    """What a step costs, of each spec that was measured."""
    rows = [[f"`{name}`", *_costs(row)] for name, row in sorted(_measured().items()) if name in shipped()]
    return _table(["spec", *COSTS], rows)


def peers(measured: dict[str, float]) -> list[str]:
    """The few of them that a newcomer looks for first."""
    of = {method.name: method for method in METHODS}
    rows = [[f"`{name}`", spec_lines(of[name]), peft_lines(of[name].family), _error(measured, name),
             *_costs(_measured()[name])] for name in PEERS]
    return _table(["spec", "lines", "in PEFT", "largest difference", *COSTS], rows)


def _measured() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for file in sorted(BENCH.glob("*.json"))
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def _costs(row: dict[str, Any]) -> list[str]:
    """The ratio of a step's time to the frozen model's with its spread, and the memory of a step in MiB, ours and
    PEFT's."""
    ratios = [(row.get(f"{who}step_ratio"), row.get(f"{who}step_ratio_spread")) for who in ("", "peft_")]
    sizes = [row.get(f"{who}peak_bytes") for who in ("", "peft_")]
    return [*(f"{r:.2f} ± {spread:.2f}" if r else "" for r, spread in ratios), *(size and f"{size / 2**20:.0f}" or "" for size in sizes)]


def differences() -> list[str]:
    rows = [[d.method, d.what, d.of, f"{d.measure():.2g}"] for d in DIFFERENCES]
    return _table(["method", "what PEFT does", "how far off", "size"], rows)


def without_row() -> list[str]:
    return _table(["PEFT's type", "why it has no row"], [[f"`{name}`", why] for name, why in WITHOUT_ROW.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |".replace("  ", " ") for line in lines]


def _written(page: Path, tables: dict[str, list[str]]) -> None:
    """Put each table between its two marks."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        block = "\n".join([f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"])
        text = re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda found: block, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def main() -> None:
    warnings.simplefilter("ignore")
    measured = errors()
    _written(PAGE, {"methods": methods(measured), "differences": differences(), "without a row": without_row()})
    _written(SPEED, {"costs": costs()})
    _written(README, {"peers": peers(measured)})


if __name__ == "__main__":
    main()
