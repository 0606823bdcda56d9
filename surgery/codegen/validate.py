"""Translation validation: emitted text is run on symbols, and what it returns must be what its expressions mean.

Takes the text of a program or of a step, and the expressions that it was made of; gives what is wrong with it, in words
(nothing for a proof). Promises: it knows nothing of how text is made, and has tables of its own. Each name stands for a
symbol and the memory in which that lies; a line that writes over memory makes every other name for it unreadable; only
memory that the function itself has allocated may be written over, and, where autograd records, only what no gradient
needs. Sums and products are commutative, what is turned twice is itself, and a fused operation is the sum that it
computes; nothing else is rewritten. No torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from surgery.codegen.validate_meanings import DRAWS, OF_PLACES, Meaning, Symbols, meanings, one_pass, orders
from surgery.ir.expression import Expr, walk

# Functions that give memory of their own. (Any other may give a view of what it takes.)
_ALLOCATE = {"+", "*", "@", "frozen", "frozen_biased", "frozen_back", "layer.run", "layer.run_alone", "put", "blocks",
             "masked", "mix", "spectrum", "waves", "mixed", "mixed_back", "mixed_dot", "circulate", "circulate_back",
             "circulate_dot", "column_dot", "column_sum", "dot", "block_dot", "side_by_side", "zeros_like", "columns",
             "placed"}
# What autograd keeps for a gradient: nothing of these, the operands of those; of any other both, operands and result.
_KEEP_NOTHING = {"+", "put", "T", "unflatten", "flatten", "reshape", "index", "detach", "to", "clone"}
_KEEP_OPERANDS = {"*", "@", "frozen", "frozen_biased", "frozen_back", "layer.run", "layer.run_alone", "blocks"}
_VIEWS = {"unflatten", "flatten", "reshape"}  # methods; they may copy, and are then held to what holds for a view
_METHODS = {"exp", "sqrt", "abs", "tanh", "sigmoid", "cos", "sin", "relu", "sign", "sum", "diag_embed"}
_SAME_MAP = {"frozen": "frozen", "frozen_flat": "frozen", "frozen_rows": "frozen", "frozen_biased": "frozen_biased",
             "frozen_exact": "frozen", "frozen_back": "frozen_back", "frozen_back_exact": "frozen_back"}
_ELSEWHERE = {"column_blocks": "blocks", "thin": "@"}  # the same, made in another way
_DTYPES = {"dtype", "cast"}
_ONE_PASS = {"gained", "gained_dot", "gained_back", "masked_times", "times_masked", "masked_outer"}


class Fault(Exception):
    """What is wrong with a text."""


@dataclass(frozen=True)
class Held:
    """A value in a run: its meaning, the memory that it may lie in (each with the version it had), and whether that is
    the function's own, all of it."""

    meaning: Meaning
    memory: frozenset[tuple[int, int]] = frozenset()
    owned: bool = False


# ----------------------------------------------------------------------------------------------------- running text


class Run:
    """One function, run on symbols. `recorded`: whether autograd records its lines; `owns_calls`: whether what the
    layer gives is memory of its own, as that of a module that is called need not be."""

    def __init__(self, symbols: Symbols, recorded: bool, owns_calls: bool = True):
        self.symbols, self.recorded, self.owns_calls = symbols, recorded, owns_calls
        self.names: dict[str, Any] = {}
        self.versions: list[int] = []
        self.kept: set[int] = set()  # memory that a gradient needs
        self.draws: dict[tuple, int] = {}
        self.without_gradient = False

    def results(self, function: ast.FunctionDef, arguments: Mapping[str, Any]) -> Any:
        """What it returns. Raises: Fault."""
        names = [argument.arg for argument in function.args.args]
        if missing := set(names) - {*arguments, "layer", *_DTYPES, "leaves"}:
            raise Fault(f"`{function.name}` takes {', '.join(sorted(missing))}, which nothing gives")
        self.names = {name: self._given(arguments[name]) for name in names if name in arguments}
        if missing := (_read_by(function) & _DTYPES).difference(names):
            raise Fault(f"`{function.name}` reads {', '.join(sorted(missing))}, which nothing gives")
        result = None
        for statement in function.body:
            result = self._statement(statement)
        return result

    def _given(self, value: Any) -> Any:
        """An argument, in memory that belongs to others."""
        return list(map(self._given, value)) if isinstance(value, list) else self._placed(value, owned=False)

    def _placed(self, meaning: Meaning, owned: bool = True) -> Held:
        self.versions.append(0)
        return Held(meaning, frozenset({(len(self.versions) - 1, 0)}), owned)

    def _statement(self, statement: ast.stmt) -> Any:
        try:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    if name in self.names:
                        raise Fault(f"`{name}` is there already")
                    self.names[name] = self._value(value)
                case ast.Delete(targets=[ast.Name(id=name)]):
                    self._named(name)
                    del self.names[name]
                case ast.With(items=[ast.withitem(context_expr=context)], body=body) \
                        if ast.unparse(context) == "torch.no_grad()":
                    self.without_gradient = True
                    for inner in body:
                        self._statement(inner)
                    self.without_gradient = False
                case ast.Return(value=ast.expr() as value):
                    return self._returned(value)
                case _:
                    raise Fault("is no line that a program has")
        except Fault as fault:
            text = str(fault) if "line `" in str(fault) else f"line `{ast.unparse(statement)}`: {fault}"
            raise Fault(text) from None
        return None

    def _returned(self, node: ast.expr) -> Any:
        """Meanings, nested as the tuples are; None for none."""
        if isinstance(node, ast.Tuple):
            return list(map(self._returned, node.elts))
        return None if isinstance(node, ast.Constant) and node.value is None else self._value(node).meaning

    def _named(self, name: str) -> Any:
        if name not in self.names:
            raise Fault(f"`{name}` is not there")
        return self.names[name]

    def _read(self, name: str, held: Any) -> Held:
        if not isinstance(held, Held):
            raise Fault(f"`{name}` is no one value")
        if any(self.versions[memory] != version for memory, version in held.memory):
            raise Fault(f"`{name}` has been written over")
        return held

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                return self._read(name, self._named(name))
            case ast.Constant(value=int() | float() as number):
                return Held(self.symbols.number(number))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return Held(self.symbols.number(-number))
            case ast.Subscript(value=ast.Name(id="leaves"), slice=ast.Constant(value=key)):
                return self._placed(self.symbols.of("leaf", key), owned=False)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as index)) \
                    if isinstance(values := self._named(name), list):
                if index >= len(values):
                    raise Fault(f"`{name}` has {len(values)} values, and no `[{index}]`")
                return self._read(f"{name}[{index}]", values[index])
            case ast.Subscript(value=a, slice=index):
                return self._view("index", self._value(a), ast.unparse(index).strip("()"))
            case ast.Attribute(value=ast.BinOp(left=a, op=ast.MatMult(), right=b), attr="mT") \
                    if "mT" in (getattr(a, "attr", ""), getattr(b, "attr", "")):  # (aᵀ bᵀ)ᵀ = b a, (aᵀ b)ᵀ = bᵀ a, ...
                right = self._transposed(b)
                return self._computed("@", right, self._transposed(a))
            case ast.Attribute(value=a, attr="mT"):
                held = self._value(a)
                return replace(self._view("T", held), owned=held.owned)
            case ast.BinOp(left=a, op=operation, right=b):
                names = {ast.Add: "+", ast.Mult: "*", ast.MatMult: "@"}
                if type(operation) not in names:
                    raise Fault("has an operation that no program has")
                return self._computed(names[type(operation)], self._value(a), self._value(b))
            case ast.Call():
                return self._call(node)
        raise Fault(f"`{ast.unparse(node)}` is nothing that a program has")

    def _transposed(self, node: ast.expr) -> Held:
        """aᵀ, which of a text `aᵀ` is a itself."""
        match node:
            case ast.Attribute(value=a, attr="mT"):
                return self._value(a)
        return self._view("T", self._value(node))

    # -------------------------------------------------------------------------------------------------- memory

    def _view(self, name: str, a: Held, *data: Any) -> Held:
        return Held(self.symbols.of(name, a.meaning, *data), a.memory)

    def _computed(self, name: str, *parts: Any, meaning: Meaning | None = None) -> Held:
        """An operation's result, in memory of its own if it is known to be so."""
        operands = [part for part in parts if isinstance(part, Held)]
        if meaning is None:
            meaning = self.symbols.of(name, *(p.meaning if isinstance(p, Held) else p for p in parts))
        if self.without_gradient:
            meaning = self.symbols.constant(meaning)
        is_call = name in (*_SAME_MAP, "layer.run", "layer.run_alone")
        own = name in _ALLOCATE and (self.owns_calls or not is_call)
        result = self._placed(meaning, owned=own)
        if not own:
            result = replace(result, memory=result.memory.union(*(held.memory for held in operands)))
        if name not in _KEEP_NOTHING:
            self._keep(*operands, *([] if name in _KEEP_OPERANDS else [result]))
        return result

    def _keep(self, *values: Held) -> None:
        if self.recorded and not self.without_gradient:
            self.kept |= {memory for held in values for memory, _ in held.memory}

    def _written(self, base: Held, meaning: Meaning, *operands: Held) -> Held:
        """The base, written over with something that is computed of it and the operands."""
        if not base.owned or len(base.memory) != 1:
            raise Fault("writes over what is not the function's own")
        ((memory, version),) = base.memory
        if any((memory, version) in operand.memory for operand in operands):
            raise Fault("writes over what it reads")
        if memory in self.kept:
            raise Fault("writes over what a gradient needs")
        self.versions[memory] += 1
        held = Held(meaning, frozenset({(memory, version + 1)}), owned=True)
        return held

    # --------------------------------------------------------------------------------------------------- calls

    def _call(self, node: ast.Call) -> Any:
        name = _name(node.func)
        is_onto = name in ("layer.frozen_onto", "layer.frozen_back_onto")
        if any(keyword.arg not in (("beta",) if is_onto else ("alpha", "value")) for keyword in node.keywords):
            raise Fault("has an argument by a name that none has")
        factor, = [float(ast.literal_eval(keyword.value)) for keyword in node.keywords] or [1.0]
        if name.startswith("torch."):
            return self._sum(name.removeprefix("torch."), [*map(self._value, node.args)], factor)
        if is_onto:
            base, rows = map(self._value, node.args)
            return self._onto(name.removeprefix("layer.").removesuffix("_onto"), base, rows, factor)
        if name.startswith("layer."):
            return self._of_layer(name.removeprefix("layer."), node.args)
        if isinstance(node.func, ast.Attribute):
            return self._method(self._value(node.func.value), node.func.attr, node.args, factor)
        if name in DRAWS:
            return self._drawn(name, *node.args)
        # sizes are tuples: a number by itself is a value
        parts = [self._data(a) if isinstance(a, ast.Tuple) else self._value(a) for a in node.args]
        if name in OF_PLACES:
            data, a = parts
            return self._computed(name, data, replace(a, meaning=self.symbols.constant(a.meaning)))
        if name == "masked_":
            base, mask = parts
            return self._written(base, self.symbols.of("masked", base.meaning, mask.meaning), mask)
        if name in ("add_blocks", "add_masked", "add_placed", "add_circulant", "put"):
            return self._sum(name, parts, factor)
        if name == "apart":
            return self._placed(parts[0].meaning)
        if name in _ONE_PASS:
            return self._in_one_pass(name, parts)
        if name == "outer":
            a, g = parts
            product = self.symbols.of("@", self.symbols.of("T", a.meaning), g.meaning)
            return self._computed("@", a, g, meaning=self.symbols.times(factor, product))
        if factor != 1.0:
            raise Fault(f"`{name}` has no number in front")
        return self._computed(_ELSEWHERE.get(name, name), *parts)

    def _in_one_pass(self, name: str, parts: list[Any]) -> Any:
        """What is computed together, each in memory of its own: one value, or a list of them."""
        data, operands = ((), parts) if isinstance(parts[0], Held) else (parts[0], parts[1:])
        self._keep(*operands)  # autograd does not see into it
        try:
            computed = one_pass(self.symbols, name, data, [operand.meaning for operand in operands])
        except (IndexError, TypeError, ValueError):
            raise Fault(f"`{name}` is not called with {len(operands)} operands and {data}") from None
        values = [self._placed(meaning) for meaning in computed]
        return values if len(values) > 1 else values[0]

    def _data(self, node: ast.expr) -> Any:
        """What is known: numbers and their tuples."""
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise Fault(f"`{ast.unparse(node)}` is no number that is known") from None

    def _drawn(self, name: str, a: ast.expr, chance: ast.expr) -> Held:
        """A new draw each time."""
        held, share = self._value(a), self._data(chance)
        kind = (name, held.meaning, share)
        turn = self.draws[kind] = self.draws.get(kind, -1) + 1
        return self._computed(name, held, share, turn)

    def _sum(self, name: str, parts: list[Held], factor: float) -> Held:
        """y + c z, in memory of its own or over y."""
        symbols = self.symbols
        if name == "zeros_like":
            return self._computed(name, *parts)
        base, *terms = parts
        means = [term.meaning for term in terms]
        match name.removesuffix("_"), means:
            case "add", [z]:
                is_product = symbols.names[z.value] in ("@", "frozen", "frozen_biased", "frozen_back")
                if self.recorded and factor != 1 and is_product:
                    raise Fault("takes a multiple of a product, of which a compiler forgets the factor")
                added = z
            case "addmm", [a, b]:
                added = symbols.of("@", a, b)
            case "addcmul", [a, b]:
                added = symbols.of("*", a, b)
            case "add_blocks", [a, s]:
                added = symbols.of("blocks", a, s)
            case "add_masked", [a, b, mask]:
                added = symbols.of("masked", symbols.of("@", a, b), mask)
            case "add_placed", [a, places]:
                added = symbols.of("placed", tuple(symbols.shapes.get(base.meaning.value, ())[-1:]), a, places)
            case "add_circulant", [c]:
                if not self.without_gradient:
                    raise Fault("takes a gradient through a sum that is written into memory")
                added = symbols.of("circulant", c)
            case "put", [values, places]:
                added = symbols.of("scatter", symbols.shapes.get(base.meaning.value), values, places)
            case _:
                raise Fault(f"`{name}` is no operation that a program has")
        meaning = symbols.of("+", base.meaning, symbols.times(factor, added))
        if name in ("addmm", "addcmul", "addmm_", "addcmul_"):
            self._keep(*terms)
        elif name in ("add_blocks", "add_masked", "add_placed"):
            self._keep(base, *terms)  # autograd does not see into them
        if name.endswith("_") or name in ("add_blocks", "add_masked", "add_placed"):
            return self._written(base, symbols.constant(meaning) if self.without_gradient else meaning, *terms)
        return self._computed("put" if name == "put" else "+", *parts, meaning=meaning)

    def _onto(self, name: str, base: Held, rows: Held, factor: float) -> Held:
        """c y + what the layer makes of rows, written into y."""
        self._keep(base, rows)  # autograd does not see into it
        added = self.symbols.of(name, rows.meaning)
        return self._written(base, self.symbols.of("+", self.symbols.times(factor, base.meaning), added), rows)

    def _of_layer(self, name: str, arguments: list[ast.expr]) -> Held:
        if name == "dropout":
            return self._drawn(name, *arguments)
        if name == "like":
            return Held(self.symbols.of("like"))
        known = [self._data(a) for a in arguments[:-1]] if name in ("fill", "eye") else []
        if name == "fill" and known[0] == ():
            return self._placed(self.symbols.number(known[1]))
        if name == "squares":
            known = [self._data(arguments[0])]
        values = [] if known else [self._value(a) for a in arguments if _name(a) not in _DTYPES]
        return self._computed(_SAME_MAP.get(name, f"layer.{name}"), *known, *values)

    def _method(self, a: Held, name: str, arguments: list[ast.expr], factor: float) -> Held:
        if name == "to":
            return replace(a, owned=False)
        if name == "clone":
            return self._placed(a.meaning)
        if name == "detach":
            return Held(self.symbols.constant(a.meaning), a.memory)
        if name in _VIEWS:
            return replace(self._view(name, a, *map(ast.literal_eval, arguments)), owned=a.owned)
        if name == "mul_":
            (c,) = map(self._value, arguments)
            self._keep(a, c)
            return self._written(a, self.symbols.of("*", a.meaning, c.meaning), c)
        if name in ("add_", "addmm_", "addcmul_"):
            return self._sum(name, [a, *map(self._value, arguments)], factor)
        if name in _METHODS and not arguments:
            return self._computed(name, a)
        raise Fault(f"`{name}` is no operation that a program has")


# ----------------------------------------------------------------------------------------------------- whole texts


def program_faults(source: str, outputs: Sequence[Expr], is_called: bool = False) -> list[str]:
    """What is wrong with `once`, `setup` and `body`, run one after the other: they must give the outputs (`body` the
    one that there is, or else `setup` all of them)."""
    functions, symbols = _functions(source), Symbols()

    def run() -> list[Meaning]:
        known = Run(symbols, True, not is_called).results(functions["once"], {})
        values = Run(symbols, True, not is_called).results(functions["setup"], {"known": known})
        if "body" not in functions:
            return values
        named = {f"a{i}": value for i, value in enumerate(values)}
        return [Run(symbols, True, not is_called).results(functions["body"], {"x": symbols.of("x"), **named})]

    return _compared(symbols, run, outputs, {})


def step_faults(source: str, body: Expr, gradients: Sequence[Expr | None], kept: Sequence[Expr]) -> list[str]:
    """What is wrong with `forward` and `backward`, the second run on what the first keeps: they must give the body and
    its gradients, in which a leaf `kept` stands for one of `kept`."""
    functions, symbols = _functions(source), Symbols()
    first = next(orders((body, *kept)))
    wanted = tuple(gradient for gradient in gradients if gradient is not None)

    def run() -> list[Meaning]:
        names = [argument.arg for argument in functions["forward"].args.args]
        values = {name: symbols.of("value", int(name[1:])) for name in names if name.startswith("a")}
        y, held = Run(symbols, False).results(functions["forward"], {"x": symbols.of("x"), **values})
        named = {"grad": symbols.of("grad"), **{f"k{i}": value for i, value in enumerate(held)}}
        given = Run(symbols, False).results(functions["backward"], named)
        if [g is None for g in given] != [g is None for g in gradients]:
            raise Fault("`backward` gives gradients of other things")
        return [y, *(g for g in given if g is not None)]

    leaves = {node: kept[node.data] for node in walk(*wanted) if node.op == "kept"}
    meanings(symbols, (body, *kept), {}, first)
    return _compared(symbols, run, (body, *wanted), leaves)


def _functions(source: str) -> dict[str, ast.FunctionDef]:
    statements = (statement for part in _PARTS.split(source) for statement in _parsed(part))
    return {statement.name: statement for statement in statements if isinstance(statement, ast.FunctionDef)}


_PARTS = re.compile(r"^(?=def )", re.MULTILINE)


@lru_cache(maxsize=1024)  # many programs have one function, as a set-up with other bodies; nothing changes a tree
def _parsed(part: str) -> list[ast.stmt]:
    return ast.parse(part).body


@lru_cache(maxsize=1024)
def _read_by(function: ast.FunctionDef) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(function) if isinstance(node, ast.Name))


def _name(node: ast.expr) -> str:
    """`f` or `a.f`, as nearly all that is called, without the machinery for any expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
    return ast.unparse(node)


def _compared(symbols: Symbols, run: Callable[[], list[Meaning]], outputs: Sequence[Expr],
              leaves: Mapping[Expr, Expr]) -> list[str]:
    def means_with(turns: Mapping[Expr, int]) -> dict[Expr, Meaning]:
        of_kept = meanings(symbols, leaves.values(), {}, turns)
        return meanings(symbols, outputs, {leaf: of_kept[expr] for leaf, expr in leaves.items()}, turns)

    ways = orders((*outputs, *leaves.values()))
    first = means_with(next(ways))  # before the text runs: `put` asks for the shapes
    try:
        results = run()
    except Fault as fault:
        return [str(fault)]
    wrong: list[str] = []
    for means in chain([first], map(means_with, ways)):
        wrong = [f"result {i} is not what its expression means" for i, output in enumerate(outputs)
                 if i >= len(results) or results[i] != means[output]]
        if len(results) != len(outputs):
            wrong.append(f"{len(results)} results are given, and not {len(outputs)}")
        if not wrong:
            break
    return wrong
