"""The page of what ships, docs/methods.md, and its count in README.md: `python tests/methods_table.py` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from papers import SOURCES
from transformers import AutoModelForCausalLM
from zoo import SHIPPED

from surgery import plan
from surgery.language.library import read, shipped
from surgery.models.demo import demo_config
from surgery.peft.table.methods import METHODS
from surgery.planning.cost_estimates import Estimate
from surgery.planning.families import FAMILIES
from surgery.planning.formulas import formula_lines, formulas
from surgery.planning.shipped_specs import Entry, catalogue, entry_of

_STEP = re.compile(r" {3,}(pre|add|post) ")  # the note of a line that says what a step is
_MARKS = re.compile(r"[*_<`|\\]")  # what Markdown would read
WIDE = ("additive", "multiplicative")  # most specs are of one of these, and of another family
PAGE, README = (Path(__file__).parents[1] / name for name in ("docs/methods.md", "README.md"))
BENCH = PAGE.parent / "bench"
HEAD = """# The methods that ship

Each is a file of `specs/`, read by every command under its name. `surgery show NAME` prints the formula with every
parameter, `surgery specs --family FAMILY` lists a family; families are told from the formulas.

- The formula is that of the spec's first target, as `surgery show` prints it, without its parameters.
- Parameters, structured or dense, and the step are those of a linear layer [1024, 4096]; structured means that no step makes a
  matrix of the weight's size, and dense that each does. A step is what the cost model says of 1,024 tokens.
- *compared with*: the second writing of the formula in the tests, values and gradients in float64, beside the second reading of
  the language that every spec is compared with. `PEFT` is PEFT's own layer, `code` its authors' (or who else ran it) as it was
  read, written again with torch; what only an abstract or a summary says is named so.

Written by `python tests/methods_table.py`.
"""
COUNTED = """
{shipped} specs ship, and {said} more stand in `tests/methods` (at the end of this page).
Of the {classed} whose sizes a lone layer gives, {structured} run structured.
"""
UNSHIPPED = Path(__file__).parent / "methods"


NOT_SHIPPED = """## What does not ship

| method | why |
|---|---|
| LoCA ([arXiv 2502.06820](https://arxiv.org/abs/2502.06820)) | it moves the places of its frequencies during training, by finite differences of the loss; at places that stay it is `tests/methods/loca.surg` |
| LoSiA ([arXiv 2507.04487](https://arxiv.org/abs/2507.04487)), SMT ([arXiv 2405.15525](https://arxiv.org/abs/2405.15525)) | they choose what they train again during training; what is chosen once can be said (`tests/methods`) |
| AdaLoRA, DyLoRA, ReLoRA, GaLore | schedules and budgets over a training, which are no W' |
| mixtures of adapters, bottleneck adapters, prompts | what they do depends on the input beyond a product with W' |
| Quantum-PEFT ([arXiv 2503.05431](https://arxiv.org/abs/2503.05431)) | no code of its authors' was found to compare its gates with; from memory it is `tests/methods/quantum_pauli.surg`, with the exponential map `quantum_peft.surg` |
| SingLoRA ([arXiv 2507.05566](https://arxiv.org/abs/2507.05566)) | W' = W + s u A Aᵀ, where u grows from 0 with the steps of the training |
| PVeRA ([arXiv 2512.07703](https://arxiv.org/abs/2512.07703)), DenseLoRA ([arXiv 2505.23808](https://arxiv.org/abs/2505.23808)) | what is drawn, or passes a nonlinearity, is of the input |
| LoftQ, QLoRA-like starts at what rounding loses | there is no rounding in the language |
| LoLDU ([arXiv 2410.13618](https://arxiv.org/abs/2410.13618)) | it starts at the LDU factors of W, with pivots: `qr` and singular vectors are the decompositions that there are |
| Tied-LoRA ([arXiv 2311.09578](https://arxiv.org/abs/2311.09578)) | `tests/methods/tied_lora.surg` says it; no code of its authors' was found to compare it with |
| WeDoRA | neither a paper nor code of this name was found; DoRA with a magnitude for each column is `tests/methods/wedora.surg` |
"""


MEASURED = """## Estimated and measured

A step of `demo:llama-bench` (4 Llama layers, hidden 1024), as a multiple of the same model's with everything frozen: what `surgery
bench` measured ({machine}; medians of {rounds} rounds
± half the distance between their quartiles), and what the cost model says of the operated weights for as many tokens. Those with a star were measured while much else ran on the machine, in batches half as large:
their spread says how much they are worth. What is not in the table has not been measured.

| spec | measured | estimated | measured / estimated |
|---|---|---|---|"""


SAID = """## Said, and not shipped

Methods that a spec says, and that do not ship: they are variants of one that does, what their authors say of them is more than a
W' (a schedule, a router), or no code of theirs was found to compare with. Each file is in `tests/methods`.

| spec | of | lines | runs | a step, x the frozen layer's |
|---|---|---|---|---|"""
OF_A_MODEL = {"flora_tucker", "head_gain", "loha_tucker", "rank_by_layer"}  # of sizes that a lone layer has not


def page(entries: list[Entry], estimates: Mapping[str, float] = MappingProxyType({})) -> str:
    """The whole page: a section for each family, a block for each spec, in the section of its narrowest family; and
    what was measured, beside the `estimates` for the same model."""
    sections: dict[str, list[Entry]] = {name: [] for name in FAMILIES}
    for entry in entries:
        sections[next((name for name in entry.families if name not in WIDE), entry.families[0])].append(entry)
    lines = [HEAD]
    for name, members in sections.items():
        lines += [f"## {name.capitalize()}", "", f"{FAMILIES[name].means[0].upper()}{FAMILIES[name].means[1:]}.", ""]
        lines += [line for entry in members for line in _block(entry)]
    said = {path.stem: entry_of(path.stem, read(path)) for path in sorted(UNSHIPPED.glob("*.surg"))
            if path.stem not in OF_A_MODEL}
    classes = [_class(each) for each in (*entries, *said.values()) if each.parameters is not None]
    lines[0] += COUNTED.format(shipped=len(entries), said=len(said) + len(OF_A_MODEL), classed=len(classes),
                               structured=classes.count("structured"))
    return "\n".join([*lines, *_measured(estimates), "", *_said(said), "", NOT_SHIPPED])


def _said(entries: Mapping[str, Entry]) -> Iterator[str]:
    yield SAID
    for path in sorted(UNSHIPPED.glob("*.surg")):
        text = path.read_text(encoding="utf-8")
        about = _MARKS.sub(r"\\\g<0>", text.partition("\n")[0].removeprefix("# "))
        each = entries.get(path.stem)
        figures = f"{_class(each)} | {each.step_ratio:.2f}" if each else "by a model's own sizes | "
        yield f"| `{path.stem}` | {about} | {lines_of(text)} | {figures} |"


def measured() -> dict[str, dict[str, Any]]:
    """The rows of `surgery bench --json`, by spec, with the file (`where`) and the tokens of a step."""
    files = sorted(BENCH.rglob("*.json"), key=lambda file: file.parent != BENCH)
    told = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    rows = [{**row, "where": file, "tokens": prod(each["tokens"])} for file, each in told for row in each["rows"]]
    return {row["name"]: row for row in reversed(rows) if row["name"] in shipped()}


def _measured(estimates: Mapping[str, float]) -> Iterator[str]:
    about = json.loads((BENCH / "paper.json").read_text(encoding="utf-8"))
    yield MEASURED.format(machine=about["machine"], rounds=about["rounds"]["step"])
    for name, row in sorted(measured().items()):
        ratio, estimate = row["step_ratio"], estimates.get(name)
        beside = f"{estimate:.2f} | {ratio / estimate:.2f}" if estimate else " | "
        star = "" if row["where"].parent == BENCH else " *"
        yield f"| `{name}`{star} | {ratio:.2f} ± {row['step_ratio_spread']:.2f} | {beside} |"


def estimated(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the cost model says of each spec that was measured, of the model (whose weights are not needed) and the
    number of tokens that it was measured on."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(demo_config("llama-bench"))
    found = {}
    for name, row in rows.items():
        each = [Estimate(placed.compiled, row["tokens"]) for placed in plan(model, name).placed]
        if each:
            found[name] = sum(e.seconds() for e in each) / sum(e.frozen_seconds for e in each)
    return found


def _block(entry: Entry) -> Iterator[str]:
    """What the spec says of itself, its formula and what it costs, narrow enough for a phone."""
    text = shipped()[entry.name].read_text(encoding="utf-8")
    lines = lines_of(text)
    compared = _compared(entry.name)
    about = [", ".join(entry.families), f"{lines} lines", _paper(entry.paper), compared and f"compared with {compared}"]
    yield from (f"### {entry.name}", "", _MARKS.sub(r"\\\g<0>", entry.description), "")
    if equations := _equations(entry.name):
        yield from ("```text", *equations, "```", "")
    if entry.data:
        yield from (f"starts at what data gives ({' and '.join(entry.data)}): `surgery apply {entry.name} MODEL --data FILE`", "")
    if entry.parameters:
        yield from (f"{entry.parameters:,} parameters, {_class(entry)}, a step {entry.step_ratio:.2f} x the frozen layer's", "")
    yield from (" · ".join(filter(None, about)), "")


def _equations(name: str) -> list[str]:
    """W', b' where it changes, and what the steps are, of the first target."""
    targets = formulas(read(shipped()[name]))
    lines = formula_lines(*targets[0]) if targets else []
    steps = [line.strip().partition("   ")[0].strip() for line in lines if _STEP.search(line)]
    return [line for line in lines if not line.startswith(" ")] + steps


def lines_of(text: str) -> int:
    """Lines of a spec that say something: no comments, no blank ones."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


def counted(readme: str) -> str:
    """The README with how many methods ship, and in how many lines."""
    most = max(lines_of(Path(path).read_text(encoding="utf-8")) for path in shipped().values())
    return re.sub(r"the \d+ published methods and variants that ship, each at most \d+ lines",
                  f"the {len(shipped())} published methods and variants that ship, each at most {most} lines", readme)


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


def without_estimates(text: str) -> list[str]:
    """The page's lines, but for what the cost model says: that follows every change of a program."""
    return [line.partition(" parameters, ")[0] if " parameters, " in line else
            line.rsplit("|", 3)[0] if line.startswith("| `") and (" ± " in line or line.count("|") == 6) else line
            for line in text.splitlines() if not line.startswith("Of the ")]


if __name__ == "__main__":
    PAGE.write_text(page(catalogue(), estimated(measured())), encoding="utf-8")
    README.write_text(counted(README.read_text(encoding="utf-8")), encoding="utf-8")
