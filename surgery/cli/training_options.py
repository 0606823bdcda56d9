"""What `train` and `eval` share: data files and how their items are read; settings from a file."""

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


def settings_from(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """`--config FILE.toml`: the options and arguments that are not on the line. Raises: SurgeryError (bad-data)."""
    if path is None:
        return
    from surgery.experiments.training_record import read

    names = {_spelt(p): p.name for p in context.command.params if p.expose_value}
    asked = read(path, names)
    context.default_map = {str(names[spelt]): value for spelt, value in asked.items()}


def _spelt(parameter: click.Parameter) -> str:
    """The name of an option or argument as it is written."""
    return max(parameter.opts, key=len).lstrip("-").replace("-", "_")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given: of the others the default holds that Python has."""
    return {name: value for name, value in values.items() if value is not None}


config_option = click.option("--config", metavar="FILE.toml", is_eager=True, expose_value=False,
                             callback=settings_from, help="Take options from a file; those on the line go before it.")
