"""The notebooks of examples/ run from top to bottom, and show what they showed when they were committed."""

import json
from pathlib import Path

import pytest
from notebooks import NOTEBOOKS, run, written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert written(notebook) == text
    assert _kinds(run(notebook)) == _kinds(notebook)  # another machine rounds otherwise: what must hold, cells assert


def _kinds(notebook: dict) -> list[list[list[str]]]:
    """For each cell, how it ran and what kinds of things it shows."""
    return [[[cell["cell_type"], str(cell.get("execution_count"))], *([output["output_type"], *sorted(output.get("data", ()))]
            for output in cell.get("outputs", ()))] for cell in notebook["cells"]]


def test_a_cell_that_fails_or_shows_something_else_is_seen() -> None:
    def cell(source: str) -> dict:
        return {"cell_type": "code", "source": [source], "outputs": []}

    with pytest.raises(ZeroDivisionError):
        run({"cells": [cell("1 / 0")]})
    ran = run({"cells": [cell("a = 2\nprint(a)"), cell("a + 1"), {"cell_type": "markdown", "source": ["text"]}]})
    assert ran["cells"][0]["outputs"][0]["text"] == ["2\n"]
    assert ran["cells"][1]["outputs"][0]["data"] == {"text/plain": ["3"]} and ran["cells"][1]["execution_count"] == 2
