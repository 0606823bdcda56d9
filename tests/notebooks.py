"""A notebook as a session: its cells run from top to bottom in one namespace, in a folder of their own, in this process.

A cell shows what it prints, and then what its last line is worth: a table where there is one, a picture of a figure, a text.
`python tests/notebooks.py` writes what the cells of examples/notebooks show now, to be read before it is committed.
"""

from __future__ import annotations

import ast
import base64
import json
import sys
from contextlib import chdir, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DOTS = 80  # an inch


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what its cells show now. Raises: what a cell raises."""
    names: dict[str, Any] = {"__name__": "__notebook__"}
    cells, count = [], 0
    with TemporaryDirectory() as folder, chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell = {**cell, "execution_count": count, "outputs": _shown("".join(cell["source"]), names, count)}
            cells.append(cell)
    return {**notebook, "cells": cells}


def _shown(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree, said = ast.parse(source), StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(said):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if said.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": said.getvalue().splitlines(keepends=True)})
    if value is not None:
        outputs.append({"data": _data(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _data(value: Any) -> dict[str, Any]:
    if type(value).__name__ == "Figure":
        picture = BytesIO()
        value.savefig(picture, format="png", dpi=DOTS, metadata={"Software": None})
        return {"image/png": base64.b64encode(picture.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
    told = {"text/plain": repr(value).splitlines(keepends=True)}
    return {"text/html": value._repr_html_().splitlines(keepends=True), **told} if hasattr(value, "_repr_html_") else told


def written(notebook: dict[str, Any]) -> str:
    """As Jupyter writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in [FOLDER / name for name in sys.argv[1:]] or NOTEBOOKS:
        path.write_text(written(run(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
