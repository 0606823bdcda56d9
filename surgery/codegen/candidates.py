"""Candidate programs of a formula: equal expressions over activations, the cheapest first.

Takes a formula and the kind of its layer; gives candidates, from which `program` makes code. Promises: no torch, so
that `check` can ask what a spec will cost; all candidates have the values and gradients of the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial, reduce
from math import inf

from surgery.codegen.apply_to_activations import apply, matrix, turned
from surgery.codegen.cost_model import (
    CPU,
    TOKENS_SUPPOSED,
    Cost,
    Machine,
    body_cost,
    has_gradients,
    numbers_made,
    recompute_cost,
    setup_cost,
)
from surgery.codegen.fuse_blocks import blockwise
from surgery.codegen.fuse_low_rank import thinly
from surgery.codegen.images_and_ids import alone, built, is_weight, spread
from surgery.codegen.join_products import joined
from surgery.codegen.operation_counts import size
from surgery.codegen.setup_order import in_cheapest_order, solved_once
from surgery.codegen.split_products import reassociated
from surgery.codegen.two_ways import at_once, by_transforms, either, with_gains_made
from surgery.ir.activations import EXACT
from surgery.ir.builders import summands
from surgery.ir.expression import (
    Exhausted,
    Expr,
    Formula,
    at_most,
    in_evaluation,
    in_training,
    rebuild,
    substituted,
    walk,
)
from surgery.ir.graph import without_gradient
from surgery.ir.operations import eye, is_ids, is_whole, make, names, operation
from surgery.ir.sizes import TOKENS, known
from surgery.ir.table import Source
from surgery.layers.kinds import LayerKind
from surgery.rewrite.cancellation import without_cancellation
from surgery.rewrite.cheaper_forms import MOST_NODES, cheapest
from surgery.rewrite.low_rank import is_thin

# What rests on the layer's tensors, what reads the frozen weight, and what rests on anything else.
_ON_LAYER = names(lambda row: row.of_layer or row.source is Source.LAYER)
_ON_WEIGHT = names(lambda row: row.of_layer)
_OF_WEIGHT = names(lambda row: row.of_layer and row.source is Source.LAYER)
_OTHERS = names(lambda row: row.source is not None and not row.of_layer)
_NORMS = ("norm", "row_norm", "col_norm", "root", "over_root")
_SAVES = 1.1  # by how much, at least, a program is cheaper by estimate that makes another matrix as large as W


@dataclass(frozen=True, eq=False)
class Candidate:
    """A program before it is code: its `outputs`; the `values` of the set-up, which the body reads or (without a body)
    which are the outputs; the parts of those that are `fixed` as long as the frozen weight is; the keys of the
    parameters that are `trained`. `is_called`: of a layer that is a module of someone else's. `at_once`: an equal
    expression in which W' is one matrix without a gradient, from which the value and the input's gradient come where
    no part of the program is seen from outside; where one is, `plain` is the candidate without it."""

    strategy: str
    outputs: tuple[Expr, ...]
    values: tuple[Expr, ...]
    fixed: tuple[Expr, ...]
    has_body: bool
    trained: frozenset[str] = frozenset()
    is_called: bool = False
    at_once: Expr | None = None
    plain: Candidate | None = None

    @cached_property
    def whole(self) -> Expr:
        """The output, of its two ways if it has them."""
        return self.outputs[0] if self.at_once is None else either(self.at_once, self.outputs[0])

    @cached_property
    def written(self) -> Expr:
        """The body over leaves `value` in the place of the set-up's values."""
        leaves = {node: Expr("value_at" if is_whole(node) else "value", (), i, node.shape)
                  for i, node in enumerate(self.values)}
        return substituted(self.whole, leaves)

    @cached_property
    def calls_back(self) -> bool:
        """True if it needs the frozen layer's transposed map."""
        return any(output.has("frozen_back") for output in self.outputs)

    @cached_property
    def reads_weight(self) -> bool:
        """True if the set-up reads every number of the frozen weight at every step."""
        seen, stack = set(self.fixed), list(self.values)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            if operation(node).of_layer and operation(node).is_leaf:
                return True
            seen.add(node)
            stack += node.args
        return False

    @cached_property
    def rests_on_layer(self) -> bool:
        """Whether the set-up depends on the frozen layer's tensors."""
        return any(map(rests_on_layer, self.values))

    @cached_property
    def computes(self) -> bool:
        """Whether the set-up does more than cast what it is given."""
        return not all(operation(value).is_leaf for value in self.values)

    @cached_property
    def given(self) -> tuple[str, ...] | None:
        """The keys of the adapter's tensors that are the values, where the set-up makes nothing of them."""
        is_given = not self.fixed and all(operation(value).source is Source.ADAPTER for value in self.values)
        return tuple(value.data for value in self.values) if is_given else None

    @cached_property
    def needs(self) -> tuple[bool, ...]:
        """Which of the input and the values take a gradient in training: those that a trained parameter reaches."""
        has_ids = any(map(is_ids, walk(self.outputs[0])))
        return (not has_ids, *self.reached(self.trained))

    def reached(self, trained: frozenset[str]) -> tuple[bool, ...]:
        """Which of the values take a gradient where the parameters of these keys do."""
        return tuple(_is_reached(value, trained) for value in self.values)

    @cached_property
    def cancels(self) -> bool:
        """Whether a number that trains reaches several values of the set-up, and one of them by a norm. As W' = V / ‖V‖
        hardly rests on what V's terms are multiplied by, the parts of such a number's gradient take each other away,
        and leave their roundings where the values are narrow; of W' as one value they are one part."""
        ways: dict[str, list[bool]] = {}
        for value in self.values:
            gradless = without_gradient(value)
            taken = [node for node in walk(value) if node not in gradless]
            normed = {*walk(*(node for node in taken if node.op in _NORMS))}
            for node in taken:
                if node.op == "param" and not node.shape and node.data in self.trained:
                    ways.setdefault(node.data, []).append(node in normed)
        return any(len(each) > 1 and any(each) for each in ways.values())

    @cached_property
    def recompute_cost(self) -> Cost | None:
        """The cost of recomputing the set-up in the backward pass; None if holding it is cheaper."""
        fits = self.has_body and has_gradients(self.written, self.needs)
        return recompute_cost(self.values, self.fixed) if fits else None

    @cached_property
    def setup_numbers(self) -> float:
        """How many numbers the set-up computes."""
        return numbers_made(self.values, self.fixed)

    def cost(self, tokens: int = TOKENS_SUPPOSED) -> Cost:
        """What a training step costs."""
        return self._setup_cost + (body_cost(self.written, self.needs, tokens) if self.has_body else Cost())

    def seconds(self, tokens: int, machine: Machine) -> float:
        """The time of a training step by which programs are compared."""
        return (1.0 if self.at_once is None else _SAVES) * self.cost(tokens).seconds(machine)

    @cached_property
    def _setup_cost(self) -> Cost:
        return setup_cost(self.values, self.fixed) + (self.recompute_cost or Cost())


@cache
def is_of_weight(value: Expr) -> bool:
    """Whether a value of a set-up follows from the frozen weight and from nothing else."""
    return value.has(*_OF_WEIGHT) and not value.has(*_OTHERS)


@cache
def rests_on_layer(value: Expr) -> bool:
    """Whether a value of a set-up depends on the frozen layer's tensors."""
    return value.has(*_ON_LAYER)


@cache
def candidates(formula: Formula, kind: LayerKind, training: bool, has_bias: bool,
               tokens: int = TOKENS_SUPPOSED, machine: Machine = CPU) -> tuple[Candidate, ...]:
    """The programs of a layer's output, the cheapest for so many tokens on a machine first; of a called layer, which
    has no weight to read, those that read it come last."""
    # without dropout and noise, training and evaluation run the same programs, which are made once
    differs = formula.weight.has("drop", "noise") or formula.bias.has("noise")
    distinct = _distinct(formula, kind, training and differs, has_bias)
    if not training or machine.rounds:  # W' made at once is for steps, and what is small beside W would be rounded away
        distinct = tuple(each for each in distinct if each.at_once is None)
    if training and machine.rounds:
        distinct = tuple(each for each in distinct if not each.cancels) or distinct
    if len(distinct) == 1:
        return distinct
    return tuple(sorted(distinct, key=lambda each: (kind.is_called and each.reads_weight,
                                                    each.seconds(tokens, machine))))


@cache
def _distinct(formula: Formula, kind: LayerKind, draws: bool, has_bias: bool) -> tuple[Candidate, ...]:
    """The different programs that the strategies give, with the formula's dropout and noise or without, in no order."""
    mode = in_training if draws else in_evaluation
    weight = without_cancellation(cheapest(mode(formula.weight)))
    # token ids look rows of W up, so that what acts on an embedding's output is W'ᵀ
    operand = turned(weight) if kind.takes_ids else weight
    x, bias = _input(known(operand.shape[1]), kind), cheapest(mode(formula.bias)) if has_bias else None
    # last to first: of two ways to one program the first has the name
    trained = frozenset(leaf.key for leaf in formula.leaves if not leaf.frozen)
    ways = {name: _output(name, operand, x, kind, trained) for name in reversed(STRATEGIES)}
    outputs = {alone(_with_bias(y, bias, kind)): name for name, y in ways.items() if y is not None}
    is_trained = partial(_is_reached, trained=trained)
    outputs = {**{reassociated(output, is_trained): f"{name}, factors apart" for output, name in outputs.items()},
               **outputs}

    def prepare(output: Expr) -> Expr:
        return joined(_unread(output, always=kind.is_called), is_trained)

    plain = tuple(candidate((output,), prepare, name, trained, kind.is_called)
                  for output, name in reversed(outputs.items()))
    return plain + _shortened(operand, x, kind, trained, outputs, bias, prepare, plain[0])


def _shortened(operand: Expr, x: Expr, kind: LayerKind, trained: frozenset[str], outputs: dict[Expr, str],
               bias: Expr | None, prepare: Callable[[Expr], Expr], plain: Candidate) -> tuple[Candidate, ...]:
    """The programs whose value and input's gradient come of W' as one matrix, and their other gradients of one of the
    outputs."""
    is_trained = partial(_is_reached, trained=trained)
    made = with_gains_made(operand, is_trained)
    whole, gained = (at_once(each, x, kind, is_trained) for each in (operand, made))
    if whole is None:
        return ()
    ways = {output: (name, whole) for output, name in reversed(outputs.items()) if name != "built weight"}
    output = _output("activations", made, x, kind, trained) if made is not operand else None
    if output is not None and gained is not None:
        ways.setdefault(_with_bias(output, bias, kind), ("gains made", gained))
    found = (candidate((by_transforms(output),), prepare, f"{name}, W' at once", trained,
                       at_once=_with_bias(whole, bias, kind), plain=plain) for output, (name, whole) in ways.items())
    return tuple(each for each in found if has_gradients(each.written, each.needs))


def _output(strategy: str, operand: Expr, x: Expr, kind: LayerKind, trained: frozenset[str]) -> Expr | None:
    """The output by one strategy; None if it would make too many nodes. "built weight" is computed node by node, so
    that there is always one."""
    if strategy == "built weight":
        return STRATEGIES[strategy](operand, x, kind, trained)
    if operand.is_large:
        return None
    try:
        with at_most(MOST_NODES):
            return STRATEGIES[strategy](operand, x, kind, trained)
    except Exhausted:
        return None


def by_tokens(programs: Sequence[Candidate], machine: Machine = CPU) -> tuple[tuple[float, Candidate], ...]:
    """Which program is the cheapest up to how many tokens on a machine, in rising order. A cost is linear in them."""
    # The lower envelope of those lines: from the cheapest for no token on, always to the line that is flatter and met
    # first. (Sorting by slope alone would keep lines that are nowhere the lowest.)
    start = {each: each.seconds(0, machine) for each in programs}
    slope = {each: (each.seconds(TOKENS_SUPPOSED, machine) - start[each]) / TOKENS_SUPPOSED for each in programs}
    at, now, ranges = 0.0, min(programs, key=lambda each: (start[each], slope[each])), []
    while flatter := [each for each in programs if slope[each] < slope[now]]:
        ends = {each: (start[each] - start[now]) / (slope[now] - slope[each]) for each in flatter}
        following = min(flatter, key=lambda each: (ends[each], slope[each]))
        if ends[following] > at:
            at = ends[following]
            ranges.append((at, now))
        now = following
    return (*ranges, (inf, now))


def _input(width: int, kind: LayerKind) -> Expr:
    """The activations that a layer gets; an embedding's are token ids, which stand for rows with a single 1."""
    return Expr("x", (), "ids" if kind.takes_ids else None, (TOKENS, width))


def frozen_alone(kind: LayerKind, out: int, in_: int) -> Expr:
    """The output of the frozen layer alone, for a weight [out, in]."""
    width, height = (out, in_) if kind.takes_ids else (in_, out)
    return Expr("frozen", (_input(width, kind),), None, (TOKENS, height))


def candidate(outputs: tuple[Expr, ...], prepare: Callable[[Expr], Expr], strategy: str = "weights",
              trained: frozenset[str] = frozenset(), is_called: bool = False, at_once: Expr | None = None,
              plain: Candidate | None = None) -> Candidate:
    """The candidate that computes `outputs`; `prepare` is the last change to each of them."""
    both = outputs if at_once is None else (*outputs, at_once)
    both = solved_once(tuple(prepare(in_cheapest_order(output)) for output in both))
    outputs, whole = both[:len(outputs)], both[len(outputs):]
    has_body, values = outputs[0].has("x"), outputs
    if has_body:
        # What the body reads that does not depend on the input, in order; numbers are written into it. A matrix that it
        # reads turned is the matrix itself, so that the gradient of it lies in memory as it does.
        reads: dict[Expr, None] = {}
        for arg in (a for node in walk(*both) if node.has("x") for a in node.args if not a.has("x")):
            while arg.op == "T":
                arg = arg.args[0]
            if not operation(arg).is_inline:
                reads[arg] = None
        values = tuple(reads)
    first = whole[0] if whole else None
    return Candidate(strategy, outputs, values, _fixed(values), has_body, trained, is_called, first, plain)


def of_values(values: tuple[Expr, ...]) -> Candidate:
    """The program of such values alone, as they stand."""
    return Candidate("values", values, values, _fixed(values), False)


@lru_cache(maxsize=4096)
def _is_reached(value: Expr, trained: frozenset[str]) -> bool:
    """Whether a parameter that trains is reached without passing a `detach`."""
    gradless = without_gradient(value)
    return any(node.op == "param" and node.data in trained and node not in gradless for node in walk(value))


@cache
def weights(formula: Formula, has_bias: bool, draws: bool = False) -> Candidate:
    """The program of W' (and b') themselves, whatever the layer; with noise as it is drawn or with its mean."""
    mode = in_training if draws else lambda expr: expr
    weight, bias = (in_evaluation(mode(expr)) for expr in (formula.weight, formula.bias))
    return candidate((matrix(cheapest(weight)), *([offset(cheapest(bias))] if has_bias else [])), _read)


def _read(expr: Expr) -> Expr:
    """Replace calls of the frozen layer by products with its weight, in the dtype of the set-up, so that a merge rounds
    once."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "frozen":
            return make("matmul", args[0], make("T", Expr("weight", (), None, (node.shape[-1], args[0].shape[-1]))))
        if node.op == "frozen_back":
            return make("matmul", args[0], Expr("weight", (), None, (args[0].shape[-1], node.shape[-1])))
        return node.with_args(args)

    return rebuild(expr, change)


# ---------------------------------------------------------------------------------------------------- strategies


STRATEGIES = {
    "activations": lambda operand, x, kind, trained: spread(operand, x, kind),
    "joined blocks": lambda operand, x, kind, trained: spread(blockwise(operand), x, kind),
    "thin factors": lambda operand, x, kind, trained: spread(thinly(operand, trained), x, kind),
    "built weight": lambda operand, x, kind, trained: built(operand, x, kind),
}


def offset(bias: Expr) -> Expr:
    """b' = T (b + u), the transforms acting on b as on a row of activations."""
    if bias.is_large:
        return bias
    if bias.op == "add":
        return make("add", *map(offset, bias.args))
    if bias.op != "matmul" or len(bias.args[0].shape) != 2:
        return bias
    row = make("reshape", offset(bias.args[1]), data=(1, *bias.args[1].shape))
    return make("reshape", apply(bias.args[0], row), data=bias.shape)


def _with_bias(y: Expr, bias: Expr | None, kind: LayerKind) -> Expr:
    """y + b'; the frozen layer adds its own bias where its output is a term of y."""
    if bias is None:
        return y
    if bias.op != "bias":
        return make("add_bias", y, offset(bias))
    terms = list(summands(y))
    plain = next((t for t in terms if t.op == "frozen" and (kind.acts_by_rows or t.args[0].op == "x")), None)
    if plain is None:
        return make("add_bias", y, bias)
    # a sum may hold the same term twice, and then the bias belongs to one of them
    terms.remove(plain)
    if any(plain in walk(term) for term in terms):  # the layer would run twice: with its bias, and without
        return make("add_bias", y, bias)
    return reduce(partial(make, "add"), terms, Expr("frozen", plain.args, "biased", y.shape))


def _unread(expr: Expr, always: bool = False) -> Expr:
    """Replace W M for a thin M (or `always`) by the frozen layer run on the rows of Mᵀ, so that the weight is not
    read. What decides a jump (which entries of `relu(A W)` are none) is not rounded to the weight's dtype."""
    deciding = {*walk(*(node for node in walk(expr) if operation(node).jumps and TOKENS not in node.shape))}

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        new = node.with_args(args)
        how = EXACT if node in deciding else None
        if (squares := _squares(new)) is not None:
            return squares
        if always and node.op in ("columns", "between") and is_weight(args[0]):
            places = args[1] if node.op == "columns" else make("range", data=node.data)
            rows = make("placed", eye(node.shape[1]), places, data=args[0].shape[1:])
            return make("T", _called(turned(args[0]), rows, how))
        if node.op != "matmul" or len(node.shape) != 2 or TOKENS in node.shape:
            return new
        left, right = args
        if is_weight(left) and (always or is_thin(right.shape[1], *left.shape)):
            return make("T", _called(turned(left), turned(right), how))
        if is_weight(right) and (always or is_thin(left.shape[0], *right.shape)):
            return _called(right, left, how)
        return new

    return rebuild(expr, change)


def _squares(node: Expr) -> Expr | None:
    """The norms of the weight's rows or columns, or their squares, from what reads the weight as it is stored."""
    if node.op not in ("row_dot", "row_norm", "col_norm") or len({*node.args}) > 1 or not is_weight(node.args[0]):
        return None
    axis = int((node.op == "col_norm") is (node.args[0].op == "T"))
    squares = Expr("weight_squares", (), axis, node.shape)
    return squares if node.op == "row_dot" else make("root", squares)


def _called(weight: Expr, rows: Expr, how: str | None) -> Expr:
    """Rows times W or Wᵀ, by the layer itself, `how` it says."""
    return Expr("frozen_back" if weight.op == "weight" else "frozen", (rows,), how, (rows.shape[0], weight.shape[1]))


# -------------------------------------------------------------------------------------------------------- regions


_SMALL = 2**15  # numbers of a constant that is held rather than made at every step


def _fixed(values: Sequence[Expr]) -> tuple[Expr, ...]:
    """What a set-up computes once: its largest parts that depend on the frozen weight alone and are smaller than it, or
    that are small constants."""
    fixed: dict[Expr, None] = {}
    stack, seen = list(reversed(values)), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        is_known = not node.has(*_OTHERS)
        is_smaller = len(node.shape) < 2 or node.op == "gram"
        is_constant = is_known and not node.has(*_ON_WEIGHT) and not operation(node).is_inline
        if is_of_weight(node) and is_smaller or is_constant and size(node, 0) <= _SMALL:
            fixed[node] = None
        else:
            stack += reversed(node.args)
    return tuple(fixed)
