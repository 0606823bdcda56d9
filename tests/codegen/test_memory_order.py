"""What a CPU is best at, in the place of products of activations: the same numbers."""

from __future__ import annotations

import pytest
import torch
from formulas import formula
from torch import nn

from surgery.codegen.compiled import Compiled
from surgery.codegen.kernels import outer, thin
from surgery.codegen.program_text import step_text
from surgery.codegen.supposed_device import steps_of
from surgery.language.library import load
from surgery.runtime.apply import apply


@pytest.mark.parametrize("rank, products", [(1, 0), (2, 2), (8, 2), (24, 2), (25, 0), (64, 0)])
def test_thin_products_are_made_in_parts(rank, products):
    plan = Compiled.supposed(formula(load("lora", rank=rank))).candidates()[0]
    step = step_text(plan.written, plan.needs)
    assert step is not None
    assert step.source.count("thin(") == products
    for others in (step_text(plan.written, plan.needs, frozen_last=True), step_text(plan.written, (False,) * 3)):
        assert others is not None and "thin" not in others.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 130, 509, 1030])
@pytest.mark.parametrize("width", [16, 65, 128, 1003])
def test_a_product_in_parts_is_the_product(tokens, width, dtype):
    a, m, h = (torch.randint(-8, 8, size).to(dtype) / 8 for size in ((tokens, width), (width, 5), (tokens, 5)))
    for x in (a, torch.cat([a, a], dim=1)[:, :width]):  # in memory of its own, and part of other rows
        for columns in (m, m.mT.contiguous().mT):
            assert_near(thin(x, columns), x @ m)
        for rows, factor in ((h, 1.0), (h.mT.contiguous().mT, 1.0), (h, -0.5)):
            assert_near(outer(rows, x, alpha=factor), factor * (h.mT @ x))
            assert_near(outer(x, rows, alpha=factor), factor * (x.mT @ h))


@pytest.mark.parametrize("tokens", [8, 64, 1030])
def test_gradients_of_both_factors_lie_in_rows_where_products_are_in_parts(tokens):
    """What autograd keeps as a parameter's gradient is otherwise a copy of it."""
    h, x = torch.randn(tokens, 8), torch.randn(tokens, 640)
    assert outer(h, x).is_contiguous() and outer(x, h).is_contiguous()


def test_a_number_before_a_products_gradient_is_no_pass_of_its_own():
    plan = Compiled.supposed(formula(load("lora"))).candidates()[0]
    for device in (False, True):
        step = step_text(plan.written, plan.needs, frozen_last=device, one_pass=device)
        assert step is not None and step.source.count("outer(") == step.source.count(", alpha=2.0)  # [8, 1024]") + 1
        assert "mul_" not in step.source


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize("rank", [1, 8])
def test_gradients_of_several_outputs_at_once_are_those_one_by_one(rank, tokens, device):
    """Of `is_grads_batched`, as `jacobian(vectorize=True)` has it, and of a vmap: what writes into new memory takes no batch."""
    model, x = nn.Sequential(nn.Linear(520, 528)), torch.randn(tokens, 520, requires_grad=True)
    apply(model, load("lora", rank=rank))
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    with steps_of(device):
        y = model(x)
        several = torch.randn(2, *y.shape)
        found = torch.autograd.grad(y, wanted, several, is_grads_batched=True, retain_graph=True)
        mapped = torch.vmap(lambda one: torch.autograd.grad(y, wanted, one, retain_graph=True))(several)
        each = [torch.autograd.grad(y, wanted, one, retain_graph=True) for one in several]
    for got, also, parts in zip(found, mapped, zip(*each)):
        assert_near(got, torch.stack(parts))
        assert_near(also, torch.stack(parts))


@pytest.mark.parametrize("rank", [1, 8])
def test_a_compiler_sees_products_whose_sizes_it_does_not_know(rank):
    """As where torch compiles the backward pass too (`torch._dynamo.compiled_autograd`), and calls differ in size."""
    h, m, x = torch.randn(64, rank), torch.randn(640, rank), torch.randn(64, 640)
    compiled = torch.compile(lambda: (outer(h, x, 2.0), outer(x, h), thin(x, m)), backend="eager", fullgraph=True,
                             dynamic=True)
    for found, wanted in zip(compiled(), (2 * h.mT @ x, x.mT @ h, x @ m)):
        assert_near(found, wanted)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Sums of exact products, in whatever order they are added."""
    torch.testing.assert_close(found, wanted, rtol=1e-2 if wanted.dtype == torch.bfloat16 else 1e-5, atol=1e-3)
