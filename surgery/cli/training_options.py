"""What `train`, `compare` and `eval` share: data files and how their items are read, how to train; settings from a
file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

COUNT = click.IntRange(1)
ABOVE_ZERO = click.FloatRange(0, min_open=True)
KINDS = click.Choice(["classification", "regression", "choice", "chat", "answer", "language"])
READ = (
    click.option("--task", "kind", type=KINDS, help="The kind of task, where the columns do not tell."),
    click.option("--label", metavar="COLUMN", help="The column of labels, where there are several."),
    click.option("--threshold", type=float, help="Make two classes of numbers: above this, or not."),
)
ASKED = (
    click.option("--length", type=COUNT, help="Tokens kept of an item.  [default: 512]"),
    click.option("--prompt", metavar="TEXT", help="What stands before a choice, with {question} in it."),
    click.option("--tokens", type=COUNT, help="Tokens of an answer that is written.  [default: 256]"),
)




class Rate(click.ParamType):
    """`B=1e-3`: the learning rate of a parameter of the spec."""

    name = "NAME=NUMBER"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        name, _, number = value.partition("=") if isinstance(value, str) else ("", "", "")
        try:
            return name.strip(), float(number)
        except ValueError:
            self.fail(f"{value} is not of the form B=1e-3", param, ctx)


_NOT_NEGATIVE = click.FloatRange(0)
DATA = (
    click.option("--data", required=True, metavar="FILE",
                 help="Learn from this: TSV, CSV, JSON Lines, Parquet, text; or hub:ID:CONFIGURATION#SPLIT."),
    click.option("--dev", metavar="FILE", help="Choose the best checkpoint, or learning rate, on this."),
    click.option("--eval", "tests", multiple=True, metavar="FILE", help="Score on this; may be said again."), *READ,
    click.option("--limit", type=COUNT, help="Learn from so many of the items."),
    click.option("--eval-limit", "test_limit", type=COUNT, help="Score on so many of the items."),
)
HOW = (
    click.option("--head-lr", type=ABOVE_ZERO, help="The learning rate of a new head.  [default: --lr]"),
    click.option("--rate", "parameter_rates", multiple=True, type=Rate(),
                 help="That of a parameter of the spec: B=1e-3."),
    click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), help="[default: linear, to 0]"),
    click.option("--warmup", type=_NOT_NEGATIVE, help="A share of the steps; from 1 on, steps.  [default: 0]"),
    click.option("--weight-decay", type=_NOT_NEGATIVE, help="[default: 0]"),
    click.option("--epochs", type=ABOVE_ZERO, help="[default: 2]"),
    click.option("--steps", type=COUNT, help="Train for so many steps, whatever the epochs."),
    click.option("--batch", type=COUNT, help="Items in a batch.  [default: 16]"),
    click.option("--accumulate", type=COUNT, help="Batches in a step.  [default: 1]"),
    *ASKED,
    click.option("--checkpointing", is_flag=True, default=None, help="Compute activations twice, hold fewer."),
    click.option("--bf16", is_flag=True, default=None, help="Compute in bfloat16; parameters stay as they are."),
)


def settings_from(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """`--config FILE.toml`: the options and arguments that are not on the line. Raises: SurgeryError (bad-data)."""
    if path is None:
        return
    from surgery.experiments.training_record import read

    names = {max(p.opts, key=len).lstrip("-").replace("-", "_"): p.name  # as an option or argument is written
             for p in context.command.params if p.expose_value}
    asked = read(path, names)
    context.default_map = {str(names[spelt]): value for spelt, value in asked.items()}


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given: of the others the default holds that Python has."""
    return {name: value for name, value in values.items() if value is not None}


config_option = click.option("--config", metavar="FILE.toml", is_eager=True, expose_value=False,
                             callback=settings_from, help="Take options from a file; those on the line go before it.")
