"""Diagnostics: what every stage says to a user, with the place and what to do.

Stage: none (everything imports it). Gives `Source`, `Span`, `Diagnostic`, the one error class `SurgeryError`, and a
`Collector` so that all the errors of a run are shown at once. Promises: a closed set of codes (`CODES`),
no colour here.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from surgery.text import plain

# Files whose frames are no caller's: the package, and contextlib, which runs the blocks of `with` and decorators.
_INNER = (os.path.join(os.path.dirname(__file__), ""), contextmanager.__code__.co_filename)

CODES: dict[str, str] = {
    "syntax": "the text is not a spec: the parser met something that cannot stand there",
    "newer-language": "a spec says that it is written in a version of the language that is not known here",
    "unknown-name": "an expression uses a name that is not a parameter, a dimension, a `param`, a `let` or a primitive",
    "unknown-argument": "a call passes an argument that the definition does not take",
    "unknown-definition": "a step names a transform or an update that is not defined",
    "unknown-selector": "a target names a selector that no `select` defines",
    "unknown-parameter": "`--set` or a Python keyword names a parameter that the spec does not have",
    "unknown-primitive": "an expression calls a function that is not a primitive",
    "unknown-distribution": "a `param ... ~ dist()` names a distribution that does not exist",
    "unknown-spec": "the name is neither a file nor a spec that ships",
    "no-weight": "a published method has no single W', so that no spec can say it",
    "unknown-method": "an adapter of PEFT's is of a method, or of a form of one, that no spec here says",
    "no-peft-form": "a part of a surgery has no form in PEFT",
    "missing-argument": "a call leaves out an argument that has no default",
    "wrong-type": "a value has another type than its parameter or operator asks for",
    "wrong-kind": "a transform stands where an update must, or the other way round, or takes the bias on the input "
                  "side",
    "shape-mismatch": "two shapes that must agree do not",
    "not-divisible": "a dimension is divided by something that does not divide it",
    "check-failed": "a `check` of the spec or of a definition is not met by the values given",
    "duplicate-name": "a name is defined twice",
    "import-cycle": "files `use` each other in a circle",
    "definition-cycle": "definitions call each other in a circle",
    "missing-file": "a file that is named does not exist or cannot be read",
    "no-match": "a pattern matches no module of the model",
    "dead-name": "one alternative of a pattern, an `except` or a `train` matches nothing",
    "bad-pattern": "a pattern is not well formed",
    "overlap": "two targets take the same module",
    "not-narrower": "an `override target` does not match a strict subset of the target that it overrides",
    "no-bias": "something is added to a bias, and the module has none",
    "tied-weight": "a targeted weight shares its storage with another parameter",
    "unsupported-module": "a matched module cannot be operated on",
    "not-identity": "the operated model is not the base model at initialisation",
    "off-manifold": "a parameter that is kept on a manifold does not start there",
    "unlike-shared": "parameters that are said to be one tensor start, train or are shaped in two ways",
    "false-claim": "a definition claims a property that random parameters refute",
    "untested": "a target fits none of the sizes that `check` tries, so its start and its claims were not tested",
    "unknown-claim": "a claim after `:` is not one that can be tested",
    "unused": "a parameter, `let` or definition parameter is never used",
    "reserved-name": "a word of the language stands where a name must",
    "bad-settings": "`surgery.toml`, or an `allow` in a comment, says what is not known",
    "bad-set": "a `--set` is not of the form name=value",
    "unknown-model": "the model is neither a folder, a hub id that can be loaded, nor a demo",
    "bad-adapter": "a saved adapter is incomplete or does not fit the model",
    "needs-data": "a parameter starts at what data gives (`G`, `C`), and none was given",
    "not-remade": "a frozen tensor that a saved adapter does not hold comes out otherwise when it is made again",
    "another-base": "a saved adapter is put on other weights than those that it was trained on",
    "already-operated": "the model carries a surgery already",
    "dead-adapter": "an adapter changes nothing in a forward pass, or a merged model is another one than operated",
    "changed-model": "what a surgery operates on was replaced, resized, tied or taken out of the model since",
    "wrong-mode": "the operated model is merged, switched off or given back, and cannot do this now",
    "changed-tensor": "a tensor changed inside `serving()`, which promises that none does",
    "bad-output": "the output folder cannot be written or exists already",
    "unnamed-argument": "a draw is given one argument without a name where it takes several",
    "never-trains": "at the start of a target W' changes with none of its parameters, so that training changes nothing",
    "too-large": "a formula takes more operations one after the other than can be worked with",
    "bad-value": "a value given from outside is not usable",
    "bad-data": "a file of labelled texts does not say what a task needs",
    "lost-run": "a process that trained for a comparison ended before its run did",
    "missing-extra": "what is asked for needs a package that an extra of the installation brings",
    "fallback": "a formula has no cheap program and runs dense",
    "dense-copy": "a formula reads every number of a weight that is not stored plainly, so that a dense copy is kept",
    "no-gradient": "a layer that is called gives no gradient to its input, and the input needs one",
    "internal": "a program that surgery made is not proven to compute what its formula means: our mistake",
    "merge-error": "a merged weight is further from the formula than its dtype allows, or no plain weight is there",
}


_SIMILAR = 0.7  # the share of letters that a misspelt word keeps; below, `cat` would be `scatter` and `det` `detach`
_SIMILAR_IF_SHORT = 0.6
_LONGEST_LINE = 200  # columns of a line of a source that are shown
_ALLOWED = re.compile(r"#[ \t]*surgery:[ \t]*allow\[([^\]\r\n]*)\]")
_MEANT = re.compile(r'did you mean (?:`([^`]+)`|("[^"]+")(?: \([^()]*\))?)\?')


_severities: ContextVar[Mapping[str, str]] = ContextVar("severities", default=MappingProxyType({}))


@contextmanager
def severities(by_code: Mapping[str, str]) -> Iterator[None]:
    """Inside, a warning that a `Collector` is given is `off`, a warning or an error, as these say by its code; the
    stage that finds it stops at such an error as at any other."""
    token = _severities.set(by_code)
    try:
        yield
    finally:
        _severities.reset(token)


def as_severe(diagnostic: Diagnostic, by_code: Mapping[str, str]) -> Diagnostic | None:
    """The diagnostic as severe as these say, None for one that is off. An error is always one."""
    asked = by_code.get(diagnostic.code, "warning")
    if diagnostic.severity != "warning" or asked == "warning":
        return diagnostic
    return None if asked == "off" else replace(diagnostic, severity=asked)


def working_folder() -> str:
    """The folder that the process is in; nothing where it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


@dataclass(frozen=True)
class Source:
    """A text and the name that diagnostics show for it (a path, or `<--set>`); `folder` is what the process was in when
    it was read, to which a path is relative."""

    name: str
    text: str = field(repr=False)
    folder: str = field(default_factory=working_folder, repr=False, compare=False)

    @cached_property
    def line_starts(self) -> list[int]:
        return [0] + [i + 1 for i, c in enumerate(self.text) if c == "\n"]

    def position(self, offset: int) -> tuple[int, int]:
        """(line, column) of an offset, both from 1."""
        line = bisect_right(self.line_starts, offset)  # each of a hundred diagnostics asks for its line
        return line, offset - self.line_starts[line - 1] + 1

    def line(self, number: int) -> str:
        # not by `splitlines`, which ends lines at characters that `line_starts` does not count
        return self.text.split("\n")[number - 1].rstrip("\r")


@dataclass(frozen=True)
class Span:
    """The half-open range of offsets [start, end) of a source."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def end_line(self) -> int:
        return self.source.position(self.end)[0]

    @property
    def end_column(self) -> int:
        """The column after the last character."""
        return self.source.position(self.end)[1]

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"

    def to_json(self) -> dict[str, str | int]:
        return {"file": self.source.name, "line": self.line, "column": self.column, "end_line": self.end_line,
                "end_column": self.end_column}


@dataclass(frozen=True)
class Diagnostic:
    """One finding. `label` stands beside the carets, `notes` and `helps` below the source;
    `related` are further places."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    related: tuple[tuple[Span, str], ...] = ()
    severity: str = "error"

    def __post_init__(self) -> None:
        assert self.code in CODES, f"undeclared diagnostic code {self.code!r}"

    def render(self) -> str:
        """The diagnostic as plain text, in the form of a compiler's. What a name or a source line holds that is no
        text, an escape sequence or another line, is shown and does nothing."""
        parts = [f"{self.severity}[{self.code}]: {plain(self.message)}"]
        places = ([(self.span, self.label)] if self.span else []) + list(self.related)
        parts += [f"   = help: {plain(self.label)}"] if self.label and not self.span else []
        parts += [line for span, label in places for line in _excerpt(span, label)]
        said = [f"note: {n}" for n in self.notes] + [f"help: {h}" for h in self.helps]
        parts += [f"   = {plain(line)}" for line in said]
        return "\n".join(parts)

    @property
    def is_allowed(self) -> bool:
        """Whether it is a warning that a comment allows, `# surgery: allow[code]` on its line or alone on the one
        above."""
        if self.severity != "warning" or self.span is None:
            return False
        source, line = self.span.source, self.span.line
        here, above = source.line(line), source.line(line - 1) if line > 1 else ""
        texts = [here, *([above] if above.lstrip().startswith("#") else [])]
        return any(self.code in re.split(r"[,\s]+", m[1].strip()) for text in texts for m in _ALLOWED.finditer(text))

    @property
    def meant(self) -> str:
        """What was probably meant, where it says `did you mean`: a word, or a pattern in its quotes; else empty."""
        said = next(filter(None, map(_MEANT.search, (self.label, *self.helps))), None)
        return (said[1] or said[2]) if said else ""

    def to_json(self) -> dict:
        return {"severity": self.severity, "code": self.code, "message": self.message,
                **(self.span.to_json() if self.span else {}), "label": self.label, "notes": list(self.notes),
                "helps": list(self.helps),
                "related": [{**span.to_json(), "label": label} for span, label in self.related]}


def _excerpt(span: Span, label: str) -> list[str]:
    line, column = span.source.position(span.start)
    text = span.source.line(line)
    width = max(1, min(span.end, span.start + len(text) - column + 1) - span.start)
    if len(text) > _LONGEST_LINE:  # the part around the place: a file may be one line of megabytes
        start = max(0, column - 1 - _LONGEST_LINE // 3)
        end = min(len(text), start + _LONGEST_LINE)
        cut, after = "..." * (start > 0), "..." * (end < len(text))
        column, text = column + len(cut) - start, cut + text[start:end] + after
        width = max(1, min(width, len(text) - column + 1))
    before, marked = (plain(part, keep="\t") for part in (text[: column - 1], text[column - 1 : column - 1 + width]))
    gutter = " " * len(str(line))
    # a tab stays one, since only the terminal knows how wide it is
    pad = "".join("\t" if c == "\t" else " " for c in before)
    return [f"{gutter} --> {plain(str(span))}", f"{gutter}  |", f"{line}  | {plain(text, keep=chr(9))}",
            f"{gutter}  | {pad}{'^' * max(1, len(marked))}{' ' + plain(label) if label else ''}"]


class SurgeryError(Exception):
    """The one error for a user's mistake: carries every diagnostic of the run in `.diagnostics`.

    >>> import surgery
    >>> try:
    ...     surgery.load("lroa")
    ... except surgery.SurgeryError as error:
    ...     print(error.diagnostics[0].code)
    unknown-spec
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n\n".join(d.render() for d in self.diagnostics))

    def __reduce__(self):
        return SurgeryError, (self.diagnostics,)


class SurgeryWarning(UserWarning):
    """A warning of a Python function, for what is probably not meant; `diagnostic` holds it as data."""

    def __init__(self, diagnostic: Diagnostic):
        self.diagnostic = diagnostic
        # `args` are what a copy, a pickle or another process makes it from again
        super().__init__(diagnostic)

    def __str__(self) -> str:
        return self.diagnostic.render()


def tell(diagnostics: Iterable[Diagnostic]) -> None:
    """Give each as a warning of Python's, at the line of the caller's code that called into this package."""
    level, frame = 1, sys._getframe()
    # Looked for and not counted: a decorator of a public function is one frame more.
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        level, frame = level + 1, frame.f_back
    for each in diagnostics:
        warnings.warn(SurgeryWarning(each), stacklevel=level)


def fail(code: str, message: str, span: Span | None = None, **more) -> SurgeryError:
    """The error of a single diagnostic, to be raised."""
    return SurgeryError([Diagnostic(code, message, span, **more)])


def internal(message: str, span: Span | None, where: str) -> Diagnostic:
    """The diagnostic of a mistake of ours: what a user can do about it is to report it."""
    return Diagnostic("internal", message, span, notes=(where,),
                      helps=("this is a mistake of surgery's, and not of the spec: please report it",))


class Collector:
    """Gathers diagnostics so that one run shows them all."""

    def __init__(self) -> None:
        self._found: dict[Diagnostic, None] = {}

    @property
    def found(self) -> list[Diagnostic]:
        return list(self._found)

    def error(self, code: str, message: str, span: Span | None = None, **more) -> None:
        self.add(Diagnostic(code, message, span, **more))

    def warn(self, code: str, message: str, span: Span | None = None, **more) -> None:
        self.add(Diagnostic(code, message, span, severity="warning", **more))

    def add(self, *diagnostics: Diagnostic) -> None:
        """Each once, however often it is found: what is counted is what is shown. What a comment allows, or the
        project turns off, is none."""
        kept = (as_severe(d, _severities.get()) for d in diagnostics if not d.is_allowed)
        self._found |= dict.fromkeys(filter(None, kept))

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self._found if d.severity == "error"]

    @property
    def warnings(self) -> list[Diagnostic]:
        return [d for d in self.found if d.severity == "warning"]

    def raise_errors(self, strict: bool = False) -> None:
        """Raise everything found if there is an error (under `strict`, a warning is one)."""
        if self.errors or (strict and self.found):
            raise SurgeryError(self.found)


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The choices that a misspelt word most likely meant, best first (empty if none is near): those that differ in
    case, then one of similar letters, those that are a part of it between `_`, or it of them, and those that begin with
    it."""
    choices = list(dict.fromkeys(choices))
    same = [c for c in choices if c.lower() == word.lower()]
    parts = [c for c in choices if f"_{c}_" in f"_{word}_" or f"_{word}_" in f"_{c}_"]
    longer = [c for c in choices if len(word) > 3 and c.lower().startswith(word.lower())]
    # a letter too many or too few is much of a short word
    cutoff = _SIMILAR if len(word) > 2 else _SIMILAR_IF_SHORT
    similar = difflib.get_close_matches(word, choices, n=count, cutoff=cutoff)
    return list(dict.fromkeys(same + similar[:1] + parts + longer + similar))[:count]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`did you mean `x`?`, with two that are as near as each other; or an empty string."""
    near = nearest(word, choices, 2)
    if len(near) == 2 and _is_as_near(word, *near):
        return f"did you mean `{min(near)}` or `{max(near)}`?"
    return f"did you mean `{near[0]}`?" if near else ""


def _is_as_near(word: str, best: str, other: str) -> bool:
    """Whether of two that a word may mean the second is as likely as the first."""
    def differing(each: str) -> int:
        matching = difflib.SequenceMatcher(None, word, each).get_matching_blocks()
        return len(word) + len(each) - 2 * sum(block.size for block in matching)

    both_hold_it = all(f"_{word}_" in f"_{each}_" for each in (best, other))
    return best.lower() != word.lower() and (both_hold_it or differing(other) <= differing(best))


def unknown_allowed(source: Source) -> Iterator[Diagnostic]:
    """A warning for each code in an `allow` of a text that is none."""
    for comment in _ALLOWED.finditer(source.text):
        for code in re.finditer(r"[^,\s]+", comment[1]):
            if code[0] not in CODES:
                start = comment.start(1) + code.start()
                yield Diagnostic("bad-settings", f"`{code[0]}` is no code of a diagnostic",
                                 Span(source, start, start + len(code[0])), did_you_mean(code[0], CODES),
                                 helps=("`surgery help --list` lists them",), severity="warning")
