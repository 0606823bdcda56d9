"""Where things are: the declaration of a name, a file's outline, and every place that a new name changes.

Takes a document and an offset; gives places. Promises: a rename that would change what the spec means, or reach into
another file, is refused with the reason. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.diagnostics import Source, Span, SurgeryError, fail
from surgery.editor.document import Document
from surgery.editor.names import Occurrence, at, occurrences
from surgery.language.grammar import is_name
from surgery.language.library import PRELUDE, locate
from surgery.language.tree import Param, Spec, Target, every_statement, every_step
from surgery.semantics.arguments import signature
from surgery.semantics.scope import MEANINGS


@dataclass(frozen=True)
class Symbol:
    """A statement of the outline: `kind` is definition, selector, target, train or parameter."""

    name: str
    kind: str
    detail: str
    span: Span
    name_span: Span
    children: tuple[Symbol, ...] = ()


def declaration(document: Document, offset: int) -> Span | None:
    """Where what stands at an offset is declared: in this file, in one that it uses, or in the standard library."""
    spec = document.spec
    for use in spec.uses if spec else ():
        if use.span and use.span.start <= offset <= use.span.end:
            path = Path(document.name).parent / use.path
            return Span(Source(str(path), ""), 0, 0) if path.is_file() else None
    found, word = at(document, offset), document.word_at(offset)
    if found is None and word is not None and spec is None:  # of a broken text the word alone is known
        found = Occurrence(Span(document.source, *word.span()), word[0], "definition")
    if found is None:
        return None
    if found.kind in ("definition", "selector"):
        scope = document.library
        node = scope.definitions.get(found.name) or scope.selects.get(found.name)
        return node.name_span if node else None
    here = next((each for each in occurrences(document) if each.declares and each.key == found.key), None)
    return here.span if here else found.node.name_span if found.node else None


def file_of(source: Source) -> Path:
    """The file that a source was read from."""
    path = Path(source.name)
    # the standard library is named alike on every machine, and lies in the package
    return locate(PRELUDE).absolute() if source.name == f"{PRELUDE}.surg" and not path.is_file() else path.absolute()


def outline(document: Document) -> list[Symbol]:
    """The statements of a file in their order, as it last parsed."""
    return sorted(_symbols(document.known), key=lambda symbol: symbol.span.start)


def _symbols(spec: Spec) -> Iterator[Symbol]:
    if spec.name and spec.span and spec.name_span:
        children = tuple(Symbol(p.name, "parameter", p.type, p.span, p.name_span) for p in spec.params
                         if p.span and p.name_span)
        yield Symbol(spec.name, "spec", signature(spec), spec.span, spec.name_span, children)
    for select in spec.selects:
        if select.span and select.name_span:
            yield Symbol(select.name, "selector", "select", select.span, select.name_span)
    for definition in spec.definitions:
        if definition.span and definition.name_span:
            inner = (*definition.params, *every_statement(definition.body))
            children = tuple(Symbol(node.name, "parameter", getattr(node, "what", "") or getattr(node, "type", ""),
                                    node.span, node.name_span) for node in inner if node.span and node.name_span)
            yield Symbol(definition.name, "definition", definition.kind, definition.span, definition.name_span,
                         children)
    for item in (*spec.targets, *spec.train):
        if item.span:
            text = item.span.source.text[item.span.start : item.span.end]
            head = " ".join(text.partition("{")[0].split())
            steps = ", ".join(step.call.function for step in every_step(item.steps)) if isinstance(item, Target) else ""
            yield Symbol(head, "target" if isinstance(item, Target) else "train", steps, item.span, item.span)


def renamable(document: Document, offset: int) -> Occurrence:
    """The name at an offset, if it can be changed here. Raises: SurgeryError (syntax, reserved-name)."""
    if document.spec is None:
        raise SurgeryError(document.syntax)
    found = at(document, offset)
    if found is None:
        raise fail("unknown-name", "there is no name here that could be changed")
    if not any(each.declares and each.key == found.key for each in occurrences(document)):
        raise fail("unknown-name", f"`{found.name}` is not declared in this file, so that it cannot be renamed here")
    if isinstance(found.node, Param) and isinstance(found.node.shared, str):
        raise fail("unlike-shared", f"`{found.name}` is one tensor with all that say this name, in other definitions "
                   "too: change each of them")
    return found


def rename(document: Document, offset: int, name: str) -> list[Span]:
    """Every place of this file where a name must change. Raises: SurgeryError, where the spec would be another one or
    none at all."""
    found = renamable(document, offset)
    if not is_name(name) or name in MEANINGS:
        raise fail("reserved-name", f"`{name}` cannot be a name")
    every = occurrences(document)
    places = list(dict.fromkeys(each.span for each in every if each.key == found.key))
    if name != found.name:
        _assert_same(document, every, found, places, name)
    return places


def _assert_same(document: Document, every: list[Occurrence], found: Occurrence, places: list[Span],
                 name: str) -> None:
    """Raises: SurgeryError, unless after the change every name means what it meant before."""
    # A new name may be one that something else has, and nothing less than reading the new text tells all the ways.
    text = document.text
    for place in sorted(places, key=lambda span: -span.start):
        text = text[: place.start] + name + text[place.end :]
    after = Document(document.name, text)
    moved = [each.key if each.key != found.key and each.home != f"{found.name}()" else None for each in every]
    now = [each.key for each in occurrences(after)]
    is_same = len(now) == len(moved) and all(old is None or old == new for old, new in zip(moved, now))
    taken = [key for each, key in zip(every, now) if each.key == found.key and key != (*found.key[:2], name)]
    in_use = {each.key for each in every} & {(*found.key[:2], name)} or (
        found.kind == "definition" and name in document.library.definitions) or (
        found.kind == "selector" and name in document.library.selects)
    worse = len([d for d in after.findings() if d.severity == "error"]) > len(
        [d for d in document.findings() if d.severity == "error"])
    if after.spec is None or not is_same or taken or in_use or worse:
        raise fail("duplicate-name", f"`{name}` means something else here already")
