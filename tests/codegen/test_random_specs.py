"""Random specs: whatever the formula, the lowered layer is the dense one, merged and unmerged agree,
the text is the spec."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_formula import (
    LAYERS,
    Results,
    error,
    lowered,
    meant,
    operated,
    some,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from random_specs import specs
from reference import Reading, compare_gradients

from surgery.codegen import kernels, memory_order
from surgery.language.library import parse
from surgery.language.to_python import python_text
from surgery.language.tree import Spec


@pytest.fixture(scope="module", autouse=True)
def products_in_parts():
    """Of a few tokens too, and with all that is narrower, a CPU makes thin products in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_order, "WIDER", 1)
        for name in ("FEWEST", "BAND", "RUN"):
            patch.setattr(kernels, name, 2)
        yield


@st.composite
def operations(draw) -> tuple[str, str]:
    """A spec, and the name of a layer to put it on."""
    layer = draw(st.sampled_from(sorted(LAYERS)))
    return draw(specs(getattr(LAYERS[layer][0](), "bias", None) is not None)), layer


def finite(found: Results) -> bool:
    return all(value.isfinite().all() for value in found.values())


@some(32)
@given(operations())
def test_the_layer_is_the_dense_formula(operation):
    text, layer = operation
    op = operated(parse(text), layer, torch.float64, torch.float64)
    op.surgeon.model.train("dropout(10%)" not in text)
    found, wanted = lowered(op), meant(op, torch.float64, torch.float64)
    assume(finite(wanted))
    assert found.keys() == wanted.keys()
    for what, value in wanted.items():
        assert found[what].shape == value.shape
        assert error(found[what], value) <= 1e-8, f"{what} is off by {error(found[what], value):.1e}"


@some(16)
@given(operations())
def test_the_operated_weight_is_what_the_text_says(operation):
    """W', b' and their gradients against a reading of the text that shares no code with the package; of a stack, those
    of its last matrix."""
    text, layer = operation
    assume("top_softmax" not in text)  # of equal entries any may be among the largest
    op = operated(parse(text), layer, torch.float64, torch.float64)
    ((adapter,), (placed,)), module = (op.surgeon.adapters.values(), op.surgeon.plan.placed), op.surgeon.model.layers[0]
    is_stack = placed.site.stack is not None
    own = {leaf.key for leaf in placed.formula.leaves if is_stack and not leaf.group}
    tensors = {key: (t[-1] if key in own else t).detach().numpy().copy() for key, t in adapter.values().items()}
    matrix = placed.site.layout.matrix(op.base.weight.detach())
    bias = None if placed.site.bias is None else op.base.bias.detach().numpy()
    reading = Reading(text)

    def meant(tensors):
        return [v for v in reading.operated((matrix[-1] if is_stack else matrix).numpy(), bias, tensors)
                if v is not None]

    with np.errstate(all="ignore"):
        wanted = meant(tensors)
        assume(all(np.isfinite(value).all() for value in wanted))
        found = [value[-1] if is_stack else value for value in adapter.weights(module)]
        assert len(found) == len(wanted)
        for value, right in zip(found, wanted):
            assert error(value.detach(), torch.from_numpy(np.ascontiguousarray(right))) <= 1e-8
        draw = np.random.default_rng(0)
        directions = [draw.standard_normal(value.shape) for value in wanted]
        total = sum((value * torch.from_numpy(d)).sum() for value, d in zip(found, directions))
        taking = {key: t for key, t in adapter.tensors().items() if t.requires_grad}
        if taking and total.requires_grad:
            raw = torch.autograd.grad(total, list(taking.values()), allow_unused=True)
            grads = {key: (g[-1] if key in own else g).reshape(tensors[key].shape).numpy() for key, g in zip(taking, raw) if g is not None}
            assume(all(np.isfinite(g).all() for g in grads.values()))
            compare_gradients(reading, lambda moved: sum((v * d).sum() for v, d in zip(meant(moved), directions)),
                              tensors, grads, 1)


# How far from the exact results a dtype may be: so many times what the dense formula is in it, and a few roundings. What
# that is off by is the largest of some draws of its roundings (inputs of other sizes round otherwise): in a sum that
# cancels, one draw may be near the exact result by luck.
DRAWS = (1.0, 1.1, 1.3, 1.7)
NARROW = {torch.float32: (30.0, 2e-5), torch.bfloat16: (5.0, 6e-2)}


@some(20)
@given(operations(), st.sampled_from(sorted(NARROW, key=str)))
def test_in_narrow_dtypes_it_is_as_exact_as_the_dense_formula(operation, dtype):
    text, layer = operation
    text = text.replace('"**" {', '"**" shifted {')  # large terms that cancel do so up to a rounding
    op = operated(parse(text), layer, dtype, torch.float32)
    op.surgeon.model.train("dropout(10%)" not in text)
    drawn = [[meant(replace(op, x=size * op.x if size != 1 else op.x), *each)
              for each in ((torch.float32, dtype), (torch.float64, torch.float64))]
             for size in (DRAWS if op.x.is_floating_point() else (1,))]
    assume(all(finite(each) for pair in drawn for each in pair))
    found, (factor, rounding) = lowered(op), NARROW[dtype]
    for what, value in drawn[0][1].items():
        most = factor * max(error(plain[what], exact[what]) for plain, exact in drawn) + rounding
        assert error(found[what],
                     value) <= most, f"{what} is off by {error(found[what], value):.1e}, {most:.1e} is allowed"


@some(20)
@given(operations())
def test_merged_and_unmerged_agree(operation):
    text, layer = operation
    op = operated(parse(text), layer, torch.float64, torch.float64)
    model = op.surgeon.model.eval()
    bits, y = {name: value.clone() for name, value in model.state_dict().items()}, model(op.x)
    assume(y.isfinite().all())
    op.surgeon.merge()
    assert error(model(op.x), y) <= 1e-8
    op.surgeon.unmerge()
    assert all(torch.equal(value, bits[name])
               for name, value in model.state_dict().items()) and torch.equal(model(op.x), y)


@some(20)
@given(specs())
def test_three_forms_are_one_spec(text):
    spec = parse(text)
    assert parse(spec.to_surg()) == spec == Spec.model_validate_json(spec.model_dump_json())
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
