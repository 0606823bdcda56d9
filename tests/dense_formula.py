"""Any spec on any kind of layer: what the operated layer gives, and what the dense formula gives in any dtype."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, settings
from layers import LAYOUTS, Tower, gradients, perturb
from torch import Tensor, nn

from surgery.diagnostics import SurgeryError
from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.language.tree import Spec
from surgery.planning.compile import Placed
from surgery.runtime.apply import apply
from surgery.runtime.surgeon import Surgeon

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
    try:
        surgeon = apply(model, spec, seed=3, dtype=adapter)
    except SurgeryError as error:
        assume("is not finite" not in str(error))  # as 0 times the inverse of 0: refused, and nothing to compare
        raise
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
