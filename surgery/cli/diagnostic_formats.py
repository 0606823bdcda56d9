"""Diagnostics for programs: a line each for editors, GitHub's annotations, and SARIF for code scanning.

Takes diagnostics, each with the file that was asked about; gives text. Promises: lines and columns count from 1,
columns in characters; an end is the place after the last character.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from surgery import __version__
from surgery.cli.diagnostic_pages import pages
from surgery.diagnostics import CODES, Diagnostic, Span
from surgery.files import as_written
from surgery.text import plain

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def concise(diagnostic: Diagnostic, about: str) -> str:
    """`FILE:LINE:COLUMN: error[CODE] message`, with what to do."""
    where = str(diagnostic.span) if diagnostic.span else about or "surgery"
    advice = "; ".join(filter(None, [diagnostic.label, *diagnostic.helps]))
    text = f"{where}: {diagnostic.severity}[{diagnostic.code}] {diagnostic.message}{f' ({advice})' if advice else ''}"
    return plain(" ".join(text.split("\n")))  # editors read one line to a diagnostic


def github(diagnostic: Diagnostic, about: str) -> str:
    """GitHub's workflow command that puts an annotation at the place."""
    span = _place(diagnostic)
    place: dict[str, Any] = {}
    if span or about:
        place["file"] = _path(span.source.name if span else about).as_posix()
    if span:
        place |= {"line": span.line, "endLine": span.end_line}
        if span.line == span.end_line:  # columns are of one line
            place |= {"col": span.column, "endColumn": span.end_column}
    place["title"] = diagnostic.code
    fields = ",".join(f"{name}={_escaped(str(value)).replace(':', '%3A').replace(',', '%2C')}"
                      for name, value in place.items())
    return f"::{diagnostic.severity} {fields}::{_escaped(_in_words(diagnostic))}"


def sarif(diagnostics: Iterable[tuple[Diagnostic, str]], failure: str | None = None) -> dict[str, Any]:
    """A log of SARIF 2.1.0 with a rule, and its page as help, for each code that occurs. What is about no file, and
    `failure`, why there was no check at all, is told of the run."""
    given = list(diagnostics)
    # A result of SARIF must have a place in a file; an unknown model, say, has none.
    placed = [(diagnostic, about) for diagnostic, about in given if about or _place(diagnostic)]
    failures = [_in_words(d) for d, about in given if not (about or _place(d))] + ([failure] if failure else [])
    codes = sorted({diagnostic.code for diagnostic, _ in placed})
    texts = pages()
    rules = [{"id": code, "name": "".join(map(str.capitalize, code.split("-"))),
              "shortDescription": {"text": CODES[code]}, "fullDescription": {"text": CODES[code]},
              "help": {"text": texts[code], "markdown": texts[code]}, "defaultConfiguration": {"level": "error"},
              "properties": {"tags": ["surgery"], "problem.severity": "error"}} for code in codes]
    driver = {"name": "surgery", "version": __version__, "semanticVersion": __version__, "rules": rules}
    ending: dict[str, Any] = {"executionSuccessful": not failures}
    if failures:
        ending["toolExecutionNotifications"] = [{"level": "error", "message": {"text": text}} for text in failures]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "invocations": [ending],
           "results": [_result(diagnostic, about, codes) for diagnostic, about in placed]}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(diagnostic: Diagnostic, about: str, codes: list[str]) -> dict[str, Any]:
    related = [(span, label) for span, label in diagnostic.related if _is_file(span)]
    result = {"ruleId": diagnostic.code, "ruleIndex": codes.index(diagnostic.code), "level": diagnostic.severity,
              "message": {"text": _in_words(diagnostic)}, "locations": [_location(_place(diagnostic), about)]}
    if related:
        result["relatedLocations"] = [{"id": i, **_location(span, about), "message": {"text": label}}
                                      for i, (span, label) in enumerate(related)]
    return result


def _location(span: Span | None, about: str) -> dict[str, Any]:
    """A place of a file; that of a spec as a whole is its first line."""
    region = {"startLine": 1} if span is None else {
        "startLine": span.line, "startColumn": span.column, "endLine": span.end_line, "endColumn": span.end_column}
    path = _path(span.source.name if span else about)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    # A relative address says what it is relative to, or a scanner takes it for a path of its own.
    base: Mapping[str, str] = {} if path.is_absolute() else {"uriBaseId": "%SRCROOT%"}
    return {"physicalLocation": {"artifactLocation": {"uri": uri, **base}, "region": region}}


def _place(diagnostic: Diagnostic) -> Span | None:
    """The place that a user has a file of: a mistake in a shipped definition is shown where a spec places it."""
    spans = [diagnostic.span, *(span for span, _ in diagnostic.related)]
    return next((span for span in spans if span and _is_file(span)), None)


def _is_file(span: Span) -> bool:
    return Path(span.source.name).is_file()


def _path(name: str) -> Path:
    """A path as others find it: relative to the working folder, if it lies in there."""
    return as_written(Path(os.path.normpath(name)))


def _in_words(diagnostic: Diagnostic) -> str:
    return "\n".join(map(plain, [diagnostic.message, *filter(None, [diagnostic.label]), *diagnostic.notes,
                                 *diagnostic.helps]))


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
