"""From lark's parse tree to the tree of a spec.

Takes the parse tree, its source and the trivia of each statement. Gives the nodes of `tree`, each with its span.
Promises: no recursion, so that no depth of nesting can overflow here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, TypeVar

from lark import Token, Tree

from surgery.diagnostics import Collector, Source, Span
from surgery.language import tree
from surgery.language.comments import FILE
from surgery.language.grammar import extent
from surgery.language.well_formed import check_clause, check_repeats

Loop = TypeVar("Loop", tree.Repeat, tree.Rounds)
FLAGS = {"FROZEN": "frozen", "SHIFTED": "shifted", "UNTIE": "untie"}


class Builder:
    """One method per rule of the grammar: the span of its text and its children, built already, give a node."""

    def __init__(self, source: Source, trivia: dict[int, tree.Trivia], report: Collector):
        self.source, self.trivia, self.report = source, trivia, report
        self.is_too_deep = False  # a `for`, which was told

    def build(self, root: Tree) -> Any:
        """The node of a parse tree, from the leaves up."""
        built: dict[int, Any] = {}
        # lark gives the leaves first, so that the children of a part are built when it comes
        for part in root.iter_subtrees():
            span = Span(self.source, getattr(part.meta, "start_pos", 0), getattr(part.meta, "end_pos", 0))
            built[id(part)] = getattr(self, part.data)(span, *[built.get(id(c), c) for c in part.children])
        return built[id(root)]

    def _at(self, token: Token) -> Span:
        return Span(self.source, *extent(token))

    def _place(self, span: Span, name: Token | None = None) -> dict[str, Any]:
        """The fields of a node that say where it stands."""
        name_span = {"name_span": self._at(name)} if name else {}
        return {"span": span, "trivia": self.trivia.get(span.start, tree.Trivia()), **name_span}

    # ------------------------------------------------------------------------------------ statements of a file

    def file(self, span: Span, version: Any, *items: Any) -> tree.Spec:
        # A file without a header is a spec all the same: it stands at its beginning, and has no name.
        header, *again = [i for i in items if isinstance(i, dict)] or [{"span": Span(self.source, 0, 0)}]
        for other in again:
            self.report.error("syntax", "a file has one `spec` header", other["span"], label="this is the second",
                              related=((header["span"], "the first is here"),))
        header["trivia"] = replace(header.get("trivia", tree.Trivia()), inside=self.trivia[FILE].inside)
        return tree.Spec(**header, **(version or {}), uses=_all(items, tree.Use), checks=_all(items, tree.Check),
                         selects=_all(items, tree.Select), definitions=_all(items, tree.Definition),
                         targets=_all(items, tree.Target), train=_all(items, tree.Train))

    def language(self, span: Span, number: Token) -> dict[str, Any]:
        value = read_number(number)
        if not isinstance(value, int):
            self.report.error("syntax", "a version of the language is a whole number", span)
            return {}
        return {"language": value, "language_trivia": self._place(span)["trivia"]}

    def header(self, span: Span, name: Token, params: tuple | None) -> dict[str, Any]:
        return {"name": str(name), "params": params or (), **self._place(span, name)}

    def use(self, span: Span, path: Token) -> tree.Use:
        return tree.Use(path=path[1:-1], **self._place(span, path))

    def check(self, span: Span, condition: tree.Expression) -> tree.Check:
        return tree.Check(condition=condition, **self._place(span))

    def select(self, span: Span, name: Token, patterns: tuple) -> tree.Select:
        return tree.Select(name=str(name), patterns=patterns, **self._place(span, name))

    def train(self, span: Span, patterns: tuple) -> tree.Train:
        return tree.Train(patterns=patterns, **self._place(span))

    def selectors(self, span: Span, *selectors: tree.Pattern | tree.Reference) -> tuple:
        return selectors

    def pattern(self, span: Span, text: Token) -> tree.Pattern:
        return tree.Pattern(text[1:-1], span)

    def reference(self, span: Span, name: Token) -> tree.Reference:
        return tree.Reference(str(name), span)

    def signature(self, span: Span, *parameters: tree.Parameter) -> tuple:
        return parameters

    def parameter(self, span: Span, name: Token, kind: Token, default: tree.Expression | None) -> tree.Parameter:
        fields: dict[str, Any] = {"type": str(kind), **self._place(span, name)}
        return tree.Parameter(name=str(name), default=default, **fields)

    # ------------------------------------------------------------------------------------------- definitions

    def transform(self, span: Span, name: Token, params: tuple | None, dim: Token, claims: tuple | None,
                  *body: Any) -> tree.Definition:
        return self._definition("transform", span, name, params, claims, body, dim=str(dim))

    def update(self, span: Span, name: Token, params: tuple | None, on_bias: bool | None, claims: tuple | None,
               *body: Any) -> tree.Definition:
        return self._definition("update", span, name, params, claims, body, bias=on_bias is not None)

    def on_bias(self, span: Span) -> bool:
        return True

    def _definition(self, kind: Literal["transform", "update"], span: Span, name: Token, params: tuple | None,
                    claims: tuple | None, body: tuple, **place: Any) -> tree.Definition:
        *statements, (result, result_trivia) = body
        return tree.Definition(
            kind=kind, name=str(name), params=params or (), **place, claims=tuple(map(str, claims or ())),
            checks=_all(statements, tree.Check), body=_all(statements, (tree.Param, tree.Noise, tree.Let, tree.Rounds)),
            result=result, result_trivia=result_trivia, claims_spans=tuple(map(self._at, claims or ())),
            **self._place(span, name))

    def claims(self, span: Span, *names: Token) -> tuple:
        return names

    def param(self, span: Span, flags: dict | None, name: Token, dims: tuple | None, start: dict,
              *clauses: tuple) -> tree.Param:
        fields: dict[str, Any] = {**start, **(flags or {})}
        for field, word, value, place in clauses:
            if field in fields:
                self.report.error("syntax", f"`{word}` stands twice", place)
            fields[field] = value
        return tree.Param(name=str(name), dims=dims or (), **fields, **self._place(span, name))

    def rate(self, span: Span, value: tree.Expression) -> tuple:
        return "rate", "rate", value, span

    def no_decay(self, span: Span) -> tuple:
        return "decay", "no decay", False, span

    def on_manifold(self, span: Span, manifold: Token) -> tuple:
        return "manifold", f"on {manifold}", str(manifold), span

    def param_flags(self, span: Span, *flags: Token | dict[str, Any]) -> dict[str, Any]:
        return {name: value for flag in flags
                for name, value in (flag if isinstance(flag, dict) else {FLAGS[flag.type]: True}).items()}

    def shared(self, span: Span, word: Token, scope: Token | None) -> dict[str, Any]:
        return {"shared": True if scope in (None, "target") else str(scope)}

    def dims(self, span: Span, *dims: tree.Expression) -> tuple:
        return dims

    def init(self, span: Span, value: tree.Expression) -> dict[str, tree.Expression]:
        return {"init": value}

    def draw(self, span: Span, call: tree.Call) -> dict[str, tree.Call]:
        return {"draw": call}

    def noise(self, span: Span, name: Token, dims: tuple | None, law: tree.Call) -> tree.Noise:
        return tree.Noise(name=str(name), dims=dims or (), draw=law, **self._place(span, name))

    def let(self, span: Span, name: Token, value: tree.Expression) -> tree.Let:
        return tree.Let(name=str(name), value=value, **self._place(span, name))

    def rounds(self, span: Span, name: Token, first: tree.Expression, end: tree.Expression,
               *body: tree.Statement | tree.Rounds) -> tree.Rounds:
        return self._not_too_deep(tree.Rounds(
            name=str(name), first=first, end=end, body=body, **self._place(span, name)))

    def result(self, span: Span, value: tree.Expression) -> tuple[tree.Expression, tree.Trivia]:
        return value, self.trivia.get(span.start, tree.Trivia())

    # ----------------------------------------------------------------------------------------------- targets

    def target(self, span: Span, override: Token | None, kind: dict | None, selectors: tuple | None,
               exclude: tuple | None, flags: dict | None, *steps: tree.Step | tree.Repeat) -> tree.Target:
        return tree.Target(override=override is not None, **(kind or {}), selectors=selectors or (),
                           exclude=exclude or (),
                           **(flags or {}), steps=steps, **self._place(span))

    target_flags = param_flags

    def kind(self, span: Span, kind: Token, ancestor: Token | None) -> dict[str, str | None]:
        return {"kind": str(kind), "ancestor": ancestor and str(ancestor)}

    def repeat(self, span: Span, name: Token, first: tree.Expression, end: tree.Expression,
               *steps: tree.Step | tree.Repeat) -> tree.Repeat:
        return self._not_too_deep(tree.Repeat(
            name=str(name), first=first, end=end, steps=steps, **self._place(span, name)))

    def _not_too_deep(self, loop: Loop) -> Loop:
        """The `for`; where it stands around too many, the one in it: a deeper tree is not read by recursion."""
        if check_repeats(Collector() if self.is_too_deep else self.report, loop):
            return loop
        self.is_too_deep = True
        return next(each for each in tree.inside(loop) if isinstance(each, type(loop)))

    def step(self, span: Span, placement: Token, call: tree.Call, *clauses: tuple) -> tree.Step:
        fields: dict[str, Any] = {"placement": str(placement)}
        # a clause that may not stand here is reported and left out, so that the tree itself is always well formed
        for field, word, value, place in clauses:
            if check_clause(self.report, str(placement), word, place, again=field in fields):
                fields[field] = value
        return tree.Step(call=call, **fields, **self._place(span))

    def on(self, span: Span, side: Token) -> tuple:
        return "side", "on", str(side), span

    def with_bias(self, span: Span) -> tuple:
        return "bias", "with bias", True, span

    def dropout(self, span: Span, rate: tree.Expression) -> tuple:
        return "dropout", "dropout", rate, span

    # ------------------------------------------------------------------------------------------- expressions

    def if_then_else(self, span: Span, *parts: tree.Expression) -> tree.If:
        return tree.If(*parts, span=span)

    def binary(self, span: Span, left: tree.Expression, op: Token, right: tree.Expression) -> tree.Binary:
        return tree.Binary(str(op), left, right, span=span)

    def unary(self, span: Span, op: Token, operand: tree.Expression) -> tree.Unary:
        return tree.Unary(str(op), operand, span=span)

    def transpose(self, span: Span, operand: tree.Expression) -> tree.Transpose:
        return tree.Transpose(operand, span=span)

    def number(self, span: Span, text: Token) -> tree.Number:
        return tree.Number(read_number(text), str(text), span=span)

    def string(self, span: Span, text: Token) -> tree.String:
        return tree.String(text[1:-1], span=span)

    def boolean(self, span: Span, word: Token) -> tree.Boolean:
        return tree.Boolean(word == "true", span=span)

    def name(self, span: Span, name: Token) -> tree.Name:
        return tree.Name(str(name), span=span)

    def parens(self, span: Span, inner: tree.Expression) -> tree.Expression:
        return replace(inner, parens=inner.parens + 1, span=span)

    def row(self, span: Span, *entries: tree.Expression) -> tuple[Span, tuple[tree.Expression, ...]]:
        return span, entries

    def matrix(self, span: Span, *rows: tuple[Span, tuple[tree.Expression, ...]]) -> tree.Matrix:
        # rows of unequal length are reported; the tree goes on with what makes a matrix
        columns = len(rows[0][1])
        for place, entries in rows:
            if len(entries) != columns:
                self.report.error("syntax",
                                  f"the rows of a matrix are equally long: {columns} and {len(entries)} entries", place)
        return tree.Matrix(tuple(e for _, entries in rows for e in entries[:columns]), columns, span=span)

    def call(self, span: Span, function: Token, *arguments: tree.Argument) -> tree.Call:
        return tree.Call(str(function), arguments, self._at(function), span=span)

    def positional(self, span: Span, value: tree.Expression) -> tree.Argument:
        return tree.Argument(None, value)

    def keyword(self, span: Span, name: Token, value: tree.Expression) -> tree.Argument:
        return tree.Argument(str(name), value, self._at(name))


def _all(items: Any, kind: Any) -> tuple:
    return tuple(item for item in items if isinstance(item, kind))


def read_number(text: str) -> int | float:
    """The value of a literal; an integer of many digits is infinite, and so refused by `well_formed`."""
    if text.endswith("%"):
        return float(f"{text[:-1]}e-2")
    # Python reads a long integer in a time that grows with the square of its digits, and refuses one of thousands.
    if set(text) <= set("0123456789_"):
        return int(text) if len(text) < 100 else math.inf
    return float(text)
