"""Find where each name of a spec stands, and what it names there.

Takes a document whose text parses; gives its `Occurrence`s. Promises: every place that must change when a name is
changed is one, and two that mean the same thing have one `key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from surgery.diagnostics import Span
from surgery.editor.document import Document
from surgery.language.tree import (
    Call,
    Definition,
    For,
    Let,
    Name,
    Node,
    Noise,
    Param,
    Parameter,
    Reference,
    Spec,
    Step,
    Target,
    every_selector,
    every_statement,
    every_step,
    inside,
)
from surgery.semantics.evaluate import definition_calls, nodes


@dataclass(frozen=True)
class Occurrence:
    """A name at its place. `kind`: spec, definition, selector, primitive, distribution, argument (of a distribution),
    local (a parameter, `param`, `let` or dimension) or given (what nothing declares, as W). `home` is the spec or
    definition that a local name belongs to, `node` what declares it, where that is known, `step` the one it calls."""

    span: Span
    name: str
    kind: str
    home: str = ""
    node: Node | None = None
    step: Step | None = None
    declares: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.home, self.name


def occurrences(document: Document) -> list[Occurrence]:
    """Every name of a text that parses, in its order; none of one that does not."""
    spec = document.spec
    if spec is None:
        return []
    found = [*_of_spec(document, spec), *_of_selectors(spec)]
    for definition in spec.definitions:
        found += _of_definition(document, definition)
    return sorted(found, key=lambda each: each.span.start)


def at(document: Document, offset: int) -> Occurrence | None:
    """The name that stands at an offset, or ends there."""
    return next((each for each in occurrences(document) if each.span.start <= offset <= each.span.end), None)


def _of_spec(document: Document, spec: Spec) -> Iterator[Occurrence]:
    if spec.name and spec.name_span:
        yield Occurrence(spec.name_span, spec.name, "spec", node=spec, declares=True)
    declared: dict[str, Any] = {p.name: p for p in spec.params}
    for part in (*spec.params, *spec.checks, *spec.targets):
        yield from _read(document, part, "", declared)
    for step in (step for target in spec.targets for step in every_step(target.steps)):
        yield from _of_call(document, step.call, step)


def _of_call(document: Document, call: Call, step: Step | None = None) -> Iterator[Occurrence]:
    """A definition that is placed or called, and the parameters of it that the call names."""
    called = document.library.definitions.get(call.function)
    if call.name_span:
        yield Occurrence(call.name_span, call.function, "definition", node=called, step=step)
    for argument in call.arguments:
        if argument.name and argument.name_span:
            node = next((p for p in called.params if p.name == argument.name), None) if called else None
            yield Occurrence(argument.name_span, argument.name, "local", f"{call.function}()", node)


def _of_selectors(spec: Spec) -> Iterator[Occurrence]:
    for select in spec.selects:
        if select.name_span:
            yield Occurrence(select.name_span, select.name, "selector", node=select, declares=True)
    yield from (Occurrence(s.span, s.name, "selector") for s in every_selector(spec)
                if isinstance(s, Reference) and s.span)


def _of_definition(document: Document, definition: Definition) -> Iterator[Occurrence]:
    home = f"{definition.name}()"
    declared: dict[str, Any] = {}
    for node in (*definition.params, *every_statement(definition.body)):
        declared.setdefault(node.name, node)  # what gives it its next value in a `for` names it too
    if definition.name_span:
        yield Occurrence(definition.name_span, definition.name, "definition", node=definition, declares=True)
    if definition.dim and definition.name_span and definition.span:
        # the tree keeps no place for it: it stands behind the last `on` of the head
        declared[definition.dim] = None
        brace = document.code.index("{", definition.name_span.end)
        *_, head = re.finditer(rf"\bon\s+({definition.dim})\b", document.code[definition.name_span.end : brace])
        start = definition.name_span.end + head.start(1)
        yield Occurrence(Span(definition.span.source, start, start + len(definition.dim)), definition.dim, "local",
                         home, definition, declares=True)
    yield from _read(document, definition, home, declared)


def _read(document: Document, part: Node, home: str, declared: dict[str, Any]) -> Iterator[Occurrence]:
    """What the expressions of a statement name, and what it declares itself."""
    # An inner `for` comes after the one around it, and its variable is the one that is read there.
    variables = {id(node): each for each in nodes(part) if isinstance(each, For) for inner in inside(each)
                 for node in nodes(inner) if isinstance(node, Name) and node.id == each.name}
    for node in nodes(part):
        if isinstance(node, Name):
            loop = variables.get(id(node))
            kind = "local" if loop or node.id in declared else "given"
            where = _loop(document, loop) if loop else home if kind == "local" else ""
            yield Occurrence(_place(document, node), node.id, kind, where, loop or declared.get(node.id))
        elif isinstance(node, For) and node.name_span:
            yield Occurrence(node.name_span, node.name, "local", _loop(document, node), node, declares=True)
        elif isinstance(node, Call) and node.name_span:
            yield from _called(document, part, node)
        elif isinstance(node, (Parameter, Param, Noise, Let)) and node.name_span and node.name in declared:
            yield Occurrence(node.name_span, node.name, "local", home, node, declares=True)


def _loop(document: Document, loop: For) -> str:
    """Which `for` of the file: by its number, which stays as it is when names become longer."""
    loops = [node for node in nodes(document.spec) if isinstance(node, For)]
    return f"for {next(number for number, each in enumerate(loops) if each is loop)}"


def _called(document: Document, part: Node, call: Call) -> Iterator[Occurrence]:
    steps = [step.call for step in every_step(part.steps)] if isinstance(part, Target) else []
    if any(call is each for each in steps):
        return  # a step calls a definition
    if any(call is each for each in definition_calls(part, document.library.definitions)):
        yield from _of_call(document, call)
        return
    is_draw = any(call is getattr(node, "draw", None) for node in nodes(part))
    assert call.name_span is not None
    yield Occurrence(call.name_span, call.function, "distribution" if is_draw else "primitive")
    yield from (Occurrence(a.name_span, str(a.name), "argument", call.function) for a in call.arguments if a.name_span)


def _place(document: Document, name: Name) -> Span:
    """Where a name itself stands: its own place takes in the parentheses around it."""
    assert name.span is not None
    start = re.compile(rf"\b{name.id}\b").search(document.code, name.span.start, name.span.end)
    return Span(name.span.source, start.start(), start.end()) if start else name.span
