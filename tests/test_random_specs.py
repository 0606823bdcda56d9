"""Random specs: whatever the formula, the lowered layer is the dense one, merged and unmerged agree,
the text is the spec."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layers import LAYOUTS, Tower, gradients, perturb
from random_specs import specs
from reference import Reading, compare_gradients
from torch import Tensor, nn

from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.language.library import parse
from surgery.language.parser import from_json
from surgery.language.to_python import python_text
from surgery.language.tree import Spec
from surgery.planning.compile import Placed
from surgery.runtime.surgeon import Surgeon, apply

# More examples, and new ones, are a matter of SURGERY_EXAMPLES=5000; the suite runs the same few each time.
EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", 0))


def some(share: int) -> Callable:
    return settings(max_examples=EXAMPLES or share, derandomize=not EXAMPLES, deadline=None, print_blob=True,
                    suppress_health_check=list(HealthCheck))


class Experts(nn.Module):
    """A stack of linear maps, as transformers fuses experts."""

    def __init__(self, out: int, in_: int, is_transposed: bool):
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias = 2, is_transposed, False
        self.weight = nn.Parameter(torch.empty(2, in_, out) if is_transposed else torch.empty(2, out, in_))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.is_transposed else self.weight.mT)


LAYERS = {**{name: (layout.build, layout.inputs) for name, layout in LAYOUTS.items()},
          "experts 12x18": (lambda: Experts(12, 18, False), lambda: torch.randn(2, 3, 18)),
          "transposed experts 12x18": (lambda: Experts(12, 18, True), lambda: torch.randn(2, 3, 18))}


@st.composite
def operations(draw) -> tuple[str, str]:
    """A spec, and the name of a layer to put it on."""
    layer = draw(st.sampled_from(sorted(LAYERS)))
    return draw(specs(getattr(LAYERS[layer][0](), "bias", None) is not None)), layer


@dataclass(frozen=True)
class Operated:
    """A model with one operated layer, its parameters moved, that layer as it was, and an input."""

    surgeon: Surgeon
    base: nn.Module
    x: Tensor

    def dense(self, x: Tensor, leaves: dict[str, Tensor], dtype: torch.dtype, run: torch.dtype) -> Tensor:
        """The base layer's own map, run in a dtype, with the dense W' and b' that another dtype gives."""
        (placed,), frozen = self.surgeon.plan.placed, {k: v.to(dtype) for k, v in self.base.named_parameters()}
        values = {**frozen, **leaves, "weight": placed.site.layout.matrix(frozen["weight"])}
        new = {"weight": placed.site.layout.unmatrix(_each(placed, placed.formula.weight, values),
                                                     frozen["weight"].shape)}
        if "bias" in frozen:
            new["bias"] = dense(placed.formula.bias, values)
        return torch.func.functional_call(self.base, {name: value.to(run) for name, value in new.items()}, x)


def _each(placed: Placed, expr: Expr, leaves: dict[str, Tensor]) -> Tensor:
    """The dense value, of each matrix of a stack."""
    if placed.site.stack is None:
        return dense(expr, leaves)
    shared = {leaf.key for leaf in placed.formula.leaves if leaf.group}
    return torch.stack([dense(expr, {k: v if k in shared else v[i] for k, v in leaves.items()})
                        for i in range(placed.site.stack)])


def operated(spec: Spec, layer: str, dtype: torch.dtype, adapter: torch.dtype) -> Operated:
    torch.manual_seed(1)
    build, inputs = LAYERS[layer]
    base, model = build().to(dtype), Tower(build().to(dtype))
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.layers[0].load_state_dict(base.state_dict())
    surgeon = apply(model, spec, seed=3, dtype=adapter)
    perturb(model)
    base.requires_grad_(False)
    x = inputs()
    return Operated(surgeon, base, x.to(dtype) if x.is_floating_point() else x)


Results = dict[str, Tensor]


def results(op: Operated, run: Callable, tensors: dict[str, Tensor], dtype: torch.dtype) -> Results:
    """The output of a program of the input and the adapter's tensors, and its gradients in both."""
    x = op.x.to(dtype) if op.x.is_floating_point() else op.x
    x = x.clone().requires_grad_(x.is_floating_point())
    y = run(x, tensors)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    taking = {key: leaf for key, leaf in {"the input": x, **tensors}.items() if leaf.requires_grad}
    found = gradients(y, direction,
                      taking) if y.requires_grad else {key: torch.zeros_like(leaf) for key, leaf in taking.items()}
    return {"the output": y.detach(), **{f"the gradient of {key}": g for key, g in found.items()}}


def lowered(op: Operated) -> Results:
    """What the operated layer gives."""
    (adapter,) = op.surgeon.adapters.values()
    return results(op, lambda x, _: op.surgeon.model(x), adapter.tensors(), op.x.dtype)


def meant(op: Operated, dtype: torch.dtype, run: torch.dtype) -> Results:
    """What the dense formula gives in a dtype, the layer run in another."""
    (adapter,) = op.surgeon.adapters.values()
    leaves = {key: t.detach().to(dtype if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)
              for key, t in adapter.tensors().items()}
    return results(op, lambda x, tensors: op.dense(x, adapter.shaped(tensors), dtype, run), leaves, run)


def error(found: Tensor, wanted: Tensor) -> float:
    """The distance, relative to what is wanted where that is not small."""
    return ((found.double() - wanted.double()).norm() / (1 + wanted.double().norm())).item()


def finite(found: Results) -> bool:
    return all(value.isfinite().all() for value in found.values())


@some(60)
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


@some(30)
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


# How far from the exact results a dtype may be: so many times what the dense formula is in it, and a few roundings.
NARROW = {torch.float32: (30.0, 2e-5), torch.bfloat16: (5.0, 6e-2)}


@some(40)
@given(operations(), st.sampled_from(sorted(NARROW, key=str)))
def test_in_narrow_dtypes_it_is_as_exact_as_the_dense_formula(operation, dtype):
    text, layer = operation
    text = text.replace('"**" {', '"**" shifted {')  # large terms that cancel do so up to a rounding
    op = operated(parse(text), layer, dtype, torch.float32)
    op.surgeon.model.train("dropout(10%)" not in text)
    found, plain, exact = lowered(op), meant(op, torch.float32, dtype), meant(op, torch.float64, torch.float64)
    assume(finite(plain) and finite(exact))
    factor, rounding = NARROW[dtype]
    for what, value in exact.items():
        most = factor * error(plain[what], value) + rounding
        assert error(found[what],
                     value) <= most, f"{what} is off by {error(found[what], value):.1e}, {most:.1e} is allowed"


@some(40)
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


@some(40)
@given(specs())
def test_three_forms_are_one_spec(text):
    spec = parse(text)
    assert parse(spec.to_surg()) == spec == from_json(spec.model_dump_json())
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
