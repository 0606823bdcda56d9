"""Text to the tree of a spec.

Takes the text of a file or of an expression. Gives `tree.Spec` or `tree.Expression` with spans and comments. Promises:
whatever the text, the only error is `SurgeryError`; after a syntax error it goes on at the next statement of the file.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from lark import Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken

from surgery.diagnostics import Collector, Diagnostic, Source, Span, SurgeryError
from surgery.language.comments import trivia_of
from surgery.language.grammar import WORDS, extent, item_words, items, machine
from surgery.language.syntax_errors import explain
from surgery.language.tree import Expression, Spec
from surgery.language.tree_builder import Builder, read_number
from surgery.language.well_formed import check_expression, check_language

MAX_ERRORS = 20
_SOME_FOR = "for i in 0..1 {"
_VERSION = re.compile(r"(?:\s|#[^\r\n]*[\r\n])*language\s+([0-9]+)(?![\w.%])")
#: What begins a statement of a body; `check` may stand in a file too.
BODY_WORDS = tuple(word for terminal in ("FROZEN", "SHARED", "_PARAM", "_NOISE", "_LET", "_CHECK", "_RETURN",
                                         "_FOR", "PLACEMENT") for word in WORDS[terminal])


def parse_text(text: str, name: str = "<text>") -> Spec:
    """The spec that a whole file says. Raises: SurgeryError with as many syntax errors as can be told apart."""
    # Windows' editors put this mark before a text, and no line shows it
    source = Source(name, text.removeprefix("\ufeff"))
    report = Collector()
    if version := _VERSION.match(source.text):  # before anything that a newer language may write in another way
        check_language(report, read_number(version[1]), Span(source, *version.span(1)))
        report.raise_errors()
    root, tokens = _parse(source, "file", report)
    try:
        spec = Builder(source, trivia_of(source.text, root, tokens), report).build(root)
    # a tree that is not well formed is told together with what was wrong before: one run shows all
    except SurgeryError as error:
        raise SurgeryError((*report.found, *error.diagnostics)) from None
    report.raise_errors()
    return spec


def parse_expression(text: str, name: str = "<expression>", begin: int = 0) -> Expression:
    """The expression that a text says from `begin` on. Raises: SurgeryError."""
    source = Source(name, text)
    report = Collector()
    root, _ = _parse(source, "expression", report, begin)
    expression = Builder(source, {}, report).build(root)
    check_expression(report, expression)
    report.raise_errors()
    return expression


class _Stopped(NamedTuple):
    """What is wrong with a text, and where; `is_due`: a statement of a body was, and something else stands there."""

    diagnostic: Diagnostic
    offset: int
    is_due: bool


def _parse(source: Source, start: str, report: Collector, begin: int = 0) -> tuple[Tree, list[Token]]:
    """The parse tree; on errors, reads on after each and raises them all."""
    text, resume = " " * begin + source.text[begin:], 0
    while isinstance(result := _run(source, text, start), _Stopped):
        is_new = result.diagnostic not in report.found
        report.add(result.diagnostic)
        # What is wrong is written over with blanks, so that every place stays where it is, and all is read again: first
        # the statement alone, and where that is not possible all up to the next statement of the file.
        rest = _without_statement(text, result) if start == "file" else None
        if rest is None and start == "file":
            begins = items().finditer(text, max(result.offset - 1, 0))
            item = next((m.end() for m in begins if m.end() >= max(result.offset, resume + 1)), None)
            if item is not None:
                resume, rest = item, re.sub(r"[^\n]", " ", text[:item]) + text[item:]
        if rest is None or not is_new or len(report.found) >= MAX_ERRORS:
            raise SurgeryError(report.found)
        text = rest
    report.raise_errors()
    return result


def _without_statement(text: str, stopped: _Stopped) -> str | None:
    """The text with blanks for the statement of a body that is wrong, where another one begins on a later line; else
    None. A definition's last statement is the one that it needs: without it, its `}` would be taken for a mistake."""
    span = stopped.diagnostic.span
    assert span is not None  # of a text, each error has a place
    at = stopped.offset if stopped.is_due else max(span.start - (span.start == span.end), 0)
    # Only what begins a line counts: a word within one belongs to the statement that is wrong.
    begins = [(match.start("word"), match["word"]) for match in _begins().finditer(text)]
    before = [begin for begin in begins if begin[0] <= at]
    after, word = next((begin for begin in begins if begin[0] > at), (len(text), ""))
    if not before or not (stopped.is_due or before[-1][1] in BODY_WORDS):
        return None
    item = next((word for _, word in reversed(before) if word not in BODY_WORDS), "")
    if word not in BODY_WORDS and (word != "}" or item not in ("target", "override")):
        return None
    start = at if stopped.is_due else before[-1][0]
    wrong = text[start:after]
    blank = re.sub(r"[^\n]", " ", wrong)
    if wrong.count("{") > wrong.count("}"):  # its block goes on, so that some `for` stands there, on a line of its own
        lines = blank.split("\n")
        if len(lines[0]) < len(_SOME_FOR):
            return None
        blank = "\n".join([_SOME_FOR.ljust(len(lines[0])), *lines[1:]])
    return text[:start] + blank + text[after:]


def _run(source: Source, text: str, start: str) -> tuple[Tree, list[Token]] | _Stopped:
    """The parse tree and its tokens, or what is wrong and where."""
    parser, tokens = machine(text, start), []
    try:
        for token in parser.lexer_thread.lex(parser.parser_state):
            parser.feed_token(token)
            tokens.append(token)
        return parser.feed_eof(tokens[-1] if tokens else None), tokens
    except UnexpectedCharacters as error:
        bad, offset = error, error.pos_in_stream
    except UnexpectedToken as error:
        bad, offset = error.token, len(text) if error.token.type == "$END" else extent(error.token)[0]
    is_due = not parser.accepts().isdisjoint({"_LET", "PLACEMENT"})
    return _Stopped(explain(source, parser, tokens, bad), offset, is_due)


@cache
def _begins() -> re.Pattern[str]:
    """What a line begins with that begins or ends a statement of a body or of a file, as `word`."""
    return re.compile(rf"^[ \t]*(?P<word>(?:{'|'.join((*BODY_WORDS, *item_words()))})\b|\}})", re.MULTILINE)
