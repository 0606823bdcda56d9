"""The tree of a spec as canonical text: the formatter.

Takes a `tree.Spec` or an expression. Gives text: two spaces, one statement a line, verbs and comments aligned, comments
and single blank lines kept. Promises: the text parses to an equal spec, and formatting it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

from surgery.language import tree
from surgery.language.parser import parse_text
from surgery.language.tree import Trivia
from surgery.language.tree_builder import read_number

WIDTH = 120
INDENT = "  "
#: A line and the comment beside it.
Line = tuple[str, str]

# ------------------------------------------------------------------------------------------------- expressions

#: How tightly each operator binds; an operand that binds less needs parentheses.
BINDING = {"or": 1, "and": 2, "not": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4, "+": 5, "-": 5, "*": 6,
           "/": 6,
           "@": 6}
IF, COMPARE, NEGATE, POSTFIX, ATOM = 0, 4, 7, 8, 9


def expression_text(expression: tree.Expression) -> str:
    """The expression in the language, with the parentheses that it needs and those that its writer put."""
    return _operand(expression, IF)


def _operand(expression: tree.Expression, least: int) -> str:
    """The text where something must stand that binds at least as tightly as `least`."""
    binding = _binding(expression)
    match expression:
        case tree.Number():
            # as it was written (`5%`, `1_024`), unless a change in Python has left another value beside that text
            is_kept = expression.text and tree.Number(read_number(expression.text)) == expression
            text = expression.text if is_kept else repr(expression.value)
        case tree.String():
            text = f'"{expression.value}"'
        case tree.Boolean():
            text = "true" if expression.value else "false"
        case tree.Name():
            text = expression.id
        case tree.Call():
            arguments = [f"{a.name} = " * bool(a.name) + expression_text(a.value) for a in expression.arguments]
            text = f"{expression.function}({', '.join(arguments)})"
        case tree.Matrix():
            rows = [f"[{', '.join(map(expression_text, row))}]" for row in expression.rows]
            text = f"[{', '.join(rows)}]"
        case tree.Transpose():
            text = f"{_operand(expression.operand, POSTFIX)}.T"
        case tree.Unary():
            text = f"{expression.op}{' ' * (expression.op == 'not')}{_operand(expression.operand, binding)}"
        case tree.Binary():
            # operators group to the left: an equal one on the right needs parentheses; comparisons do not chain at all
            left = _operand(expression.left, binding + (binding == COMPARE))
            text = f"{left} {expression.op} {_operand(expression.right, binding + 1)}"
        case tree.If():
            condition, then = expression_text(expression.condition), expression_text(expression.then)
            text = f"if {condition} then {then} else {expression_text(expression.otherwise)}"
        case _:
            raise AssertionError(f"no text for {type(expression).__name__}")
    pairs = max(expression.parens, 1 if binding < least else 0)
    return "(" * pairs + text + ")" * pairs


def _binding(expression: tree.Expression) -> int:
    match expression:
        case tree.If():
            return IF
        case tree.Binary():
            return BINDING[expression.op]
        case tree.Unary():
            return NEGATE if expression.op == "-" else BINDING["not"]
        case tree.Transpose():
            return POSTFIX
    return ATOM


# -------------------------------------------------------------------------------------------------- statements


def format_text(text: str, name: str = "<text>") -> str:
    """The text in canonical layout. Raises: SurgeryError if it is not a spec."""
    return spec_text(parse_text(text, name))


def spec_text(spec: tree.Spec) -> str:
    """The spec as canonical text: in the order of its source, or by kind of statement if it was built."""
    items = [*spec.uses, *([spec] if spec.name else []), *spec.checks, *spec.selects, *spec.definitions, *spec.targets,
             *spec.train]
    placed = _in_order(items)
    blocks = [_item(item) for item in placed or items]
    if placed is None:  # a spec that was built has no blank lines of its own: one before each statement
        blocks = [[("", ""), *block] if block[0] != ("", "") else block for block in blocks]
    first = [_plain(spec.language_trivia, [f"language {spec.language}"], 0)] if spec.language is not None else []
    lines = [line for block in (*first, *blocks) for line in block] + _comments(spec.trivia.inside, 0)
    text = ""
    # comments beside consecutive lines of one depth start in one column
    for (beside, _), run in groupby(lines[1:] if lines[:1] == [("", "")] else lines,
                                    key=lambda line: (bool(line[1]), len(line[0]) - len(line[0].lstrip()))):
        rows = list(run)
        width = max(len(left) for left, _ in rows)
        text += "".join(f"{left:{width}}  {comment}\n" if beside else f"{left}\n" for left, comment in rows)
    return text


def _in_order(nodes: list) -> list | None:
    """The nodes as one source has them, or None if they do not all come from one."""
    # Places of two texts cannot be compared: a spec that was put together in Python goes by kind of statement.
    sources = {id(node.span.source) if node.span else None for node in nodes}
    return sorted(nodes, key=lambda node: node.span.start) if len(sources) == 1 and None not in sources else None


def _item(node: tree.Node) -> list[Line]:
    match node:
        case tree.Spec():
            return _statement(replace(node.trivia, inside=()), _signed(f"spec {node.name}", node.params, ""))
        case tree.Select():
            return _plain(node.trivia, [f"select {node.name} =", *_listed(node.patterns)], 0)
        case tree.Train():
            return _plain(node.trivia, ["train", *_listed(node.patterns)], 0)
        case tree.Definition():
            return _definition(node)
        case tree.Target():
            return _target(node)
    return _plain(node.trivia, [_simple(node)], 0)


def _definition(node: tree.Definition) -> list[Line]:
    dim = f" on {node.dim}" if node.dim else " on bias" * node.bias
    claims = f" : {', '.join(node.claims)}" if node.claims else ""
    head = _signed(f"{node.kind} {node.name}", node.params, f"{dim}{claims} {{")
    statements = [*node.checks, *node.body]
    body = _body(_in_order(statements) or statements, 1)
    result = _plain(node.result_trivia, [f"return {expression_text(node.result)}"], 1)
    return _statement(node.trivia, head, body + result)


def _body(statements: Iterable[tree.Node], level: int) -> list[Line]:
    """The lines of the statements of a definition, or of its rounds."""
    return [line for each in statements for line in (
        _statement(each.trivia, [(f"{for_text(each)} {{", "")], _body(each.body, level + 1), level)
        if isinstance(each, tree.Rounds) else _plain(each.trivia, [_simple(each)], level))]


def _target(node: tree.Target) -> list[Line]:
    words = ["override target" if node.override else "target"]
    if node.ancestor:
        words.append(f"{node.kind} in {node.ancestor}")
    elif node.kind != "any" or not node.selectors:
        words.append(node.kind)  # `any` is what no kind means, but a target must say something
    words += _listed(node.selectors)
    words += ["except", *_listed(node.exclude)] if node.exclude else []
    words += [*["shifted"] * node.shifted, *["untie"] * node.untie, "{"]
    return _statement(node.trivia, _wrapped(words), _steps(node.steps, 1))


def _steps(steps: Iterable[tree.Step | tree.Repeat], level: int) -> list[Line]:
    """The lines of a block of steps, the placements of those that stand side by side in one column."""
    width = max((len(step.placement) for step in steps if isinstance(step, tree.Step)), default=0)
    lines: list[Line] = []
    for each in steps:
        if isinstance(each, tree.Repeat):
            lines += _statement(each.trivia, [(f"{for_text(each)} {{", "")], _steps(each.steps, level + 1), level)
        else:
            lines += _plain(each.trivia, [step_text(each, width)], level)
    return lines


def for_text(node: tree.For) -> str:
    """`for i in 0..count`."""
    return f"for {node.name} in {expression_text(node.first)}..{expression_text(node.end)}"


def step_text(step: tree.Step, width: int = 0) -> str:
    """A step as a spec says it, without comments; `width`: that of the widest placement beside it."""
    side = " on in" if step.side == "in" else ""
    bias = " with bias" if step.bias else ""
    dropout = f" dropout({expression_text(step.dropout)})" if step.dropout is not None else ""
    return f"{step.placement:{width}} {expression_text(step.call)}{side}{bias}{dropout}"


def _simple(node: tree.Node) -> str:
    match node:
        case tree.Use():
            return f'use "{node.path}"'
        case tree.Check():
            return f"check {expression_text(node.condition)}"
        case tree.Let():
            return f"let {node.name} = {expression_text(node.value)}"
        case tree.Param():
            return _param(node)
        case tree.Noise():
            return f"noise {node.name}{_dims(node)} ~ {expression_text(node.draw)}"
        case tree.Parameter():
            default = f" = {expression_text(node.default)}" if node.default is not None else ""
            return f"{node.name}: {node.type}{default}"
    raise AssertionError(f"no text for {type(node).__name__}")


def _param(node: tree.Param) -> str:
    scope = f"({node.shared})" if isinstance(node.shared, str) else ""
    flags = "frozen " * node.frozen + f"shared{scope} " * bool(node.shared)
    start = [f"~ {expression_text(node.draw)}"] if node.draw is not None else []
    start += [f"= {expression_text(node.init)}"] if node.init is not None else []  # the one or the other, never both
    clauses = [f"rate {expression_text(node.rate)}"] if node.rate is not None else []
    clauses += ["no decay"] * (not node.decay) + [f"on {node.manifold}"] * bool(node.manifold)
    return " ".join([f"{flags}param {node.name}{_dims(node)}", *start, *clauses])


def _dims(node: tree.Param | tree.Noise) -> str:
    return f"[{', '.join(map(expression_text, node.dims))}]" if node.dims else ""


def _listed(selectors: tuple) -> list[str]:
    """The selectors of a list, each with the comma after it."""
    texts = [f'"{s.text}"' if isinstance(s, tree.Pattern) else s.name for s in selectors]
    return [f"{text}," for text in texts[:-1]] + texts[-1:]


# ------------------------------------------------------------------------------------------------------ layout


def _signed(name: str, params: tuple[tree.Parameter, ...], tail: str) -> list[Line]:
    """`name(params)tail` on one line, or one parameter a line where that is too long or has comments."""
    line = f"{name}({', '.join(map(_simple, params))}){tail}"
    if len(line) <= WIDTH and not any(p.trivia.above or p.trivia.beside or p.trivia.inside for p in params):
        return [(line, "")]
    return [(f"{name}(", ""), *[line for p in params for line in _plain(p.trivia, [f"{_simple(p)},"], 1)],
            (f"){tail}", "")]


def _plain(trivia: Trivia, chunks: list[str], level: int) -> list[Line]:
    """A statement without a block."""
    return _statement(trivia, _wrapped(chunks), level=level)


def _statement(trivia: Trivia, head: list[Line], body: Iterable[Line] | None = None, level: int = 0) -> list[Line]:
    """The comments above, the head with its comment, and the block if there is one."""
    indented = [(INDENT * level + text, comment) for text, comment in head]
    lines = [("", "")] * trivia.blank + _comments(trivia.above, level)
    lines += [*indented[:-1], (indented[-1][0], trivia.beside)]
    if body is None:
        return lines + _comments(trivia.inside, level)
    return [*lines, *body, *_comments(trivia.inside, level + 1), (INDENT * level + "}", "")]


def _comments(comments: tuple[str, ...], level: int) -> list[Line]:
    return [(INDENT * level + comment if comment else "", "") for comment in comments]


def _wrapped(chunks: list[str]) -> list[Line]:
    """The chunks with spaces between, in lines that are no longer than `WIDTH` where a break can help."""
    # a pattern is never broken, so that a line with a long one may still be longer
    lines = [chunks[0]]
    for chunk in chunks[1:]:
        if len(lines[-1]) + 1 + len(chunk) <= WIDTH:
            lines[-1] += f" {chunk}"
        else:
            lines.append(f"{INDENT * 2}{chunk}")
    return [(line, "") for line in lines]
