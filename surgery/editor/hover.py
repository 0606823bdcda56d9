"""Hover: what a name is, by its signature, its comment, its formula, parameters and cost.

Takes a document and an offset; gives Markdown and the place that it is about. Promises: what cannot be known is left
out. No torch without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from surgery.codegen.compiled import Compiled
from surgery.diagnostics import Collector, Span, SurgeryError
from surgery.editor.document import Document
from surgery.editor.model import Model
from surgery.editor.names import Occurrence, at
from surgery.ir.operations import PRIMITIVES
from surgery.ir.sizes import known
from surgery.language.formatter import spec_text
from surgery.language.tree import (
    Definition,
    Node,
    Pattern,
    Select,
    Spec,
    Step,
    Target,
    every_selector,
)
from surgery.planning.cost_estimates import Estimate
from surgery.planning.formulas import formula_lines
from surgery.planning.trial_sizes import USUAL, first_that_fits, places_of, sizes_to_try
from surgery.semantics.arguments import example_step, signature
from surgery.semantics.distributions import DISTRIBUTIONS
from surgery.semantics.evaluate import callable_names
from surgery.semantics.scope import MEANINGS, OF_DATA_MEANINGS

_GIVEN = {**MEANINGS, **OF_DATA_MEANINGS}


def hover(document: Document, offset: int, model: Model | None = None) -> tuple[str, tuple[int, int]] | None:
    """(Markdown, its place) for what stands at an offset; None where there is nothing to say."""
    if pattern := _pattern_at(document, offset):
        text = model.matches(pattern.text) if model else ""
        return (text, (pattern.span.start, pattern.span.end)) if text and pattern.span else None
    name = at(document, offset) or _guessed(document, offset)
    parts = list(_about(document, name, model)) if name else []
    return ("\n\n".join(parts), (name.span.start, name.span.end)) if name and parts else None


def _guessed(document: Document, offset: int) -> Occurrence | None:
    """The word at an offset of a text that does not parse, as what is called so wherever it stands."""
    word = document.word_at(offset) if document.spec is None else None
    if word is None:
        return None
    tables = (("definition", document.library.definitions), ("selector", document.library.selects),
              ("distribution", DISTRIBUTIONS), ("primitive", callable_names()), ("given", _GIVEN))
    kind = next((kind for kind, table in tables if word[0] in table), None)
    return Occurrence(Span(document.source, *word.span()), word[0], kind) if kind else None


def _pattern_at(document: Document, offset: int) -> Pattern | None:
    selectors = every_selector(document.spec) if document.spec else ()
    return next((s for s in selectors
                 if isinstance(s, Pattern) and s.span and s.span.start <= offset <= s.span.end), None)


def _about(document: Document, name: Occurrence, model: Model | None) -> Iterator[str]:
    match name.kind:
        case "definition":
            if definition := document.library.definitions.get(name.name):
                yield from _of_definition(document, definition, name.step, model)
        case "selector":
            if select := document.library.selects.get(name.name):
                yield from _declared(select)
        case "primitive" if name.name in PRIMITIVES:
            row = PRIMITIVES[name.name]
            yield _code(row.call)
            yield row.doc
        case "distribution" if name.name in DISTRIBUTIONS:
            yield _code(f"~ {name.name}({', '.join(DISTRIBUTIONS[name.name].arguments)})")
        case "given" if name.name in _GIVEN:
            yield f"`{name.name}`: {_GIVEN[name.name]}"
        case "spec" | "local" if name.node is not None:
            yield from _declared(name.node)


def _declared(node: Node) -> Iterator[str]:
    """A statement as the formatter writes it, and the comment above it."""
    match node:
        case Spec():
            text = signature(node)
        case Select():
            text = spec_text(Spec(selects=(node,)))
        case Definition():
            text = f"{node.kind} {signature(node)}" + (f" on {node.dim}" if node.dim else " on bias" * node.bias)
        case _:
            text = node.span.source.text[node.span.start : node.span.end] if node.span else ""
    yield _code(text.strip())
    if node.doc:
        yield node.doc


def _of_definition(document: Document, definition: Definition, step: Step | None, model: Model | None) -> Iterator[str]:
    yield from _declared(definition)
    if document.resolved is None:
        return
    target = Target(kind="linear", steps=(step or example_step(definition),))
    formula = document.resolved.formula(target, Collector())
    if formula is not None:
        yield _code("\n".join(formula_lines(target, formula)), "text")
        yield from _costs(document, target, model)


def _costs(document: Document, target: Target, model: Model | None) -> Iterator[str]:
    """The trained numbers and the time of a step, at the model's largest weight or at usual sizes."""
    resolved = document.resolved
    assert resolved is not None
    largest = model.largest_linear if model else None
    try:
        usual = sorted((s for each in sizes_to_try(target, resolved) for s in each), reverse=True)
        sizes = [*([largest] if largest else []), USUAL, *usual]
        place = next(iter(places_of(target)))
        trial = first_that_fits(target, resolved, place, sizes, Collector())
        if trial is not None:
            numbers = sum(known(prod(leaf.shape)) for leaf in trial.formula.leaves if not leaf.frozen)
            yield f"{numbers:,} trained numbers; {Estimate(Compiled.supposed(trial.formula)).cost_text}"
    except SurgeryError:
        return


def _code(text: str, language: str = "surg") -> str:
    return f"```{language}\n{text}\n```"
