"""`surgery.toml`: what a project says once for the command line and for editors.

Takes the folder that one works in; gives `Settings`, those of the nearest file in it or above it. Promises: a key or a
value that is not known is a diagnostic with its place, and nothing is read that is no regular file.

    model = "demo:llama"        # what specs are checked on where nothing else is said
    paths = ["specs"]           # what is checked and formatted where no file is named

    [severity]                  # of warnings, by code: "off", "warning" or "error"
    unused = "error"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.diagnostics import CODES, Collector, Diagnostic, Source, Span, as_severe, did_you_mean, fail
from surgery.files import SPEC_BYTES, as_written, read_bytes

FILE = "surgery.toml"
SEVERITIES = ("off", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """`paths` are below the folder of the file that says them."""

    model: str = ""
    paths: tuple[str, ...] = ()
    severity: Mapping[str, str] = field(default_factory=dict)

    def applied(self, diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
        """The diagnostics as the project takes them: a warning may be none, or an error. An error is always one."""
        return [*filter(None, (as_severe(each, self.severity) for each in diagnostics))]


def settings(folder: Path | None = None) -> Settings:
    """Those of the nearest `surgery.toml`, in the folder (of this process, if none is given) or above it; what nothing
    says where there is none. Raises: SurgeryError (bad-settings) with all that is wrong with the file."""
    file = found_file(folder)
    return _read(file) if file else Settings()


def found_file(folder: Path | None = None) -> Path | None:
    """The nearest `surgery.toml`, in the folder or above it."""
    here = (folder or Path()).absolute()
    return next((path for path in (each / FILE for each in (here, *here.parents)) if path.is_file()), None)


def _read(file: Path) -> Settings:
    try:
        text, shown = read_bytes(file, SPEC_BYTES).decode("utf-8"), str(as_written(file))
    except (OSError, UnicodeDecodeError) as error:
        raise fail("bad-settings", f"cannot read {as_written(file)}: {error}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise fail("bad-settings", f"{FILE} is not TOML: {error}", _line(Source(shown, text), line)) from None
    report, source = Collector(), Source(shown, text)
    for key, what, label in _faults(values):
        found = re.search(rf'^[ \t]*\[?[ \t]*"?({re.escape(key)})\b', source.text, re.MULTILINE)
        report.error("bad-settings", what, Span(source, *found.span(1)) if found else None, label=label)
    report.raise_errors()
    paths = tuple(str(as_written(file.parent / path)) for path in values.get("paths", ()))
    return Settings(values.get("model", ""), paths, values.get("severity", {}))


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(the key, what is wrong with it, what was probably meant)."""
    known = ("model", "paths", "severity")
    for key, value in values.items():
        if key not in known:
            yield key, f"`{key}` is no setting; there are {', '.join(known)}", did_you_mean(key, known)
        elif key == "model" and not isinstance(value, str):
            yield key, "`model` is the name of a model, a text", ""
        elif key == "paths" and not (isinstance(value, list) and all(isinstance(path, str) for path in value)):
            yield key, "`paths` is a list of texts, files or folders", ""
        elif key == "severity" and not isinstance(value, dict):
            yield key, "`[severity]` has a line for each code", ""
    severity = values.get("severity")
    for code, value in severity.items() if isinstance(severity, dict) else ():
        if code not in CODES:
            yield code, f"`{code}` is no code of a diagnostic", did_you_mean(code, CODES)
        elif value not in SEVERITIES:
            yield code, f"the severity of `{code}` must be {', '.join(SEVERITIES[:-1])} or {SEVERITIES[-1]}", ""


def _line(source: Source, number: re.Match[str] | None) -> Span:
    """The line of a number that an error of TOML's names, or the last one."""
    line = int(number[1]) if number else len(source.text.rstrip().split("\n"))
    start = source.line_starts[line - 1]
    return Span(source, start, start + len(source.line(line)))
