"""From an expression's text to its value: a compile-time value or an `Expr` with a shape.

Takes the tree of an expression and a scope of names; gives a number, text, truth value, symbolic size or tensor
expression. Promises: a mistake is a diagnostic at its place; an undecided condition (a size not known yet) is never
guessed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import reduce
from typing import Any

from surgery.diagnostics import Span, fail
from surgery.ir.expression import Expr
from surgery.ir.operations import (
    FUNCTIONS,
    OPERATORS,
    PRIMITIVES,
    ShapeError,
    constant,
    eye,
    make,
    ones,
    shape_text,
    undecided,
)
from surgery.ir.sizes import Dim, Size, divide, divisor, has_few_digits, is_real, log2, open_power, power, symbol, tidy
from surgery.language import tree
from surgery.language.formatter import expression_text
from surgery.language.well_formed import MAX_INT
from surgery.semantics.scope import NUMBERS, POISON, UNDECIDED, Body, Poisoned, describe, known_elsewhere, text, unknown

MAX_NUMBERS = 2**60  # of a tensor: torch counts its bytes in 63 bits
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": divide}
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_LARGEST_POWER = 64  # of a tensor
_OF_ALL = ("norm",)  # entries, where authors may mean those of a row
_KEEP_WHOLE = ("abs", "min", "max", "relu", "sign", "clamp")
_CONSTANT_NAMES = {"pi": math.pi}  # where nothing else is called so


def evaluate(node: tree.Expression, names: Mapping[str, Any]) -> Any:
    """The value of `node` where `names` are in scope. Raises: SurgeryError, Poisoned."""
    try:
        value = _RULES[type(node)](node, names)
        # No number beyond those that a spec can hold, even on the way: Python's own have no end, and a fraction whose
        # digits double at each `let` would take all memory.
        is_endless = (isinstance(value, float) and not math.isfinite(value)
                      or isinstance(value, Fraction) and not has_few_digits(value))
        if is_endless or isinstance(value, (int, Fraction)) and abs(value) > MAX_INT:
            raise OverflowError
        if isinstance(value, Expr):
            assert_can_exist(value.shape, node.span)
        return value
    except ShapeError as error:
        # of an operator the place says who it is that the shapes do not fit
        callee = node.function if isinstance(node, tree.Call) else ".T" if isinstance(node, tree.Transpose) else ""
        one = node.arguments[error.argument] if isinstance(node, tree.Call) and error.argument is not None else None
        raise fail("shape-mismatch", f"{f'`{callee}` ' if callee else ''}{error}",
                   one.value.span if one else node.span, helps=error.helps,
                   notes=() if node.span else (f"in `{expression_text(node)}`",)) from None
    except ZeroDivisionError:
        raise fail("bad-value", f"`{expression_text(node)}` divides by zero", node.span,
                   notes=here(node, names)) from None
    except (OverflowError, ValueError):
        raise fail("bad-value", f"`{expression_text(node)}` is no real number, or too large a one", node.span,
                   notes=here(node, names)) from None


def assert_can_exist(shape: Iterable[Size], span: Span | None) -> None:
    """Raises: SurgeryError (bad-value), for a shape of more numbers than a tensor can hold."""
    shape = tuple(shape)
    if math.prod(n for n in shape if isinstance(n, int)) > MAX_NUMBERS:
        raise fail("bad-value", f"a tensor {shape_text(shape)} holds more numbers than there can be", span)


def here(node: tree.Expression, names: Mapping[str, Any]) -> tuple[str, ...]:
    """The note that says what the names of an expression stand for, where they stand for numbers."""
    known = [f"{n} = {text(names[n])}" for n in names_in(node)
             if isinstance(names.get(n), (bool, int, float, Fraction))]
    return (f"here {', '.join(known)}",) if known else ()


def names_in(node: Any) -> dict[str, None]:
    """Every name that the expressions of a node read, in order."""
    return dict.fromkeys(n.id for n in nodes(node) if isinstance(n, tree.Name))


def nodes(node: Any) -> Iterator[Any]:
    """A tree node and everything below it."""
    yield node
    if isinstance(node, tree.Node):
        children = [getattr(node, f) for f, info in type(node).model_fields.items() if not info.exclude]
    else:
        children = [getattr(node, f) for f, info in getattr(node, "__dataclass_fields__", {}).items() if info.compare]
    for child in children:
        for c in child if isinstance(child, tuple) else (child,):
            if isinstance(c, (tree.Node, tree.Expression, tree.Argument)):
                yield from nodes(c)


#: What a start may name that data gives, where nothing else of the definition has the name.
OF_DATA_NAMES = {"G": ("gradient", ("out", "in")), "C": ("inputs", ("in", "in"))}


def _name(node: tree.Name, names: Mapping[str, Any]) -> Any:
    if node.id not in names and node.id in OF_DATA_NAMES and "W" in names:
        op, sides = OF_DATA_NAMES[node.id]
        return Expr(op, (), None, tuple(names[side] for side in sides))
    if node.id not in names and node.id in _CONSTANT_NAMES:
        return _CONSTANT_NAMES[node.id]
    if node.id not in names:
        inside = names.inside.get(node.id) if isinstance(names, Body) else None
        helps = (f"`{node.id}` is made anew in each round of `{inside}`; what is handed on is a `let` that stands "
                 "above it",) if inside else known_elsewhere(node.id)
        raise unknown("unknown-name", "name", node.id, names, node.span, helps)
    if names[node.id] is POISON:
        raise Poisoned
    return names[node.id]


def _unary(node: tree.Unary, names: Mapping[str, Any]) -> Any:
    value = evaluate(node.operand, names)
    if node.op == "not":
        return value if value is UNDECIDED else not truth(value, node.operand)
    _numeric(value, node.operand)
    return make("neg", value) if isinstance(value, Expr) else -value


def _binary(node: tree.Binary, names: Mapping[str, Any]) -> Any:
    left, right = evaluate(node.left, names), evaluate(node.right, names)
    if node.op in ("and", "or"):
        # One true decides `or`, one false decides `and`, whatever is not known of the other side.
        sides = [v if v is UNDECIDED else truth(v, n) for v, n in ((left, node.left), (right, node.right))]
        decisive = node.op == "or"
        if decisive in [v for v in sides if v is not UNDECIDED]:
            return decisive
        return UNDECIDED if UNDECIDED in sides else not decisive
    if node.op in _ORDER or node.op in ("==", "!="):
        return _compare(node, left, right)
    _numeric(left, node.left)
    _numeric(right, node.right)
    if isinstance(left, Expr) or isinstance(right, Expr):
        if node.op == "/" and isinstance(right, NUMBERS) and not isinstance(right, Dim) and right == 0:
            raise ZeroDivisionError  # of a tensor it is 0, but nobody writes that down
        return make(OPERATORS[node.op], tensor(left), tensor(right))
    if node.op == "@":
        raise ShapeError("`@` needs matrices, not two numbers; use `*`")
    return tidy(_ARITHMETIC[node.op](left, right))


def _compare(node: tree.Binary, left: Any, right: Any) -> Any:
    if isinstance(left, Expr) or isinstance(right, Expr):
        return _compared_entries(node, left, right)
    if UNDECIDED in (left, right):
        return UNDECIDED
    # What is equal stays so at every size; what differs in an unknown may be equal at one of them.
    if node.op in ("==", "!="):
        return (left == right) == (node.op == "==") if not _open(left, right) or left == right else UNDECIDED
    _numeric(left, node.left)
    _numeric(right, node.right)
    return UNDECIDED if _open(left, right) else _ORDER[node.op](left, right)


def _compared_entries(node: tree.Binary, left: Any, right: Any) -> Expr:
    """1 where it is so and 0 elsewhere, for each entry, with no gradient: of tensors it can be nothing else."""
    if node.op in ("==", "!="):
        raise fail("wrong-type", f"`{node.op}` needs compile-time values; entries of tensors are hardly ever equal",
                   node.span, helps=("compare with `<`, `<=`, `>` or `>=`, which give 1 or 0 for each entry",))
    _numeric(left, node.left)
    _numeric(right, node.right)
    high, low = (left, right) if node.op[0] == ">" else (right, left)
    if node.op in ("<", ">"):
        return make("relu", make("sign", make("sub", tensor(high), tensor(low))))
    below = make("relu", make("sign", make("sub", tensor(low), tensor(high))))
    return make("sub", constant(1.0), below)


def _open(*values: Any) -> bool:
    return any(isinstance(v, Dim) for v in values)


def _numeric(value: Any, node: tree.Expression) -> None:
    if isinstance(value, bool) or not isinstance(value, (*NUMBERS, Expr)):
        raise fail("wrong-type", f"a number or a tensor is needed here, not {describe(value)}", node.span)


def truth(value: Any, node: tree.Expression) -> bool:
    """The value of a condition. Raises: SurgeryError (wrong-type), for what is none."""
    if not isinstance(value, bool):
        of_tensor = "what is known at compile time decides; of tensors, multiply by `a > b`, 1 or 0 for each entry"
        raise fail("wrong-type", f"a condition is needed here, not {describe(value)}", node.span,
                   helps=(of_tensor,) * isinstance(value, Expr))
    return value


def tensor(value: Any) -> Expr:
    """The value as a tensor. Raises: OverflowError for a number that float32, in which adapters compute,
    cannot hold."""
    if isinstance(value, (int, float, Fraction)) and abs(value) > MAX_FLOAT32:
        raise OverflowError
    return value if isinstance(value, Expr) else constant(value)


def _transpose(node: tree.Transpose, names: Mapping[str, Any]) -> Expr:
    value = evaluate(node.operand, names)
    if not isinstance(value, Expr):
        raise fail("wrong-type", f"`.T` needs a matrix, not {describe(value)}", node.span)
    return make("T", value)


def _if(node: tree.If, names: Mapping[str, Any]) -> Any:
    condition = evaluate(node.condition, names)
    if condition is not UNDECIDED:
        is_then = truth(condition, node.condition)
        # What stands in the other side counts where calls are numbered: which side holds renames no parameter.
        if not is_then:
            _pass_over(node.then, names)
        value = evaluate(node.then if is_then else node.otherwise, names)
        if is_then:
            _pass_over(node.otherwise, names)
        return value
    # Both sides are read, so that mistakes in either are found before sizes are known; which one holds is not guessed.
    both = evaluate(node.then, names), evaluate(node.otherwise, names)
    if all(isinstance(v, Expr) for v in both):
        return both[0] if both[0] is both[1] else undecided(both, expression_text(node))
    return both[0] if both[0] == both[1] else symbol(f"({expression_text(node)})", any(map(is_real, both)))


def _pass_over(node: tree.Expression, names: Mapping[str, Any]) -> None:
    if isinstance(names, Body):
        for call in definition_calls(node, names.known):
            names.named(call.function)


def definition_calls(node: Any, known: Mapping[str, tree.Definition]) -> Iterator[tree.Call]:
    """The calls of definitions in a node. What is a primitive's name means the primitive."""
    laws = [each.draw for each in nodes(node) if isinstance(each, (tree.Param, tree.Noise))]
    for each in nodes(node):
        if isinstance(each, tree.Call) and each.function in known and each.function not in callable_names() and (
                not any(each is law for law in laws)):
            yield each


def _matrix(node: tree.Matrix, names: Mapping[str, Any]) -> Expr:
    def number(entry: tree.Expression) -> int | float:
        value = evaluate(entry, names)
        if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
            raise fail("wrong-type", f"an entry of a matrix must be a known number, not {describe(value)}", entry.span)
        return float(value) if isinstance(value, Fraction) else value

    return make("literal", data=tuple(tuple(map(number, row)) for row in node.rows))


def _einsum(node: tree.Call, names: Mapping[str, Any]) -> Expr:
    """Of an equation and the tensors that it names."""
    if len(node.arguments) < 2 or any(a.name for a in node.arguments):
        raise fail("missing-argument" if len(node.arguments) < 2 else "unknown-argument",
                   '`einsum` takes an equation and at least one tensor: `einsum("ab,bc->ac", A, B)`', node.span)
    equation, *values = (evaluate(a.value, names) for a in node.arguments)
    if not isinstance(equation, str):
        raise fail("wrong-type", f'`einsum` needs an equation like "ab,bc->ac", not {describe(equation)}',
                   node.arguments[0].value.span)
    for value, argument in zip(values, node.arguments[1:]):
        _numeric(value, argument.value)
    return make("einsum", *map(tensor, values), data=(equation,))


def callable_names() -> set[str]:
    """All that an expression can call."""
    return FUNCTIONS | set(_COMPILE_TIME)


def _call(node: tree.Call, names: Mapping[str, Any]) -> Any:
    if node.function in _COMPILE_TIME:
        return _at_compile_time(node, names)
    if node.function == "einsum":
        return _einsum(node, names)
    if node.function not in FUNCTIONS:
        if isinstance(names, Body) and node.function in names.known:
            return names.call(node, names.named(node.function))
        callable_here = callable_names() | ({*names.known} if isinstance(names, Body) else set())
        raise unknown("unknown-primitive", "primitive", node.function, callable_here, node.name_span or node.span)
    if node.function in _CONSTANTS:
        arity, sizes = _CONSTANTS[node.function][:2]
    else:
        arity, sizes = PRIMITIVES[node.function].arity, PRIMITIVES[node.function].sizes
        assert arity is not None  # what a spec can call takes so many tensors
    if _OF_ANY.get(node.function, 0) >= len(node.arguments) > 2 and not any(a.name for a in node.arguments):
        return _from_left(node, names)
    _assert_count(node, arity, sizes)
    values = [evaluate(a.value, names) for a in node.arguments]
    for value, argument in zip(values, node.arguments):
        _numeric(value, argument.value)
    for value, argument in zip(values[arity:], node.arguments[arity:]) if arity else ():
        if isinstance(value, Expr):
            raise fail("wrong-type", f"a dimension must be a whole number, not {describe(value)}", argument.value.span,
                       helps=(f"the call is `{PRIMITIVES[node.function].call}`",))
    least = 0 if node.function == "range" else 1
    given = tuple(size(v, a.value, names, least) for v, a in zip(values[arity:], node.arguments[arity:]))
    if node.function in _CONSTANTS:
        return _CONSTANTS[node.function][2](*given)
    # A number in the place of places is the first so many, where that can be said.
    row = PRIMITIVES[node.function]
    tensors = [_places_below(size(value, argument.value, names))
               if row.counts and i in row.places and not isinstance(value, Expr) else value
               for i, (value, argument) in enumerate(zip(values[:arity], node.arguments))]
    return _apply(node, tensors, given)


#: What takes two tensors and, from the left, any number of them up to this one.
_OF_ANY: dict[str, int] = dict.fromkeys(("min", "max", "kron", "side_by_side", "stacked"), 32)


def _from_left(node: tree.Call, names: Mapping[str, Any]) -> Any:
    """f(a, b, c) is f(f(a, b), c)."""
    values = [evaluate(argument.value, names) for argument in node.arguments]
    for value, argument in zip(values, node.arguments):
        _numeric(value, argument.value)
    return reduce(lambda made, value: _apply(node, [made, value], ()), values)


def _places_below(n: Size) -> Expr:
    return make("range", data=(0, n))


def _assert_count(node: tree.Call, arity: int, sizes: tuple[str, ...]) -> None:
    """Raises: SurgeryError, unless the call has so many tensors and sizes (any number, at least one,
    for a last `*size`)."""
    least, any_number = arity + len(sizes), sizes[-1:] and sizes[-1].startswith("*")
    count = len(node.arguments)
    if count < least or (count > least and not any_number) or any(a.name for a in node.arguments):
        takes = f"{'at least ' if any_number else ''}{least} argument{'s' * (least > 1)} by position"
        by_rows = node.function in _OF_ALL and bool(node.arguments)
        names = f" ({', '.join(['tensor'] * arity + [s.lstrip('*') for s in sizes])})" if sizes else ""
        raise fail("missing-argument" if count < least else "unknown-argument",
                   f"`{node.function}` takes {takes}{names}",
                   node.span, notes=(f"{node.function} is {PRIMITIVES[node.function].doc}",)
                   if node.function in PRIMITIVES else (),
                   helps=("of each row it is `row_norm(A)`, of each column `col_norm(A)`",) * by_rows)


def _apply(node: tree.Call, values: list, sizes: tuple) -> Any:
    if sizes or any(isinstance(v, Expr) for v in values):
        return make(node.function, *map(tensor, values), data=sizes or None)
    of_numbers = PRIMITIVES[node.function].number
    if of_numbers is None:
        raise fail("wrong-type", f"`{node.function}` needs a tensor, not {describe(values[0])}", node.span)
    if _open(*values):
        becomes_real = node.function not in _KEEP_WHOLE or any(map(is_real, values))
        return symbol(f"{node.function}({', '.join(map(str, values))})", becomes_real)
    return of_numbers(*values)


_CONSTANTS = {"I": (0, ("n",), eye), "ones": (0, ("*sizes",), ones), "indices": (0, ("n",), _places_below)}


def _at_compile_time(node: tree.Call, names: Mapping[str, Any]) -> Any:
    """A function of compile-time numbers alone."""
    (least, most), read, function = _COMPILE_TIME[node.function]
    if not least <= len(node.arguments) <= most or any(a.name for a in node.arguments):
        count = f"{least} to {most} numbers" if most > least else "one number" if most == 1 else f"{most} numbers"
        raise fail("missing-argument" if len(node.arguments) < least else "unknown-argument",
                   f"`{node.function}` takes {count} by position", node.span)
    given = [evaluate(a.value, names) for a in node.arguments]
    if node.function == "pow" and isinstance(given[0], Expr):
        return _tensor_power(node, given[0], _number(given[1], node.arguments[1].value, names))
    values = [read(value, a.value, names) for value, a in zip(given, node.arguments)]
    if not _open(*values):
        return function(*values)
    return open_power(*values) if node.function == "pow" else symbol(f"{node.function}({', '.join(map(str, values))})")


def _tensor_power(node: tree.Call, base: Expr, exponent: int | float | Fraction | Dim) -> Expr:
    """The product of so many. Raises: SurgeryError (bad-value) for what is no such count."""
    if _open(exponent):
        return undecided((base, base), expression_text(node))
    if not isinstance(exponent, int) or not 1 <= exponent <= _LARGEST_POWER:
        raise fail("bad-value", f"a tensor is raised to a whole number from 1 to {_LARGEST_POWER}, not {exponent}",
                   node.arguments[1].value.span,
                   helps=("of a tensor x, the root is `sqrt(x)`, and x to the power -1 is `1 / x`",))
    half = _tensor_power(node, base, exponent // 2) if exponent > 1 else None
    square = base if half is None else make("mul", half, half)
    return make("mul", square, base) if half is not None and exponent % 2 else square


def _number(value: Any, node: tree.Expression, names: Mapping[str, Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise fail("wrong-type", f"a number known at compile time is needed here, not {describe(value)}", node.span)
    return value


def size(value: Any, node: tree.Expression, names: Mapping[str, Any], least: int = 1) -> Any:
    """The value of `node` as a dimension, or as a place (`least` 0). Raises: SurgeryError (wrong-type, not-divisible,
    bad-value)."""
    if isinstance(value, bool) or not isinstance(value, (int, Fraction, Dim)) or is_real(value):
        raise fail("wrong-type", f"a dimension must be a whole number, not {describe(value)}", node.span,
                   helps=("a parameter that is a size is an `int`",) * is_real(value))
    if isinstance(value, Fraction):
        raise fail("not-divisible", f"the dimension `{expression_text(node)}` is {value}, which is not whole",
                   node.span,
                   label=f"is {value}", notes=here(node, names), helps=("choose a size that divides it",))
    if isinstance(value, int) and value < least:
        what = "dimension" if least else "place"
        raise fail("bad-value", f"the {what} `{expression_text(node)}` is {value}; it must be at least {least}",
                   node.span,
                   notes=here(node, names), helps=("each size is written out",) * (expression_text(node) == "-1"))
    return value


_COMPILE_TIME = {"divisor": ((1, 2), size, divisor), "floor": ((1, 1), _number, math.floor),
                 "log2": ((1, 1), _number, log2), "pow": ((2, 2), _number, power)}

_RULES = {
    tree.Number: lambda node, names: node.value,
    tree.String: lambda node, names: node.value,
    tree.Boolean: lambda node, names: node.value,
    tree.Name: _name, tree.Unary: _unary, tree.Binary: _binary, tree.Transpose: _transpose, tree.If: _if,
    tree.Call: _call,
    tree.Matrix: _matrix,
}
