"""The table of operations: what its rows say of one operation in several ways agrees, all nodes have one, and a row is
all that a new operation needs."""

from __future__ import annotations

import ast
import copy
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from layers import assert_close
from operands import every_call, tensors
from torch import Tensor

import surgery
from surgery.codegen.autograd_node import step
from surgery.codegen.cost_model import body_cost
from surgery.codegen.dropout_number import drawn_number, dropped
from surgery.codegen.gradients import gradients
from surgery.codegen.kernel_names import names_called
from surgery.codegen.operation_counts import flops, moved
from surgery.ir.builders import fill
from surgery.ir.dense import dense
from surgery.ir.expression import Expr, Formula, Leaf, rebuild
from surgery.ir.notation import Maths
from surgery.ir.notation_forms import around
from surgery.ir.operations import FUNCTIONS, OPERATIONS, PRIMITIVES, Operation, make, operation
from surgery.ir.shape_rules import ShapeError, same, vector
from surgery.ir.sizes import TOKENS
from surgery.ir.table import ACTING, Linear, Memory
from surgery.ir.verifier import LOWERED, STEP, Malformed, verify
from surgery.language.library import parse
from surgery.rewrite.prove_identity import surely_trains

ROWS = 5
X = (TOKENS, 6)
# A call of each operation that a spec cannot say: its data, and the shapes of its arguments.
CALLS: dict[str, tuple[Any, tuple[tuple, ...]]] = {
    "add": (None, (X, X)), "add_bias": (None, (X, (6,))), "matmul": (None, (X, (6, 4))), "mul": (None, ((), X)),
    "mul of entries": (None, (X, X)), "matmul of a stack": (None, ((3, 4), (TOKENS, 4, 2))),
    "scale": (None, (X, (6,))), "blocks": (None, (X, (2, 3, 4))), "swap": ((1, 2, 3, 1), (X,)),
    "mix": (((1.0, 0.0), (0.5, -2.0), (0.0, 0.0)), ((TOKENS, 2, 3),)), "circulate": (None, (X, (3, 2, 3))),
    "mixed": (None, ((2, 2, TOKENS, 3), (2, 2, 3, 4))), "frozen": (None, (X,)), "frozen_back": (None, (X,)),
    "side_by_side": (None, (X, (TOKENS, 2))), "T": (None, ((TOKENS, 2, 3),)), "split": ((2, 3), (X,)),
    "join": (None, ((TOKENS, 2, 3),)), "weighted_dot": (None, ((4, 6), (4, 6), (6,))),
    "column_dot": (None, (X, X)), "dot": (None, (X, X)), "column_sum": (None, (X,)),
    "block_dot": (None, (X, (TOKENS, 8), (2, 3, 4))),
    "circulate_back": (None, ((TOKENS, 9), (3, 2, 3))), "circulate_dot": (None, (X, (TOKENS, 9), (3, 2, 3))),
    "mixed_back": (None, ((2, 2, TOKENS, 4), (2, 2, 3, 4))),
    "mixed_dot": (None, ((2, 2, TOKENS, 3), (2, 2, TOKENS, 4))),
    "masked": (None, (X, X)), "spectrum": (None, (X, (4, 3))), "waves": (None, ((2, 2, TOKENS, 2), (4, 3))),
    "reversed": (None, (X,)), "face": (None, (X, (TOKENS, 2))), "total": (None, (X,)),
    "block_stack": (None, ((3, 12),)),
    "kernel": (None, ((2, 3, 3), (4, 3))), "row_dot": (None, (X, X)), "gram": ((2,), ((4, 6), (4, 6))),
    "flat": (None, ((TOKENS, 2, 3),)), "between": ((1, 4), (X,)), "outer": (None, (X, (TOKENS, 4))),
    "column_blocks": (None, (X, (2, 3, 4))),
    "thin": (None, (X, (6, 2))), "apart": (None, (X,)), "centred": (None, (X, X, (6,))), "skew_core": ((0.5,), ((9, 4),)),
    "run": (None, (X, (4, 6))), "run_alone": (None, (X, (6, 6))), "balance": (None, ((9, 2), (9, 2))), "zeros": (None, (X,)),
    "columns": (None, (X, (4,))), "placed": ((9,), (X, (6,))), "drop": ((0.5, "step"), (X,)), "mask": ((0.5, "step"), (X,)),
    "gained": ((0.5, True), (X, (6,), (TOKENS, 2), (2, 6))), "gained outside": ((2.0, False), (X, (6,), (TOKENS, 2), (2, 6))),
    "gained_dot": ((0.5,), (X, X, (TOKENS, 2), (2, 6))), "times_masked": (None, ((TOKENS, 2), (2, 6), X)),
    "masked_times": (None, (X, X, (6, 2))), "masked_outer": ((False,), (X, X, (TOKENS, 2))),
    "masked_outer turned": ((True,), (X, X, (TOKENS, 2))), "number": ((0.5, "step"), (X,)),
}
DRAWN = {"mask", "number"}  # their dense meaning is that of evaluation
MASKS = {"masked": 1, "masked_times": 1, "times_masked": 2, "masked_outer": 1}  # which argument says what is dropped
NUMBER = drawn_number(torch.empty(0), 0.4)


def call(name: str) -> tuple[Expr, dict[str, Tensor]]:
    """The node on values of the set-up, and tensors for those."""
    op, (data, shapes) = name.split(" ")[0], CALLS[name]
    row = OPERATIONS[op]
    args = tuple(Expr("value_at" if i in row.places else "value", (), i, shape) for i, shape in enumerate(shapes))
    node = make(op, *args, data=data) if row.shape else Expr(op, args, data, (*shapes[0][:-1], 6))
    generator = torch.Generator().manual_seed(0)
    sizes = [[ROWS if size is TOKENS else size for size in shape] for shape in (*shapes, (6, 6))]
    *values, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    if op in MASKS:
        values[MASKS[op]] = dropped(NUMBER, (ROWS, 6))
    for i in row.places:  # one of them twice
        values[i] = torch.randperm(sizes[i][0], generator=generator).clamp(min=1)
    return node, {"weight": weight, **{f"value {i}": value for i, value in enumerate(values)}}


@pytest.mark.parametrize("name", [name for name in CALLS if operation(call(name)[0]).derivative])
def test_a_derivative_is_that_of_the_dense_meaning(name):
    node, leaves = call(name)
    terms = operation(node).derivative(node, Expr("grad", (), None, node.shape))
    inputs = [leaves[f"value {i}"].requires_grad_() for i in range(len(terms))]
    y = dense(node, leaves)
    grad = torch.randn(y.shape, dtype=torch.float64)
    for arg, term, wanted in zip(node.args, terms, torch.autograd.grad(y, inputs, grad)):
        verified = rebuild(term, lambda n, args: n.data if n.op == "forward" else n.with_args(args))
        assert verified.shape == arg.shape
        assert_close(dense(verify(verified, STEP), {**leaves, "grad": grad}), wanted, 1e-12)


BY_ROWS = [name for name, row in OPERATIONS.items() if row.rows]
# Axes of one size and of several, and of a single entry.
OF_ROWS = ((), (3,), (6,), (1, 3), (3, 1), (3, 3), (4, 3), (3, 4), (4, 6), (2, 3, 4), (2, 4, 3), (3, 3, 3))


@pytest.mark.parametrize("name", BY_ROWS)
def test_some_rows_of_a_value_are_made_of_those_of_its_arguments(name):
    row, generator = OPERATIONS[name], torch.Generator().manual_seed(0)
    compared = 0
    for shapes in product(OF_ROWS, repeat=row.arity):
        try:
            node = make(name, *(Expr("param", (), str(i), shape) for i, shape in enumerate(shapes)))
        except ShapeError:
            continue
        values = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in shapes]
        whole = row.dense(*values)
        for axis in range(-len(node.shape), 0):
            needs = row.rows(node, axis)
            last = node.shape[axis] - 1
            for first, count in {(0, 1), (last, 1), (0, last + 1), (last // 2, last - last // 2)} if needs else ():
                own = [v if need is None else v.narrow(need, first, count) for v, need in zip(values, needs, strict=True)]
                assert_close(row.dense(*own), whole.narrow(axis, first, count), 1e-12, (shapes, axis, first, count))
                compared += 1
    assert compared > 2


def by_kernel(node: Expr, args: list, in_step: bool) -> Tensor:
    """What the function gives that emitted text calls, its data where that has it."""
    data = [] if node.data is None else [node.data]
    if node.op in MASKS and node.op != "masked":  # of a number alone
        args = [NUMBER if i == MASKS[node.op] else a for i, a in enumerate(args)]
    into = [*args, *data] if "{data}" in str(operation(node).text) else [*data, *args]
    return names_called(in_step)[node.op](*into)


@pytest.mark.parametrize("in_step", [True, False])
def test_a_kernel_computes_the_dense_meaning(in_step):
    named = {name for name, row in OPERATIONS.items() if row.kernel or in_step and row.step_kernel}
    assert named - DRAWN - {PAIR} <= CALLS.keys()
    for node, leaves in map(call, [name for name in CALLS if name.split(" ")[0] in named - DRAWN]):
        args = [leaves[f"value {a.data}"] for a in node.args]
        assert_close(by_kernel(node, args, in_step), dense(node, leaves), 1e-12, node.op)


PAIR = "gained_back"  # which gives two values


@pytest.mark.parametrize("data, low", [((1.0, False), 0), ((0.5, True), 1), ((2.0, False), 1)])
def test_two_values_that_are_computed_together(data, low):
    """d g and Σ g y, h m beside one of them; each part is one of both, has its shape, and memory of its own."""
    shapes = (X, (6,), X, (TOKENS, 2), (2, 6))[:5 if low else 3]
    node = make(PAIR, *(Expr("value", (), i, shape) for i, shape in enumerate(shapes)), data=data)
    args = [torch.randn([ROWS if size is TOKENS else size for size in shape], dtype=torch.float64) for shape in shapes]
    leaves = {"weight": args[0], **{f"value {i}": value for i, value in enumerate(args)}}
    both = by_kernel(node, args, in_step=True)
    assert len({t.untyped_storage().data_ptr() for t in (*both, *args)}) == 2 + len(args)
    for i, value in enumerate(both):
        part = verify(make("part", node, data=(i,)), STEP)
        assert part.shape == (X if i == 0 else X[1:])
        assert_close(value, dense(part, leaves), 1e-12)


@lru_cache
def examples() -> tuple[tuple[Expr, list[Tensor], Any], ...]:
    """Calls of all operations on tensors: a few of each that a spec can say, and each of `CALLS`."""
    said: dict[str, list[Expr]] = {}
    for node in every_call():
        said.setdefault(node.op, []).append(node)
    values = {key: value.detach() for key, value in tensors(seed=2).items()}
    spoken = [(node, [dense(a, values) for a in node.args], values) for nodes in said.values() for node in nodes[::9]]
    called = [(node, [leaves[f"value {a.data}"] for a in node.args], leaves) for node, leaves in map(call, CALLS)]
    return (*spoken, *called)


def computed(node: Expr, args: list, leaves: Any) -> Tensor:
    row = operation(node)
    return row.evaluate(node, args, leaves) if row.evaluate else row.value(node.data, args, leaves["weight"])


def test_what_is_said_to_be_linear_is():
    """So that nothing is held for its gradient which needs none."""
    for node, args, leaves in examples():
        linear, floats = operation(node).linear, [i for i, a in enumerate(args) if a.is_floating_point()]
        other = [torch.randn_like(a) if i in floats else a for i, a in enumerate(args)]
        for at in {Linear.NOT: [], Linear.TOGETHER: [floats], Linear.EACH: [[i] for i in floats]}[linear]:
            ways = ([with_(a, b) if i in at else a for i, (a, b) in enumerate(zip(args, other))]
                    for with_ in (lambda a, b: a, lambda a, b: b, lambda a, b: a + b))
            a, b, both = (computed(node, way, leaves) for way in ways)
            assert_close(both, a + b, 1e-10, str(node))
    assert {name for name, row in OPERATIONS.items() if row.linear is not Linear.NOT} <= {e[0].op for e in examples()}


def test_what_is_said_of_memory_is_so():
    for node, args, leaves in examples():
        row, ways = operation(node), [computed(node, args, leaves)]
        if row.kernel or row.step_kernel and node.op not in DRAWN:
            ways.append(by_kernel(node, args, in_step=bool(row.step_kernel)))
        for result in ways:
            shown = {a.untyped_storage().data_ptr() for a in args} & {result.untyped_storage().data_ptr()}
            assert not (shown and row.memory in (Memory.NEW, Memory.OF_LAYER)), node
            assert shown or not row.is_view, node
    told = {name for name, row in OPERATIONS.items() if row.memory not in (Memory.EITHER, Memory.GIVEN)}
    assert told - {PAIR, "part"} <= {node.op for node, _, _ in examples()}


def test_what_is_said_to_stop_a_gradient_does():
    for node, args, leaves in examples():
        trained = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        if trained and any(a.requires_grad for a in trained):
            assert computed(node, trained, leaves).requires_grad is not operation(node).stops_gradient, node


def test_a_linear_map_that_may_be_zero_proves_no_gradient():
    """W' = W + skew(A), of a weight with one entry, trains nothing; one entry of A that is taken does. A rotation turns
    to first order with what it is made of where that starts at zero; what is detached has no gradient."""
    for size in (1, 6):
        weight, a = Expr("weight", (), None, (size, size)), Leaf("own.A", (size, size), fill(0.0, (size, size)), None)
        at = Expr("places", (), "own.at", (1,))
        turn = make("cayley", make("skew", a.expr))
        for update, trains in ((make("skew", a.expr), size > 1), (a.expr, True), (make("take", a.expr, at), True),
                               (turn, size > 1), (make("matmul", turn, turn), False), (make("detach", a.expr), False),
                               (make("cayley", make("add", weight, a.expr)), False)):
            added = update if update.shape == weight.shape else make("mul", make("total", update), weight)
            formula = Formula(make("add", weight, added), Expr("bias", (), None, (size,)), (a,))
            assert surely_trains(formula) is trains, (size, update)


def test_every_node_that_is_made_has_a_row():
    """So that no question about a node is answered by a default that nobody chose."""
    texts = (path.read_text(encoding="utf-8") for path in Path(surgery.__file__).parent.rglob("*.py"))
    made = {name for text in texts for name in re.findall(r'\b(?:Expr|make)\("(\w+)"', text)}
    assert len(made) > 50 and made <= OPERATIONS.keys()


def test_the_checker_of_texts_asks_no_row():
    """It would be told what the emitter was told."""
    own = {"surgery.codegen.validate_meanings", "surgery.ir.expression"}
    for name, allowed in (("validate", own), ("validate_meanings", {"surgery.ir.expression"})):
        text = (Path(surgery.__file__).parent / "codegen" / f"{name}.py").read_text(encoding="utf-8")
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert {module for module in modules if module.startswith("surgery")} == allowed


def test_a_view_costs_nothing_and_what_may_copy_is_no_view():
    for name, row in OPERATIONS.items():
        assert not row.is_view or row.flops is None and row.in_place is None, name
    a = torch.randn(ROWS, 6)
    for sizes, copies in (((1, 2, 3, 1), True), ((1, 1, 6, 1), False)):
        swapped = OPERATIONS["swap"].dense(sizes, a)
        assert (swapped.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()) is copies
    assert OPERATIONS["swap"].memory is Memory.EITHER and not OPERATIONS["swap"].is_free


# ------------------------------------------------------------------------------------------- a new operation is a row

ROLLED = Operation("rolled", 1, lambda by, a: vector(a), lambda by, a: a.roll(by[0], -1), "the last axis, rolled",
                   stage=ACTING, sizes=("by",), linear=Linear.TOGETHER, passes=1,
                   flops=lambda node, count: 3 * count(node),
                   derivative=lambda node, g: (make("rolled", g, data=(-node.data[0],)),),
                   notation=around("↻", ""))


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> Expr:
    """The new operation on the input, in a table that has it."""
    monkeypatch.setitem(OPERATIONS, "rolled", ROLLED)
    return make("rolled", Expr("x", (), None, X), data=(2,))


def test_a_row_is_verified_and_printed_and_counted(rolled):
    assert verify(rolled, LOWERED) is rolled and rolled.shape == X
    with pytest.raises(Malformed, match="the shape of its rule"):
        verify(Expr("rolled", rolled.args, (2,), (TOKENS, 4)), LOWERED)
    assert Maths({rolled.args[0]: "x"}).text(rolled) == "↻x"
    assert (flops(rolled, 10), moved(rolled, 10)) == (180.0, 120.0)
    assert body_cost(rolled, (True,), 10).body_flops == 2 * 180.0  # forward, and backward


def test_a_row_is_emitted_and_differentiated(rolled):
    """By a step, whose text the checker of texts proves, against the dense meaning and autograd."""
    x, m = rolled.args[0], Expr("value", (), 0, (6, 6))
    body = make("add", make("matmul", rolled, m), rolled)
    found = gradients(body, [x, m])
    assert found is not None and found.kept == ()  # in one pass it is made again
    tensors = {"x": torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True), "weight": torch.zeros(6, 6),
               "value 0": torch.randn(6, 6, dtype=torch.float64, requires_grad=True)}
    wanted, grad = dense(body, tensors), torch.randn(ROWS, 6, dtype=torch.float64)
    assert_close(wanted, tensors["x"].roll(2, -1) @ tensors["value 0"] + tensors["x"].roll(2, -1), 1e-12)
    code = step(body, (True, True))
    with torch.no_grad():
        y, kept = code.forward(None, tensors["x"], tensors["value 0"])
        of = code.backward(None, grad, *kept)
    assert "= rolled((2,), x)" in code.source and "rolled((-2,), " in code.source
    assert_close(y, wanted, 1e-12)
    for gradient, tensor in zip(of, torch.autograd.grad(wanted, [tensors["x"], tensors["value 0"]], grad)):
        assert_close(gradient, tensor, 1e-12)


# ------------------------------------------------------------------------------------------- a new primitive is a row


@pytest.fixture
def cube(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A language in which a spec can say `cube(a)`."""
    row = Operation("cube", 1, same, lambda a: a * a * a, "a³, entry by entry")
    monkeypatch.setitem(OPERATIONS, "cube", row)
    monkeypatch.setitem(PRIMITIVES, "cube", row)
    FUNCTIONS.add("cube")
    yield
    FUNCTIONS.remove("cube")


CUBED = """update cubed() {
  param A[out, in] ~ normal(std = 0.5)
  return cube(A)
}
target linear "0" shifted {
  add cubed()
}
"""


def test_a_primitive_is_trained_and_merged(cube):
    """Its program is proven too: by `conftest`, as all are that a test runs."""
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(ROWS, 6)
    plain = copy.deepcopy(model)
    surgeon = surgery.apply(model, parse(CUBED))
    a = next(p for name, p in model.named_parameters() if name.endswith("A"))
    wanted = plain(x) + x @ (a * a * a).mT
    assert_close(model(x), wanted, 1e-5)
    assert_close(*(torch.autograd.grad(y.square().sum(), a)[0] for y in (model(x), wanted)), 1e-5)
    surgeon.merge()
    assert_close(model(x), wanted, 1e-5)


def test_threads_that_make_one_node_get_one_object() -> None:
    """As replicas do whose programs are first made where they run."""
    def make_some(of: int) -> list[Expr]:
        start.wait()
        return [Expr("param", (), f"threads.{of}_{i}", (2, 3)) for i in range(100)]

    interval, start = sys.getswitchinterval(), Barrier(6)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            for of in range(40):
                made = zip(*threads.map(make_some, [of] * 6))
                assert all(one is other for one, *others in made for other in others)
    finally:
        sys.setswitchinterval(interval)
