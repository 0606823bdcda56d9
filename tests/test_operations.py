"""The table of operations: what its rows say of one operation in several ways agrees, all nodes have one, and a row is
all that a new operation needs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import assert_close
from torch import Tensor

import surgery
from surgery.codegen.autograd_node import step
from surgery.codegen.cost_model import body_cost
from surgery.codegen.gradients import gradients
from surgery.codegen.kernel_names import names_called
from surgery.codegen.operation_counts import flops, moved
from surgery.ir.dense import dense
from surgery.ir.expression import Expr, rebuild
from surgery.ir.notation import Maths
from surgery.ir.notation_forms import around
from surgery.ir.operations import OPERATIONS, Operation, make, operation
from surgery.ir.shape_rules import vector
from surgery.ir.sizes import TOKENS
from surgery.ir.table import ACTING, Linear, Memory
from surgery.ir.verifier import LOWERED, STEP, Malformed, verify

ROWS = 5
X = (TOKENS, 6)
# A call of each operation that has a derivative or a kernel: its data, and the shapes of its arguments.
CALLS: dict[str, tuple[Any, tuple[tuple, ...]]] = {
    "add": (None, (X, X)), "add_bias": (None, (X, (6,))), "matmul": (None, (X, (6, 4))), "mul": (None, ((), X)),
    "mul of entries": (None, (X, X)), "matmul of a stack": (None, ((3, 4), (TOKENS, 4, 2))),
    "scale": (None, (X, (6,))), "blocks": (None, (X, (2, 3, 4))), "swap": ((1, 2, 3, 1), (X,)),
    "mix": (((1.0, 0.0), (0.5, -2.0), (0.0, 0.0)), ((TOKENS, 2, 3),)), "circulate": (None, (X, (3, 2, 3))),
    "mixed": (None, ((2, 2, TOKENS, 3), (2, 2, 3, 4))), "frozen": (None, (X,)), "frozen_back": (None, (X,)),
    "side_by_side": (None, (X, (TOKENS, 2))), "T": (None, ((TOKENS, 2, 3),)), "split": ((2, 3), (X,)),
    "join": (None, ((TOKENS, 2, 3),)), "weighted_dot": (None, ((4, 6), (4, 6), (6,))),
    "column_dot": (None, (X, X)), "column_sum": (None, (X,)), "block_dot": (None, (X, (TOKENS, 8), (2, 3, 4))),
    "circulate_back": (None, ((TOKENS, 9), (3, 2, 3))), "circulate_dot": (None, (X, (TOKENS, 9), (3, 2, 3))),
    "mixed_back": (None, ((2, 2, TOKENS, 4), (2, 2, 3, 4))),
    "mixed_dot": (None, ((2, 2, TOKENS, 3), (2, 2, TOKENS, 4))),
    "masked": (None, (X, X)), "spectrum": (None, (X, (4, 3))), "waves": (None, ((2, 2, TOKENS, 2), (4, 3))),
}
DRAWN = {"mask"}  # its dense meaning is that of evaluation


def call(name: str) -> tuple[Expr, dict[str, Tensor]]:
    """The node on values of the set-up, and tensors for those."""
    op, (data, shapes) = name.split(" ")[0], CALLS[name]
    args = tuple(Expr("value", (), i, shape) for i, shape in enumerate(shapes))
    row = OPERATIONS[op]
    node = make(op, *args, data=data) if row.shape else Expr(op, args, data, (*shapes[0][:-1], 6))
    generator = torch.Generator().manual_seed(0)
    sizes = [[ROWS if size is TOKENS else size for size in shape] for shape in (*shapes, (6, 6))]
    *values, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    if op == "masked":
        values[1] = values[1] > 0
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


@pytest.mark.parametrize("in_step", [True, False])
def test_a_kernel_computes_the_dense_meaning(in_step):
    rows = {name: row for name, row in OPERATIONS.items() if row.kernel or in_step and row.step_kernel}
    assert rows.keys() - DRAWN <= CALLS.keys()
    for name in rows.keys() - DRAWN:
        node, leaves = call(name)
        args = [leaves[f"value {a.data}"] for a in node.args]
        data = [] if node.data is None else [node.data]
        into = [*args, *data] if "{data}" in str(rows[name].text) else [*data, *args]
        assert_close(names_called(in_step)[name](*into), dense(node, leaves), 1e-12)


def test_every_node_that_is_made_has_a_row():
    """So that no question about a node is answered by a default that nobody chose."""
    made = set()
    for path in Path(surgery.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Expr", "make"):
                made |= {node.args[0].value} if node.args and isinstance(node.args[0], ast.Constant) else set()
    assert made and made <= OPERATIONS.keys()


def test_the_checker_of_texts_asks_no_row():
    """It would be told what the emitter was told."""
    text = (Path(surgery.__file__).parent / "codegen" / "validate.py").read_text(encoding="utf-8")
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.startswith("surgery")} == {"surgery.ir.expression"}


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
