"""The command line: `surgery COMMAND`.

Takes arguments; gives an exit status: 0 done, 1 the spec or the model is at fault, 2 wrong use, input or output, or our
own mistake, 130 interrupted. Promises: no traceback without `--debug`; a command's own imports happen when it runs.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from surgery import __version__
from surgery.cli.apply import apply
from surgery.cli.bench import bench
from surgery.cli.check import check
from surgery.cli.compare import compare
from surgery.cli.console import console
from surgery.cli.diff import diff
from surgery.cli.eval import eval_
from surgery.cli.explain import explain
from surgery.cli.export import export
from surgery.cli.fmt import fmt
from surgery.cli.help import help
from surgery.cli.import_ import import_
from surgery.cli.init import init
from surgery.cli.lsp import lsp
from surgery.cli.merge import merge
from surgery.cli.modules import modules
from surgery.cli.options import HELP, asked_format, common
from surgery.cli.output import Output, abandon_stdout, echo, reserved_stdout, settle_streams
from surgery.cli.plan import plan
from surgery.cli.report import report
from surgery.cli.show import show
from surgery.cli.specs import specs
from surgery.cli.spectrum import spectrum
from surgery.cli.train import train
from surgery.diagnostics import Collector, SurgeryError, SurgeryWarning
from surgery.text import plain

# Codes of what is wrong with how the program is used, with the world around it or with us, and not with a spec or a
# model.
_OUTSIDE = {"missing-file", "unknown-spec", "unknown-model", "bad-output", "bad-set", "bad-settings", "bad-data",
            "missing-extra", "internal"}
# What torch says, in errors of several types, when it asks for more memory than there is.
_NO_MEMORY = re.compile(r"allocate memory|out of memory|Storage size calculation overflowed")


# The commands as `surgery --help` shows them.
GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Specs": (init, check, fmt, specs, show, console, diff, help, lsp),
    "A spec on a model": (modules, explain, plan, apply, merge),
    "Fine-tuning": (train, eval_),
    "Adapters of PEFT": (import_, export),
    "Measuring": (bench, compare, spectrum, report),
}


class Surgery(click.Group):
    """The group of commands; turns every error into words and a status."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(str(each.name), each.get_short_help_str(limit=80)) for each in commands])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        settle_streams()
        output = ctx.ensure_object(Output)
        words = args[: args.index("--")] if "--" in args else args
        # Before the rest of the line, which may be wrong: whether stdout is for one object.
        output.format = asked_format(words)
        output.as_json = "--json" in words or output.format == "json"
        with _wrong_use(output):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        output = ctx.ensure_object(Output)
        try:
            with reserved_stdout(output), _wrong_use(output), _showing_warnings(output):
                result = super().invoke(ctx)
            sys.stdout.flush()  # while an error of it is still ours to tell
            return result
        except SurgeryError as error:
            output.diagnostics(error.diagnostics)
            output.data()
            status = _status(error)
        except KeyboardInterrupt:
            output.note("interrupted")
            output.data(error="interrupted")
            status = 130
        except OSError as error:
            if error.errno == errno.EPIPE:
                # `surgery ... | head`: click ends the program quietly, if no later flush fails
                abandon_stdout()
                raise
            where = f": {error.filename}" if error.filename else ""
            status = _failed(output, f"error: {error.strerror or error}{where}")
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # No stage has foreseen this one: the machine is too small, or we are at fault.
            message = (f"error: this is a bug in surgery: {type(error).__name__}: {error}\n"
                       "Please report it with the output of the same command and --debug.")
            if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
                message = f"error: not enough memory: {str(error) or type(error).__name__}"
            status = _failed(output, message)
        ctx.exit(status)


@contextmanager
def _showing_warnings(output: Output) -> Iterator[None]:
    """Inside, what functions warn of is a diagnostic of the command, which ends with status 1 where the project takes
    one for an error: a warning may come when all is written, and undoes nothing."""
    report = Collector()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Warning | str, *about: Any, **more: Any) -> None:
            if isinstance(message, SurgeryWarning):
                report.add(message.diagnostic)
                return output.diagnostics(report.found)
            show(message, *about, **more)

        warnings.simplefilter("always", SurgeryWarning)
        warnings.showwarning = shown
        yield
    report.raise_errors()


@contextmanager
def _wrong_use(output: Output) -> Iterator[None]:
    """Let click report a wrong command line, and report it to programs too."""
    try:
        yield
    except click.ClickException as error:
        output.data(error=error.format_message())
        # It may quote an argument. Click declares the message final, and prints what stands there.
        error.message = plain(error.message)  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _status(error: SurgeryError) -> int:
    """2 where every error is about the program's use or the world around it, 1 where a spec or model is wrong."""
    errors = [d for d in error.diagnostics if d.severity == "error"]
    # A file that is missing is the user's word on the command line, unless a spec names it in a `use`.
    outside = [d.code in _OUTSIDE and not (d.code == "missing-file" and d.span is not None) for d in errors]
    return 2 if errors and all(outside) else 1


def _failed(output: Output, message: str) -> int:
    """Report an error that is no diagnostic; the exit status."""
    if output.debug:
        echo(traceback.format_exc())
    echo(message)
    output.data(error=message)
    return 2


@click.group("surgery", cls=Surgery, context_settings=HELP,
             epilog="Example:  surgery plan sora demo:llama --set rank=8")
@click.version_option(__version__)
@common
def main() -> None:
    """Weight conditioning for fine-tuning, from short .surg specs.

    SPEC is a .surg file or the name of a spec that ships (`surgery specs`). MODEL is a model id of the hub, a local
    folder, package:NAME, the model that an installed Python package carries, or demo:NAME,
    a small random model built on the spot.
    """


for each in (command for commands in GROUPS.values() for command in commands):
    main.add_command(each)


def program() -> None:
    """`surgery` as a process of its own, which ends when its command does: Python would first take a million objects
    of torch and transformers apart, one by one, for a quarter of the time of a `plan`."""
    status = 1

    def end() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # Python's own end tells of it
        os._exit(status)

    atexit.register(end)  # what is registered first comes last
    try:
        main(prog_name="surgery")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
