"""`surgery fmt`: write spec files in the one layout that they have."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from surgery.cli.options import command, files_below
from surgery.cli.output import Output
from surgery.diagnostics import Collector, fail
from surgery.files import SPEC_BYTES, read_bytes
from surgery.text import counted


@command(click.argument("files", nargs=-1, required=True, metavar="FILE..."),
         click.option("--check", "only_check", is_flag=True,
                      help="Change nothing; exit with 1 if something would change."),
         click.option("--diff", is_flag=True, help="Change nothing; show what would change."),
         example="surgery fmt specs/*.surg --check")
def fmt(output: Output, files: tuple[str, ...], only_check: bool, diff: bool) -> None:
    """Format specs in place.

    A FILE that is a folder is every .surg file below it; `-` is read from stdin and written to stdout.
    A file with a syntax error is left alone.
    """
    from surgery.semantics.arguments import guard

    report, found = Collector(), {}
    for name in files_below(files):
        with guard(report):
            found[name] = _formatted(output, name, only_check or diff, diff)
    changed, unchanged = ([name for name, new in found.items() if new is which] for which in (True, False))
    output.diagnostics(report.found)
    if found:
        output.note(_summary(len(changed), len(unchanged), only_check or diff))
    output.data(changed=changed, unchanged=unchanged)
    report.raise_errors()
    if only_check and changed:
        raise click.exceptions.Exit(1)


def _summary(changed: int, unchanged: int, dry: bool) -> str:
    done = "would be changed" if dry else "changed"
    return f"{counted(changed, 'file')} {done}, {counted(unchanged, 'file')} left unchanged"


def _formatted(output: Output, name: str, dry: bool, diff: bool) -> bool:
    """Format one file; whether its text changed."""
    from surgery.language.formatter import format_text
    from surgery.runtime.atomic_folders import replacing_file

    title = "<stdin>" if name == "-" else name
    before = _text(name, title)
    after = format_text(before, title)
    if diff:
        output.raw("".join(_difference(title, before, after)))
    elif name == "-" and not dry:
        output.raw(after)
    elif dry and after != before:
        output.say(f"{title} would be changed")
    elif after != before:
        with replacing_file(Path(name)) as new:
            new.write_bytes(after.encode("utf-8"))
    return after != before


def _difference(name: str, before: str, after: str) -> Iterator[str]:
    lines = (text.splitlines(keepends=True) for text in (before, after))
    for line in difflib.unified_diff(*lines, fromfile=name, tofile=f"{name} (formatted)"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _text(name: str, title: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else read_bytes(Path(name), SPEC_BYTES, any_kind=True)
        return data.decode("utf-8")
    except OSError as error:
        raise fail("missing-file", f"cannot read {title}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise fail("missing-file", f"cannot read {title}: byte {error.start} is not UTF-8") from None
