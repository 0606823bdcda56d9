"""The page of what ships, docs/methods.md: `python tests/methods_table.py` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from papers import SOURCES
from zoo import SHIPPED

from surgery.language.library import read, shipped
from surgery.peft.table.methods import METHODS
from surgery.planning.families import FAMILIES
from surgery.planning.formulas import formula_lines, formulas
from surgery.planning.shipped_specs import Entry, catalogue

_STEP = re.compile(r" {3,}(pre|add|post) ")  # the note of a line that says what a step is
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# The methods that ship

Each is a spec of [specs](../specs), read by every command under its name. `surgery show NAME` prints the formula with every
parameter, `surgery specs --family FAMILY` lists a family; families are told from the formulas.

- *formula*: of the spec's first target, as `surgery show` prints it, without its parameters.
- *trains*, *class*, *step*: on a linear layer [1024, 4096]; structured means that no step makes a matrix of the weight's size, and
  dense that each does. A step is what the cost model says of 1,024 tokens, as a multiple of the frozen layer's.
- *compared with*: the second writing of the formula in the tests, values and gradients in float64, beside the second reading of
  the language that every spec is compared with. `PEFT` is PEFT's own layer, `code` its authors' (or who else ran it) as it was
  read, written again with torch; what only an abstract or a summary says is named so.

Written by `python tests/methods_table.py`.
"""


def page(entries: list[Entry]) -> str:
    """The whole page."""
    rows = [*_rows(entries)]
    families = [f"| {name} | {family.means} |" for name, family in FAMILIES.items()]
    return "\n".join([HEAD, "| family | of it |", "| --- | --- |", *families, "",
                      "| spec | formula | trains | lines | class | step | families | paper | compared with |",
                      "|" + " --- |" * 9, *rows, ""])


def _rows(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        text = shipped()[entry.name].read_text(encoding="utf-8")
        lines = sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())
        formula = "; ".join(_equations(entry.name)).replace("|", "\\|")
        cells = (f"`{entry.name}`", formula and f"`{formula}`", f"{entry.parameters:,}" if entry.parameters else "",
                 lines, _class(entry), f"{entry.step_ratio:.2f}" if entry.step_ratio else "",
                 ", ".join(entry.families), _paper(entry.paper), _compared(entry.name))
        yield f"| {' | '.join(map(str, cells))} |".replace("  ", " ")


def _equations(name: str) -> list[str]:
    """W', b' where it changes, and what the steps are, of the first target."""
    targets = formulas(read(shipped()[name]))
    lines = formula_lines(*targets[0]) if targets else []
    steps = [line.strip().partition("   ")[0].strip() for line in lines if _STEP.search(line)]
    return [line for line in lines if not line.startswith(" ")] + steps


def _class(entry: Entry) -> str:
    if entry.parameters is None:
        return ""
    return "dense" if entry.program in ("dense", "built weight") else "structured"


def _paper(number: str | None) -> str:
    return f"[{number}](https://arxiv.org/abs/{number.split()[1]})" if number else ""


def _compared(name: str) -> str:
    """What the tests have of a method beside the second reading of the language."""
    found = ["PEFT"] if any(method.spec == name for method in METHODS) else []
    found += [SOURCES[name]] if name in SOURCES else []
    return "; ".join(found) or ("the paper's equation" if any(case.name == name for case in SHIPPED) else "")


def without_estimates(text: str) -> list[list[str]]:
    """The page's cells, but for what the cost model says: that follows every change of a program."""
    return [[cell for i, cell in enumerate(line.split(" | ")) if i not in (4, 5)] if line.startswith("| `") else [line]
            for line in text.splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(catalogue()), encoding="utf-8")
