"""What a command shows: results on stdout, diagnostics and progress on stderr, or one JSON object on stdout.

Takes texts, rich renderables and data; gives bytes on the two streams. Promises: no colour where none is wanted
(`NO_COLOR`, `--color never`, a file), no bar but on a terminal and after half a second, nothing but JSON under
`--json`; a name never moves, colours or splits what stands around it: text is made `plain` where it leaves.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from math import isfinite
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from surgery.diagnostics import Diagnostic
from surgery.text import plain

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.segment import Segment
    from rich.status import Status
    from rich.text import Text

FORMAT = "1.0"
FORMATS = ("full", "concise", "github", "sarif", "json")  # of diagnostics
T = TypeVar("T")
_PATIENCE = 0.5  # seconds before a bar shows
_WIDE = 200  # columns where there is no terminal to fit

_STYLES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^error\[[\w-]+\]"), "bold red"), (re.compile(r"^warning\[[\w-]+\]"), "bold yellow"),
    (re.compile(r"^ +--> .*"), "blue"), (re.compile(r"^ *\d* +\|(?= |$)"), "blue"),
    (re.compile(r"(?<=\|) +\^+.*"), "red"), (re.compile(r"^ +(= (note|help):)"), "cyan"),
)


def settle_streams() -> None:
    """A stream that is closed takes all and keeps nothing; a character that a stream cannot write is escaped."""
    # Python sets a stream to None where the parent process closed it, and the first print would fail.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def reserved_stdout(output: Output) -> Iterator[None]:
    """Inside, if stdout is to hold one JSON object, whatever else prints goes to stderr."""
    output.answers = sys.stdout
    with redirect_stdout(sys.stderr) if output.is_one_object else nullcontext():
        yield


def echo(text: str) -> None:
    """A line for people on stderr where there is no `Output`."""
    click.echo(plain(text, keep="\n"), err=True)


def abandon_stdout() -> None:
    """What is left in its buffer goes nowhere: nobody reads it, and the interpreter's last flush would fail on it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@dataclass
class Output:
    """The two streams of one run, and how to write on them. Nothing is shown twice."""

    as_json: bool = False
    verbosity: int = 0
    color: str = "auto"
    debug: bool = False
    answered: bool = False
    trust: bool = False
    revision: str | None = None  # of MODEL
    answers: TextIO | None = None
    format: str = "full"  # of diagnostics: one of FORMATS
    about: dict[Diagnostic, str] = field(default_factory=dict)  # the spec that a diagnostic is about

    @property
    def is_one_object(self) -> bool:
        """Whether stdout holds one JSON object and nothing else."""
        return self.as_json or self.format == "sarif"

    # ------------------------------------------------------------------------------------------------ streams

    def _console(self, stderr: bool) -> Console:
        from rich.console import Console

        # Names of files and modules are anybody's: what they hold of control characters is escaped in the last step,
        # after rich has laid the text out, so that no path to the stream can miss it.
        class Plain(Console):
            def render(self, *arguments: Any, **more: Any) -> Iterator[Segment]:
                for segment in super().render(*arguments, **more):
                    yield segment if segment.control else segment._replace(text=plain(segment.text, keep="\n"))

        stream = sys.stderr if stderr else sys.stdout
        # rich reads NO_COLOR too, but an explicit --color always is stronger than it
        bare = self.color == "never" or (self.color == "auto" and "NO_COLOR" in os.environ)
        width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
        return Plain(file=stream, width=width, highlight=False, markup=False, emoji=False,
                     no_color=bare, color_system=None if bare else "auto",
                     force_terminal=self.color == "always" or None)

    @cached_property
    def stdout(self) -> Console:
        return self._console(stderr=False)

    @cached_property
    def stderr(self) -> Console:
        return self._console(stderr=True)

    # ---------------------------------------------------------------------------------------------------- words

    def say(self, what: str | RenderableType = "") -> None:
        """A part of the result, for people."""
        if not self.is_one_object:
            self.stdout.print(_plain(what), soft_wrap=isinstance(what, str))

    def raw(self, text: str) -> None:
        """A part of the result that is a file's text: byte for byte, but on a terminal."""
        if not self.is_one_object:
            sys.stdout.write(plain(text, keep="\n\t") if sys.stdout.isatty() else text)

    def note(self, text: str) -> None:
        """What is good to know and no result."""
        if not self.is_one_object and self.verbosity >= 0:
            self.stderr.print(_plain(text), soft_wrap=True)

    def detail(self, text: str) -> None:
        """What only `-v` asks for."""
        if self.verbosity > 0:
            self.note(text)

    def diagnostics(self, diagnostics: Iterable[Diagnostic], about: str = "") -> None:
        """Diagnostics not yet shown, `about` a spec; where stdout holds one object they wait for `data`. `-q` leaves
        warnings out."""
        from surgery.cli import diagnostic_formats

        in_a_line = {"concise": diagnostic_formats.concise, "github": diagnostic_formats.github}.get(self.format)
        for diagnostic in (d for d in diagnostics if d not in self.about):
            is_shown = not self.is_one_object and (self.verbosity >= 0 or diagnostic.severity == "error")
            if is_shown and in_a_line:
                print(in_a_line(diagnostic, about))  # on stdout: there these lines are the result
            elif is_shown:
                if self.about:  # an empty line between two that are shown with their source
                    self.stderr.print()
                self.stderr.print(coloured(diagnostic.render()), soft_wrap=True)
            self.about[diagnostic] = about

    def data(self, **fields: Any) -> None:
        """The result for programs: the one JSON object of the run, the first that is given."""
        if not self.is_one_object or self.answered:
            return
        self.answered = True
        if self.format == "sarif":  # whose schema has no room for our own fields
            from surgery.cli.diagnostic_formats import sarif

            result = sarif(self.about.items(), fields.get("error"))
        else:
            result = {"format_version": FORMAT, **fields, "diagnostics": [d.to_json() for d in self.about]}
        # In ASCII, which every stream can write and which holds no control character of a name's.
        print(json.dumps(_finite(result), indent=2, allow_nan=False), file=self.answers or sys.stdout)

    # ------------------------------------------------------------------------------------------------- progress

    @property
    def animated(self) -> bool:
        return sys.stderr.isatty() and self.verbosity >= 0 and not self.is_one_object

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A bar while the block runs."""
        if not self.animated:
            self.detail(what)
            yield
            return
        from rich.text import Text

        with _patiently(self.stderr.status(Text(plain(what)))):
            yield

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        """The items one after the other, with a bar of how many are done."""
        if not self.animated:
            self.detail(f"{what}: {len(items)}")
            yield from items
            return
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                       console=self.stderr, transient=True)
        task = bar.add_task(what, total=len(items))
        with _patiently(bar):
            for item in items:
                yield item
                bar.advance(task)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that says what is being done: one line, written over, with nothing that moves in between."""
        def show(text: str) -> None:
            sys.stderr.write(f"\r\033[2K{plain(text)}")
            sys.stderr.flush()

        try:
            yield show if self.animated else self.detail
        finally:
            if self.animated:
                show("")


@contextmanager
def _patiently(shown: Status | Progress) -> Iterator[None]:
    """What is to be shown while the block runs, once it has run for a while."""
    # A bar that flashes up for a moment is noise; most blocks end before the timer does.
    timer = threading.Timer(_PATIENCE, shown.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # or it could start the bar after it was stopped
        shown.stop()


def _plain(what: str | RenderableType) -> str | RenderableType:
    return plain(what, keep="\n") if isinstance(what, str) else what


def _finite(data: Any) -> Any:
    """Data as JSON has it: without NaN and infinity, in whose place null stands."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def coloured(text: str) -> Text:
    """A rendered diagnostic with its parts in colour."""
    from rich.text import Text

    lines = []
    for line in text.split("\n"):
        styled = Text(line)
        for pattern, style in _STYLES:
            for match in pattern.finditer(line):
                styled.stylize(style, *match.span())
        lines.append(styled)
    return Text("\n").join(lines)


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: names to the left, figures to the right; a row may end early. No line is cut to a narrow
    terminal: a figure cut short is a lie."""
    # Made plain first: an escaped character is wider than the one that it stands for.
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
