"""The proof of emitted text sees each way in which a line can be wrong, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import pytest
import torch
from layers import Tower
from torch import Tensor, nn

import surgery
from surgery.codegen.kernel_names import names_called
from surgery.codegen.program_text import StepText, step_text
from surgery.codegen.validate import program_faults, step_faults
from surgery.ir.builders import times
from surgery.ir.expression import Expr, walk
from surgery.ir.operations import make
from surgery.ir.sizes import TOKENS

SUMS = Path(__file__).parents[1] / "data" / "sums"
X = Expr("x", (), None, (TOKENS, 12))
A, B, C = (Expr("value", (), i, (12, 12)) for i in range(3))


def forward_faults(lines: str, y: Expr, *kept: Expr) -> list[str]:
    """Of a step without gradients whose forward pass has these lines."""
    head = "def forward(layer, x, a0, a1, a2):"
    source = f"{head}\n{indent(lines, '    ')}\n\ndef backward(layer, grad):\n    return ()"
    return step_faults(source, y, (), kept)


PRODUCT, OTHER = make("matmul", X, A), make("matmul", X, B)
SUM = make("add", PRODUCT, OTHER)


@pytest.mark.parametrize(("lines", "y", "fault"), [
    ("y0 = x @ a0\ny1 = y0.addmm_(x, a1)\nreturn y1, ()", SUM, None),
    ("y0 = x @ a0\ny1 = torch.addmm(y0, x, a1)\nreturn y1, ()", SUM, None),
    ("y0 = x @ a1\ny1 = x @ a0\ny2 = y0 + y1\nreturn y2, ()", SUM, None),
    ("y0 = x @ a0\ny1 = y0.addmm_(x, a1, alpha=2.0)\nreturn y1, ()", SUM, "result 0"),
    ("y0 = x @ a0\ny1 = y0.addmm_(x, a1)\nreturn y0, ()", SUM, "`y0` has been written over"),
    ("y0 = x @ a0\ny1 = y0.mT\ny2 = y0.addmm_(x, a1)\ny3 = y1.mT\nreturn y3, ()", SUM, "`y1` has been written over"),
    ("y0 = x @ a0\ny1 = y0.flatten(0, -2)\ny2 = y0.mul_(2.0)\nreturn y1, ()", SUM, "`y1` has been written over"),
    ("y0 = (a0.mT @ x.mT).mT\nreturn y0, ()", PRODUCT, None),
    ("y0 = (x.mT @ a0.mT).mT\nreturn y0, ()", PRODUCT, "result 0"),
    ("y0 = a0.mT\ny1 = (y0 @ x.mT).mT\nreturn y1, ()", PRODUCT, None),
    ("y0 = (a0 @ x.mT).mT\nreturn y0, ()", PRODUCT, "result 0"),
    # a view of what is its own is written over as that is, and may be a copy
    ("y0 = x @ a0\ny1 = y0.flatten(0, -2)\ny2 = y1.addmm_(x, a1)\nreturn y2, ()",
     make("add", make("flat", PRODUCT), OTHER), None),
    ("y0 = x @ a0\ny1 = y0.flatten(0, -2)\ny2 = y1.addmm_(x, a1)\nreturn y0, ()", SUM, "`y0` has been written over"),
    ("y0 = x @ a0\ny1 = y0.flatten(0, -2)\ny2 = y1.add_(y0)\nreturn y2, ()", SUM, "writes over what it reads"),
    ("y0 = x.add_(a0)\nreturn y0, ()", SUM, "not the function's own"),
    ("y0 = x.mT\ny1 = y0.add_(a0)\nreturn y1, ()", SUM, "not the function's own"),
    ("y0 = x.reshape((12, 12))\ny1 = y0.add_(a0)\nreturn y1, ()", SUM, "not the function's own"),
    ("y0 = unknown(x)\ny1 = y0.add_(a0)\nreturn y1, ()", SUM, "not the function's own"),
    ("y0 = x @ a0\ny1 = y0.addmm_(y0, a1)\nreturn y1, ()", make("add", PRODUCT, make("matmul", PRODUCT, B)),
     "writes over what it reads"),
    ("y0 = x @ a0\ny1 = y0.mT\ny2 = y0.add_(y1)\nreturn y2, ()", SUM, "writes over what it reads"),
    ("y0 = x @ a0\ndel y0\ny1 = y0 + x\nreturn y1, ()", SUM, "`y0` is not there"),
    ("y0 = x @ a0\ny0 = x @ a1\nreturn y0, ()", OTHER, "there already"),
    ("y0 = masked(x, mask(x, 0.1))\nreturn y0, ()", PRODUCT, "result 0"),
    ("y0 = x @ a0\nprint(y0)\nreturn y0, ()", PRODUCT, "no line that a program has"),
])
def test_a_line(lines, y, fault):
    found = forward_faults(lines, y)
    assert found == [] if fault is None else fault in found[0]


def test_what_is_kept_is_not_written_over():
    lines = "y0 = x @ a0\ny1 = y0.addmm_(x, a1)\nreturn y1, (y0, )"
    assert "`y0` has been written over" in forward_faults(lines, SUM, PRODUCT)[0]


def test_a_mask_that_is_drawn_twice():
    mask = Expr("mask", (X,), (0.5, "a"), X.shape)
    other = Expr("mask", (X,), (0.5, "b"), X.shape)
    y = make("add", Expr("masked", (PRODUCT, mask), None, X.shape), Expr("masked", (OTHER, mask), None, X.shape))
    two = make("add", y.args[0], Expr("masked", (OTHER, other), None, X.shape))
    once = "m = mask(x, 0.5)\nn = m"
    twice = "m = mask(x, 0.5)\nn = mask(x, 0.5)"
    rest = "\ny0 = x @ a0\ny1 = masked(y0, {})\ny2 = add_masked(y1, x, a1, {})\nreturn y2, ()"
    for masks, names, right in ((once, "mn", y), (twice, "mn", two), (twice, "nm", two)):
        for expr in (y, two):
            assert (forward_faults(masks + rest.format(*names), expr) == []) is (expr is right)


def test_what_autograd_needs_is_not_written_over():
    x, weight = Expr("x", (), None, (TOKENS, 12)), Expr("param", (), "step.w", (12, 12))
    y = make("matmul", x, weight)
    square, frozen = make("mul", y, y), Expr("frozen", (x,), None, (TOKENS, 12))
    head = 'def once(layer, dtype):\n    return ()\n\ndef setup(layer, leaves, known, dtype, cast):\n    ' \
           's0 = leaves["step.w"]\n    return (s0.to(cast), )\n\ndef body(layer, x, a0):\n'
    for lines, output, fault in (
            ("y0 = x @ a0\ny1 = y0 * y0\ny2 = y0.add_(y1)\nreturn y2", make("add", y, square), "what a gradient needs"),
            ("y0 = x @ a0\ny1 = y0.mul_(2.0)\nreturn y1", times(2.0, y), "what a gradient needs"),
            ("y0 = x @ a0\ny1 = torch.add(x, y0, alpha=2.0)\nreturn y1", make("add", x, times(2.0, y)), "a compiler"),
            # an operand of what is added up in place, and all that autograd does not see into
            ("y0 = x @ a0\ny1 = layer.frozen(x)\ny2 = y1.addmm_(y0, a0)\ny3 = y0.add_(x)\ny4 = y2.add_(y3)\nreturn y4",
             make("add", make("add", frozen, make("matmul", y, weight)), make("add", y, x)), "what a gradient needs"),
            ("y0 = x @ a0\ny1 = add_blocks(y0, x, a0)\nreturn y1", y, "what a gradient needs"),
            ("y0 = x @ a0\ny1 = masked_times(y0, x, a0)\ny2 = y0.add_(y1)\nreturn y2", y, "what a gradient needs"),
            ("y0 = x @ a0\ny1 = layer.frozen_onto(y0, x)\nreturn y1", make("add", y, frozen), "what a gradient needs"),
            ("with torch.no_grad():\n    y0 = x @ a0\nreturn y0", y, "result 0"),
            ("y0 = layer.frozen(x)\ny1 = y0.addmm_(x, a0)\nreturn y1",
             make("add", frozen, y), None)):
        found = program_faults(head + indent(lines, "    "), (output,))
        assert found == [] if fault is None else fault in found[0]
    # a module that is called may give back its input
    assert "not the function's own" in program_faults(head + indent(lines, "    "), (output,), is_called=True)[0]


# ------------------------------------------------------------------------------------------ the text as it was once


def step_of(name: str, frozen_last: bool = False) -> StepText:
    """The step of one of the specs that were wrong once."""
    layer = nn.Linear(128, 64, bias=False).double()
    surgeon = surgery.apply(Tower(layer), surgery.parse((SUMS / f"{name}.surg").read_text()).retarget("**"))
    best = next(iter(surgeon.adapters.values())).compiled.program()
    plan = next(each for each in (best, *best.over) if each.strategy == "activations").plan
    return step_text(plan.written, plan.needs, frozen_last)


def test_the_line_that_was_wrong_is_seen():
    """What was emitted once for `(W + B A) (I + C D)`: g2 was written over, and then read as if it was not."""
    text = step_of("input_gradient")
    was = """
def backward(layer, grad, k0, k1, k2, k3, k4, k5, k6, k7):
    g0 = grad @ k0
    g1 = g0 @ k1
    g2 = layer.frozen_back(grad)
    g3 = g2.add_(g1)
    g4 = g1.add_(g2, alpha=2.0)
    g5 = g3 @ k2
    g6 = g4.addmm_(g5, k3)
    return (g6, g5.mT @ k4, (k5.mT @ g3).mT, g0.mT @ k6, (k7.mT @ grad).mT, )"""
    source = text.source[:text.source.index("\n\ndef backward")] + "\n" + was
    assert step_faults(text.source, text.body, text.gradients, text.forwarded) == []
    (fault,) = step_faults(source, text.body, text.gradients, text.forwarded)
    assert fault == "line `g4 = g1.add_(g2, alpha=2.0)`: `g2` has been written over"


# -------------------------------------------------------------------------------------------------------- mutations


def spoilt(source: str) -> Iterator[str]:
    """The text with one line left out, two exchanged, another number, another operand, or a sum written over its
    operand."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("    ") or "return" in line:
            continue
        yield "\n".join(lines[:i] + lines[i + 1:])
        if "return" not in lines[i + 1]:
            yield "\n".join([*lines[:i], lines[i + 1], line, *lines[i + 2:]])
        target, _, value = line.partition(" = ")
        changes = {value.replace("2.0", "3.0"), re.sub(r"@ (\w+)", r"@ \1.mT", value, count=1),
                   re.sub(r"torch\.(add|addmm|addcmul)\((\w+), ", r"\2.\1_(", value),
                   re.sub(r"^(\w+) \+ (\w+)", r"\1.add_(\2)", value),
                   re.sub(r"^([\d.]+) \* (\w+)", r"\2.mul_(\1)", value),
                   re.sub(r"\.(add|addmm|addcmul)_\(", r".clone().\1_(", value)}
        for name in re.findall(r"\b[gyk]\d+\b", value):
            changes |= {value.replace(name, f"{name[0]}{abs(int(name[1:]) + by)}", 1) for by in (1, -1)}
        yield from ("\n".join([*lines[:i], f"{target} = {change}", *lines[i + 1:]]) for change in changes - {value})


def numbers(source: str, text: StepText) -> list[Tensor] | None:
    """What a text computes (None where it fails), and what it leaves of its arguments."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128, dtype=torch.float64)
    layer = SimpleNamespace(frozen=lambda x: x @ weight.mT, frozen_flat=lambda x: x @ weight.mT,
                            frozen_back=lambda g: g @ weight,
                            frozen_onto=lambda y, x, beta=1.0: y.addmm_(x, weight.mT, beta=beta),
                            frozen_back_onto=lambda y, g, beta=1.0: y.addmm_(g, weight, beta=beta))
    leaves = {n.data: n for e in (text.body, *text.forwarded) for n in walk(e) if n.op == "value"}
    given = [torch.randn(9, 128, dtype=torch.float64),
             *(torch.randn(leaves[i].shape, dtype=torch.float64) for i in sorted(leaves))]
    grad = torch.randn(9, 64, dtype=torch.float64)
    scope = names_called(in_step=True)
    try:
        exec(source, scope)
        y, kept = scope["forward"](layer, *given)
        y = y.clone()
        found = scope["backward"](layer, grad, *kept)
    except Exception:
        return None
    return [y, grad, *given, *found]


@pytest.mark.parametrize("name, frozen_last", [("input_gradient", True), ("training_output", False)])
def test_what_changes_a_number_is_seen(name, frozen_last):
    text = step_of(name, frozen_last)
    right, red, green = numbers(text.source, text), 0, []
    for source in dict.fromkeys(spoilt(text.source)):
        found = numbers(source, text)
        is_same = found is not None and len(found) == len(right) and all(
            a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, right))
        faults = step_faults(source, text.body, text.gradients, text.forwarded)
        if not is_same:
            assert faults, source
        red, green = red + bool(faults), green + [source] * (not faults)
    assert red > 100 and len(green) > 10


def test_a_gpus_step_is_proven_against_the_plain_operations():
    """A gain on the other side of a low-rank term, the two values of a backward pass exchanged, another mask, an operand
    that is missing, a third value of two, two values as one."""
    spoilt_ones = {"dora": [("0, a2, y3", "0, a2, y2"), ("True), y0", "False), y0"), ("True), grad", "False), grad"),
                            ("g1[0]", "g1[1]"), ("masked_outer((True,)", "masked_outer((False,)"), ("k3, k4", "k3, k3"),
                            ("masked_times(x, y1", "masked_times(x, x"), ("masked_times(x, y1", "masked_times(x"),
                            ("g1[0]", "g1[2]"), ("g1[0]", "g1")],
                   "sora": [("gained((4.0, False)", "gained((2.0, False)"), ("k0, k8, g0", "k8, k0, g0"),
                            ("gained_back((1.0, False)", "gained_back((1.0, True)")]}
    for name, pairs in spoilt_ones.items():
        layer = nn.Linear(128, 64, bias=False)
        surgeon = surgery.apply(Tower(layer), surgery.load(name, dropout=0.5).retarget("**"))
        best = next(iter(surgeon.adapters.values())).compiled.program()
        plan = next(each for each in (best, *best.over) if each.strategy == "activations").plan
        text = step_text(plan.written, plan.needs, frozen_last=True, one_pass=True)
        assert step_faults(text.source, text.body, text.gradients, text.forwarded) == []
        for was, becomes in pairs:
            assert was in text.source, f"{was}\n{text.source}"
            assert step_faults(text.source.replace(was, becomes), text.body, text.gradients, text.forwarded), becomes


@pytest.mark.parametrize("update", ["z - detach(z)", "z + 3 * detach(z)", "z - detach(2 * z)", "-2 * detach(z).T + z"])
def test_no_multiple_of_a_product_is_added_where_a_compiler_looks_on(update):
    """Detached or not: torch's compiler forgets the factor (of the first, what it gave was z + z)."""
    text = ("update own() {\n  check out == in\n  param A[in, in] ~ normal()\n  param B[in, in] = 0\n  let z = B @ A\n"
            f"  return {update}\n}}\ntarget linear {{ add own() }}\n")
    surgeon = surgery.apply(nn.Sequential(nn.Linear(12, 12)), surgery.parse(text), check=False)
    for program in (*surgeon.adapters["0"].programs().values(), surgeon.plan.placed[0].compiled.weights):
        assert program_faults(program.source, program.outputs) == []
