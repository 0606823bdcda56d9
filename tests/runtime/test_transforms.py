"""Transforms of torch.func and forward differentiation see through operated layers, called ones too: what they give is
what the dense formula gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from case import Case
from each import in_turns, of_some
from layers import Tower, assert_close, perturb
from packed import Int4Linear, Int8Linear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, vjp, vmap
from zoo import CASES

from surgery.ir.dense import dense
from surgery.runtime.apply import apply

EXACT = 1e-8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(18, 12).double(), "bytes": lambda: Int8Linear(18, 12), "packed": lambda: Int4Linear(18, 12)}
Tensors = dict[str, Tensor]
Run = Callable[[Tensor, Tensors], Tensor]


def pair(case: Case, layer: nn.Module, training: bool) -> tuple[Run, Run, Tensors]:
    """The operated layer and the dense formula, as functions of the input and of what trains; the parameters."""
    weight = layer.weight.detach() if isinstance(layer, nn.Linear) and layer.weight.dtype.is_floating_point else (
        layer.dequantised(torch.float64))
    frozen = {"weight": weight, "bias": layer.bias.detach().double()}
    model = Tower(layer)
    surgeon = apply(model, case.spec(), seed=3, dtype=torch.float64)
    perturb(model)
    model.train(training)
    adapter, named = surgeon.adapters["layers.0"], dict(model.named_parameters())
    held = adapter.tensors()
    keys = {name: key for name, p in named.items() for key, t in held.items() if p is t and p.requires_grad}

    def formula(x: Tensor, parameters: Tensors) -> Tensor:
        given = adapter.shaped({**{key: t.detach() for key, t in held.items()},
                                **{keys[name]: t for name, t in parameters.items()}})
        w, b = (dense(expr, {**frozen, **given}) for expr in (adapter.formula.weight, adapter.formula.bias))
        return nn.functional.linear(x, w, b)

    return (lambda x, parameters: functional_call(model, parameters, (x,)), formula,
            {name: named[name].detach().clone() for name in keys})


def dual(run: Run, x: Tensor, parameters: Tensors, v: Tensor, moved: Tensors) -> Tensor:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, moved[name]) for name, p in parameters.items()}
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, v), duals)).tangent


def cubes(run: Run, x: Tensor) -> Callable[[Tensors], Tensor]:
    return lambda parameters: run(x, parameters).pow(3).sum()  # not squares, of which a rotation changes none


# Each takes a function of an input and parameters, those, and directions for them.
TRANSFORMS: dict[str, Callable[[Run, Tensor, Tensors, Tensor, Tensors], Tensor | Mapping[str, Tensor]]] = {
    "jvp": lambda run, x, p, v, w: jvp(run, (x, p), (v, w))[1],
    "forward differentiation": dual,
    "jacfwd": lambda run, x, p, v, w: jacfwd(lambda x: run(x, p)[..., :2])(x),
    "vjp": lambda run, x, p, v, w: vjp(lambda p: run(x, p), p)[1](run(v, p))[0],
    "a Hessian": lambda run, x, p, v, w: jvp(grad(cubes(run, x)), (p,), (w,))[1],
    "vmap over inputs": lambda run, x, p, v, w: vmap(lambda x: run(x, p))(x),
    "vmap over parameters": lambda run, x, p, v, w: vmap(lambda p: run(x, p))(
        {name: torch.stack([t, t + w[name]]) for name, t in p.items()}),
    "gradients of each sample": lambda run, x, p, v, w: vmap(lambda x: grad(cubes(run, x))(p))(x),
}


@in_turns(2)
@pytest.mark.parametrize("case", CASES, ids=str)
@of_some("layer transform", [], [(layer, each) for each in TRANSFORMS for layer in LAYERS],
         [(layer, each) for layer in reversed(LAYERS) for each in reversed(TRANSFORMS)])
def test_a_transform_gives_what_it_gives_of_the_dense_formula(case, layer, transform):
    torch.manual_seed(0)
    run, formula, parameters = pair(case, LAYERS[layer](), training=len(case.name) % 2 == 0)
    x, v = torch.randn(2, 2, 3, 18, dtype=torch.float64)
    moved = {name: 0.1 * torch.randn_like(p) for name, p in parameters.items()}
    try:
        wanted = TRANSFORMS[transform](formula, x, parameters, v, moved)
    except NotImplementedError:  # of singular vectors, which have no forward derivative
        with pytest.raises(NotImplementedError, match="forward mode"):
            TRANSFORMS[transform](run, x, parameters, v, moved)
        return
    found = TRANSFORMS[transform](run, x, parameters, v, moved)
    if isinstance(wanted, Tensor):
        found, wanted = {"": found}, {"": wanted}
    for name, value in wanted.items():
        assert_close(found[name], value, EXACT, f"{transform} {name}")
