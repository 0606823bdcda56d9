"""A line of a definition at a time: what it is, with its shape, and what runs where it is added to a weight.

Takes lines, statements of an update's body or expressions; gives `Told`. Promises: a line with a mistake changes
nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from surgery.diagnostics import Collector
from surgery.ir.expression import Expr, Leaf
from surgery.ir.notation import Maths
from surgery.ir.operations import shape_text
from surgery.language.library import library
from surgery.language.parser import parse_expression, parse_text
from surgery.language.tree import Spec
from surgery.semantics.definitions import Instance
from surgery.semantics.resolved_spec import IN, OUT
from surgery.semantics.scope import describe

_NAME = "it"  # of what is asked for
_STATEMENT = re.compile(r"\s*(?:frozen|shared|param|noise|let)\b")
_DECLARED = re.compile(r"\b(?:param|noise|let)\s+(\w+)")


@dataclass(frozen=True)
class Told:
    """`text` says what a line is. `spec` adds it to a linear weight, where its shape is that of one; else None."""

    text: str
    spec: Spec | None = None


class Console:
    """The statements so far, and what a further line makes of them.

    >>> from surgery.planning.console import Console
    >>> console = Console()
    >>> console.tell("param A[4, in] ~ normal(std = 0.02)").text
    'A : [4, in]'
    >>> console.tell("2 * (A @ A.T)").text
    '2 A Aᵀ : [4, 4]'
    """

    def __init__(self) -> None:
        self.statements: list[str] = []

    def tell(self, line: str) -> Told:
        """What a line is; a statement is kept, and takes the place of one of its name. Raises: SurgeryError."""
        declared = _name_of(line)
        name = declared or _NAME
        if not declared:
            parse_expression(line, "<console>")  # which tells of the line alone
        names = [_name_of(each) for each in self.statements]
        body = [*self.statements, line if declared else f"let {_NAME} = {line}"]
        if name in names:
            body[names.index(name)] = body.pop()
        value, leaves = _value(body, name)
        if declared:
            self.statements = body
            return Told(f"{name} : {shape_text(value.shape) if isinstance(value, Expr) else describe(value)}")
        if not isinstance(value, Expr):
            return Told(describe(value))
        symbols = {leaf.expr: leaf.key.rpartition(".")[2] for leaf in leaves}
        text = f"{Maths(symbols).text(value)} : {shape_text(value.shape)}"
        if value.shape != (OUT, IN):
            return Told(text)
        added = [*_update(body, _NAME), "target linear shifted { add it() }"]
        return Told(text, parse_text("\n".join(added), "<console>"))


def _name_of(line: str) -> str:
    """What a statement declares; empty for an expression."""
    found = _DECLARED.search(line) if _STATEMENT.match(line) else None
    return found[1] if found else ""


def _update(body: list[str], result: str) -> list[str]:
    return ["update it() {", *body, f"return {result}", "}"]


def _value(body: list[str], name: str) -> tuple[Any, list[Leaf]]:
    """What a name stands for behind the statements, and the parameters. Raises: SurgeryError."""
    report = Collector()
    spec = parse_text("\n".join(_update(body, "0 * W")), "<console>")
    values = {"out": OUT, "in": IN, "W": Expr("weight", (), None, (OUT, IN))}
    instance = Instance(spec.definitions[0], "add_it", values, report, library(spec).definitions)
    instance.run()
    report.raise_errors()
    return instance.values[name], instance.leaves
