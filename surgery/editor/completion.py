"""Completion: what may be written at a place of a text.

Takes a document and an offset; gives `Item`s. Promises: words of the language are those that the parser would take
there; what stands before may be broken. No torch without a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lark import Token
from lark.exceptions import UnexpectedInput

from surgery.editor.document import Document
from surgery.editor.model import Candidate, Model, names_of_models
from surgery.ir.operations import PRIMITIVES
from surgery.language.formatter import expression_text
from surgery.language.grammar import WORDS, items, machine
from surgery.language.tree import Definition
from surgery.semantics.arguments import signature
from surgery.semantics.distributions import DISTRIBUTIONS, choices
from surgery.semantics.evaluate import callable_names
from surgery.semantics.lint import CLAIMS
from surgery.semantics.resolved_spec import PLACES
from surgery.semantics.scope import MEANINGS, OF_DATA_MEANINGS

_OPEN = re.compile(r'"[^"\r\n]*"?|#[^\r\n]*')
_MODEL_LINE = re.compile(r"#[ \t]*surgery:[ \t]*model[ \t]*=[ \t]*(\S*)$")
_DECLARED = re.compile(r"\b(?:param|let|noise)\s+(\w+)|\b(\w+)\s*:\s*(?:int|float|bool|str)\b"
                       r"|\bon\s+(?!bias\b|stiefel\b)(\w+)")


@dataclass(frozen=True)
class Item:
    """A text that may stand in [start, offset). `kind`: keyword, transform, update, argument, primitive, distribution,
    name, selector, pattern, file, class, claim or model."""

    text: str
    kind: str
    start: int
    detail: str = ""
    doc: str = ""


class Stop(NamedTuple):
    """Where the parser stands: the tokens so far, and the terminals that may follow."""

    tokens: list[Token]
    accepted: set[str]

    @property
    def last(self) -> str:
        return self.tokens[-1].type if self.tokens else ""

    @property
    def call(self) -> tuple[str, str]:
        """The name whose arguments stand open, and the terminal before it; empty ones where none do."""
        opened: list[int] = []
        for index, token in enumerate(self.tokens):
            if token.type in ("LPAR", "LSQB", "LBRACE"):
                opened.append(index)
            elif token.type in ("RPAR", "RSQB", "RBRACE") and opened:
                opened.pop()
        at = opened[-1] if opened else 0
        if at < 2 or self.tokens[at].type != "LPAR" or self.tokens[at - 1].type != "NAME":
            return "", ""
        return str(self.tokens[at - 1]), self.tokens[at - 2].type


def complete(document: Document, offset: int, model: Model | None = None) -> list[Item]:
    """What may stand at an offset, where a word may have been begun."""
    text = document.text[:offset]
    inside = next((m for m in _OPEN.finditer(text) if m.end() == offset and not _is_closed(m[0])), None)
    if inside is not None:
        return list(_in_comment(inside) if inside[0].startswith("#") else _in_string(document, inside, model))
    start = re.search(r"(?:[A-Za-z_]\w*)?$", text)
    assert start is not None  # the empty word matches
    item = _item_start(document.code[: start.start()])
    return list(_in_code(document, item, start.start(), model))


def _is_closed(text: str) -> bool:
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


# ---------------------------------------------------------------------------------------- in strings and comments


def _in_comment(comment: re.Match[str]) -> Iterator[Item]:
    if line := _MODEL_LINE.match(comment[0]):
        yield from (Item(name, "model", comment.start() + line.start(1)) for name in names_of_models())


def _in_string(document: Document, string: re.Match[str], model: Model | None) -> Iterator[Item]:
    start, written = string.start() + 1, string[0][1:]
    before = document.code[: string.start()]
    words = re.findall(r"\b(?:use|train|select|target|transform|update|spec|check|param|noise|let|return)\b", before)
    word = words[-1] if words else ""
    if word == "use":
        folder = Path(document.name).parent
        yield from (Item(path.name, "file", start) for path in sorted(folder.glob("*.surg"))
                    if path.name != Path(document.name).name)
    elif argument := re.search(r"(\w+)\s*\([^()]*?(\w+)\s*=\s*$", before):  # `kaiming_uniform(mode = "`
        yield from (Item(choice, "name", start) for choice in choices(argument[1], argument[2]))
    elif model and word in ("train", "select", "target"):
        yield from _patterns(model.parameters if word == "train" else model.candidates, written, start)


def _patterns(candidates: tuple[Candidate, ...], written: str, start: int) -> Iterator[Item]:
    """Short patterns at first; whole names once a name is being written."""
    is_name = written and not written.startswith("*")
    for candidate in candidates:
        if candidate.pattern.startswith("**.") != bool(is_name):
            yield Item(candidate.pattern, "pattern", start, candidate.matches)


# ------------------------------------------------------------------------------------------------------- in code


def _item_start(code: str) -> int:
    """Where the statement of the file begins that a text ends in."""
    return max((m.end() for m in items().finditer(code)), default=0)


def _stop(document: Document, item: int, offset: int) -> Stop | None:
    """Where the parser stands at an offset, from the beginning of a statement on."""
    text = document.text[item:offset]
    head, brace, _ = text.partition("{")
    line = text.rpartition("\n")[2]
    # Where an earlier line is broken, the head of the block and the line itself tell enough.
    for feed in dict.fromkeys((text, f"{head}{brace}\n{line}", line)):
        parser, tokens = machine(feed, "file"), []
        try:
            for token in parser.lexer_thread.lex(parser.parser_state):
                parser.feed_token(token)
                tokens.append(token)
            return Stop(tokens, set(parser.accepts()))
        except UnexpectedInput:
            continue
    return None


def _in_code(document: Document, item: int, start: int, model: Model | None) -> Iterator[Item]:
    stop = _stop(document, item, start)
    if stop is None:
        return
    function, before = stop.call
    if stop.last in ("LPAR", "COMMA") and function:
        yield from _arguments(document, function, before, start)
    if "NAME" in stop.accepted:
        yield from _names(document, stop, item, start, model)
    for terminal in sorted(stop.accepted & WORDS.keys()):
        yield from (Item(word, "keyword", start) for word in WORDS[terminal])


def _arguments(document: Document, function: str, before: str, start: int) -> Iterator[Item]:
    definition = document.library.definitions.get(function)
    if before != "TILDE" and definition:
        if before != "PLACEMENT" and definition.dim:  # whose side a step says by `on`
            yield Item(f"{definition.dim} = ", "argument", start, f"{definition.dim}: its side")
        for p in definition.params:
            default = f" = {expression_text(p.default)}" if p.default is not None else ""
            yield Item(f"{p.name} = ", "argument", start, f"{p.name}: {p.type}{default}", p.doc)
    elif before == "TILDE" and function in DISTRIBUTIONS:
        for name, default in DISTRIBUTIONS[function].arguments.items():
            yield Item(f"{name} = ", "argument", start, name if default is None else f"{name} = {default}")


def _names(document: Document, stop: Stop, item: int, start: int, model: Model | None) -> Iterator[Item]:
    """What can be named where the parser takes a name."""
    is_value, is_selector = "NUMBER" in stop.accepted, "STRING" in stop.accepted
    if stop.last == "PLACEMENT":
        wanted = "update" if stop.tokens[-1] == "add" else "transform"
        yield from (_placed(d, start) for d in document.library.definitions.values() if d.kind == wanted)
    elif stop.last == "TILDE":
        yield from (Item(name, "distribution", start, ", ".join(row.arguments)) for name, row in DISTRIBUTIONS.items())
    elif is_value:
        yield from _values(document, item, start)
    elif is_selector:
        yield from (Item(s.name, "selector", start, "select", s.doc) for s in document.library.selects.values())
    elif stop.last == "_IN" and model:
        yield from (Item(name, "class", start) for name in model.classes)
    elif stop.last in ("COLON", "COMMA"):
        yield from (Item(claim, "claim", start) for claim in CLAIMS)


def _placed(definition: Definition, start: int) -> Item:
    return Item(definition.name, definition.kind, start, signature(definition), definition.doc)


def _values(document: Document, item: int, start: int) -> Iterator[Item]:
    """What an expression can name: what the statement declares above, what means something anywhere, the primitives."""
    written = document.code[item:start]
    is_definition = re.match(r"(transform|update)\b", written) is not None
    names = [next(filter(None, m.groups())) for m in _DECLARED.finditer(written)] if is_definition else [
        p.name for p in document.known.params]
    given = ("out", "in", "W", "b") if is_definition else ("out", "in", *PLACES)
    if is_definition and re.findall(r"\b(param|let|noise|check|return)\b", written)[-1:] in (["param"], ["let"]):
        given += tuple(OF_DATA_MEANINGS)  # which a start reads, perhaps through a `let`
    yield from (Item(name, "name", start) for name in dict.fromkeys(names))
    yield from (Item(name, "name", start, {**MEANINGS, **OF_DATA_MEANINGS}.get(name, "")) for name in given)
    if is_definition:
        yield from (Item(name, "primitive", start, PRIMITIVES[name].doc if name in PRIMITIVES else "")
                    for name in sorted(callable_names()))
        yield from (_placed(definition, start) for definition in document.library.definitions.values())
