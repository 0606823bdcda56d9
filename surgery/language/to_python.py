"""A spec as the Python that builds it.

Takes a tree; gives source text. Promises: running it leaves an equal spec in `spec`; comments and places are not kept.
"""

from __future__ import annotations

import json
from keyword import iskeyword
from typing import Any

from surgery.language.formatter import expression_text
from surgery.language.json_fields import Pattern, Reference
from surgery.language.tree import (
    Boolean,
    Expression,
    For,
    Node,
    Number,
    Parameter,
    Spec,
    Step,
    Target,
    as_expression,
    inside,
)

WIDTH = 100
_CLAUSES = ("on", "with_bias", "dropout")
_PUBLIC = ("Parameter", "Spec", "Target", "add", "post", "pre")


def python_text(spec: Spec) -> str:
    """Statements that import what they need and assign `spec`."""
    used: set[str] = set()
    body = f"spec = {_code(spec, 0, used)}\n"
    public, inner = sorted(used & set(_PUBLIC)), sorted(used - set(_PUBLIC))
    imports = [f"from surgery import {', '.join(public)}"]
    imports += [f"from surgery.language.tree import {', '.join(inner)}"] if inner else []
    return "\n".join([*imports, "", body])


def _code(value: Any, depth: int, used: set[str]) -> str:
    """An expression of Python for a node, an expression of the language, a selector, a tuple or a plain value."""
    if isinstance(value, Expression):
        return _expression(value)
    if isinstance(value, Pattern):
        return _quoted(value.text)
    if isinstance(value, Reference):
        used.add("Reference")
        return f"Reference({_quoted(value.name)})"
    if isinstance(value, tuple):
        return _laid_out("[", [_code(v, depth + 1, used) for v in value], "]", depth)
    if isinstance(value, Node):
        return _node(value, depth, used)
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _expression(value: Expression) -> str:
    """A plain number or boolean as Python writes it, anything else as its text."""
    if isinstance(value, (Number, Boolean)) and as_expression(value.value) == value:
        return repr(value.value)
    return _quoted(expression_text(value))


def _node(node: Node, depth: int, used: set[str]) -> str:
    # `pre`, `add` and `post` take arguments by Python's keywords: a name that is none, or means a clause there, cannot
    # be given so, and the step is written out in full.
    if isinstance(node, Step) and all(a.name is None or not iskeyword(a.name) and a.name not in _CLAUSES
                                      for a in node.call.arguments):
        used.add(node.placement)
        clauses = {"on": '"in"' if node.side == "in" else "", "with_bias": "True" if node.bias else "",
                   "dropout": _expression(node.dropout) if node.dropout is not None else ""}
        parts = [_quoted(node.call.function)]
        parts += [f"{a.name}={_expression(a.value)}" if a.name else _expression(a.value) for a in node.call.arguments]
        parts += [f"{name}={text}" for name, text in clauses.items() if text]
        return f"{node.placement}({', '.join(parts)})"  # on one line, as in a spec
    used.add(type(node).__name__)
    parts = [f"{name}={_code(value, depth + 1, used)}" for name, value in _fields(node).items()]
    if isinstance(node, Parameter):  # its name, its type and what it is if nobody says otherwise
        parts = [_code(v, depth + 1, used) for v in (node.name, node.type, node.default) if v is not None]
    if isinstance(node, Spec) and node.name is not None:
        parts[0] = _quoted(node.name)
    if isinstance(node, For):
        parts = [_code(v, depth + 1, used) for v in (node.name, node.first, node.end, *inside(node))]
    if isinstance(node, Target):
        places = [*node.selectors, *node.steps]
        kept = {n: v for n, v in _fields(node).items() if n not in ("selectors", "steps")}
        parts = [*(_code(p, depth + 1, used) for p in places),
                 *(f"{n}={_code(v, depth + 1, used)}" for n, v in kept.items())]
    return _laid_out(f"{type(node).__name__}(", parts, ")", depth)


def _fields(node: Node) -> dict[str, Any]:
    """The fields that say something: neither places and comments nor defaults."""
    # what equals its default is left out: the Python is to be read, and says no more than the text did
    infos = type(node).model_fields.items()
    return {name: getattr(node, name) for name, info in infos if not info.exclude
            and getattr(node, name) != info.default}


def _laid_out(before: str, parts: list[str], after: str, depth: int) -> str:
    """On one line if that is short enough, else one part a line."""
    line = before + ", ".join(parts) + after
    if len(line) + 4 * depth <= WIDTH and "\n" not in line:
        return line
    pad = "    " * (depth + 1)
    return f"{before}\n" + "".join(f"{pad}{part},\n" for part in parts) + "    " * depth + after
