"""`surgery console`: expressions with their shapes and programs, a line at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from surgery.cli.options import PAIR, command
from surgery.cli.output import Output
from surgery.diagnostics import SurgeryError


@command(click.option("--shape", type=PAIR, metavar="OUT,IN", default=(1024, 4096), show_default=True,
                      help="The weight that what has its shape is added to."),
         click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True,
                      help="How many tokens a step has."),
         example="surgery console --shape 64,128")
def console(output: Output, shape: tuple[int, int], tokens: int) -> None:
    """Read lines of a definition, and tell what each is.

    A statement, `param A[4, in] ~ normal(std = 0.02)` or `let U = ...`, is kept; an expression is told with its
    shape, and with the program that would run if it is one that could be added to a weight. Lines come from the
    keyboard or from stdin; an empty one is passed over.
    """
    from surgery.planning.console import Console

    if output.is_one_object:
        raise click.UsageError("a console shows results as they come, and not one object.")
    session = Console()
    for line in _lines():
        output.about.clear()  # the same mistake may be made twice
        try:
            told = session.tell(line)
            output.say(told.text)
            if told.spec is not None:
                from surgery.cli.program_view import shown

                shown(output, told.spec, shape, tokens, ("cpu", "float32"))
        except SurgeryError as error:
            output.diagnostics(error.diagnostics)


def _lines() -> Iterator[str]:
    """The lines of stdin that say something, asked for where somebody sits at a keyboard."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
