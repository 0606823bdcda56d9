"""`surgery fmt`: write spec files in the one layout that they have."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import click

from surgery.cli.options import command, files_below
from surgery.cli.output import Output
from surgery.diagnostics import Collector, fail
from surgery.files import SPEC_BYTES, read_bytes
from surgery.text import counted


@command(click.argument("files", nargs=-1, metavar="FILE..."),
         click.option("--check", "only_check", is_flag=True,
                      help="Change nothing; exit with 1 if something would change."),
         click.option("--diff", is_flag=True, help="Change nothing; show what would change."),
         example="surgery fmt specs/*.surg --check")
def fmt(output: Output, files: tuple[str, ...], only_check: bool, diff: bool) -> None:
    """Format specs in place.

    A FILE that is a folder is every .surg file below it; `-` is read from stdin and written to stdout.
    A file with a syntax error is left alone. Without FILE, it is the paths that the nearest `surgery.toml` names.
    """
    from surgery.semantics.arguments import guard
    from surgery.settings import settings

    files = files or settings().paths
    if not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    report, is_changed, is_dry = Collector(), {}, only_check or diff
    for name in files_below(files):
        with guard(report):  # a file with a syntax error keeps no other from being formatted
            is_changed[name] = _formatted(output, name, is_dry, diff)
    changed, unchanged = ([name for name, new in is_changed.items() if new is which] for which in (True, False))
    output.diagnostics(report.found)
    if is_changed:
        output.note(f"{counted(len(changed), 'file')} {'would be changed' if is_dry else 'changed'}, "
                    f"{counted(len(unchanged), 'file')} left unchanged")
    output.data(changed=changed, unchanged=unchanged)
    report.raise_errors()
    if only_check and changed:
        raise click.exceptions.Exit(1)


def _formatted(output: Output, name: str, dry: bool, diff: bool) -> bool:
    """Format one file; whether its text changed."""
    from surgery.language.formatter import format_text
    from surgery.runtime.atomic_folders import replacing_file

    title = "<stdin>" if name == "-" else name
    before = _text(name, title)
    after = format_text(before, title)
    if diff:
        lines = (text.splitlines(keepends=True) for text in (before, after))
        for line in difflib.unified_diff(*lines, fromfile=title, tofile=f"{title} (formatted)"):
            # difflib joins a last line that has no newline to the next one: `patch` knows this remark
            output.raw(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    elif name == "-" and not dry:
        output.raw(after)
    elif dry and after != before:
        output.say(f"{title} would be changed")
    elif after != before:
        with replacing_file(Path(name)) as new:
            new.write_bytes(after.encode("utf-8"))
    return after != before


def _text(name: str, title: str) -> str:
    """A file's text, or stdin's. Raises: SurgeryError (missing-file) where it cannot be read or is not UTF-8."""
    try:
        # bytes, since universal newlines would hide the carriage returns that formatting takes away
        data = sys.stdin.buffer.read() if name == "-" else read_bytes(Path(name), SPEC_BYTES, any_kind=True)
        return data.decode("utf-8")
    except OSError as error:
        raise fail("missing-file", f"cannot read {title}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise fail("missing-file", f"cannot read {title}: byte {error.start} is not UTF-8") from None
