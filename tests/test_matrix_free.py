"""No matrix [out, in], [in, in] or [out, out] is ever made where the structure allows a cheap program:
every tensor is watched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery

OUT, IN, TOKENS, RANK = 1280, 1536, 24, 4
ALLOWED = max(TOKENS, 4 * RANK) * max(OUT, IN)  # numbers; a matrix of the weight's size has fifty times as many

STEPS = {
    "kron on out": "post group_gain()", "householder on out": "post householder(2)",
    "block rotation on out": "post block_orthogonal(8)",
    "rotation on in": "pre orthogonal(4) on in",
    "both sides": "pre diagonal()  pre diagonal() on in  add low_rank(4)  post householder(2)",
}
GROUPS = """
transform group_gain() on n : diagonal {
  param g[8] = 0
  return kron(diag(exp(g)), I(n / 8))
}
"""
SHIPPED = {
    "lora": {"rank": 4}, "dora": {"rank": 4}, "pre_diag": {"rank": 4}, "post_diag": {"rank": 4}, "sora": {"rank": 4},
    "sora_reference": {"rank": 4}, "oft": {"block": 8}, "boft": {"block": 8}, "hra": {"rank": 4}, "delora": {"rank": 4},
    "gralora": {"rank": 4}, "miss": {"rank": 4}, "road_1": {}, "road_2": {}, "road_4": {}, "lokr": {"rank": 2},
    "deft": {"rank": 4},
    "pissa": {"rank": 4}, "tinylora": {},
}


def specs() -> dict[str, surgery.Spec]:
    own = {name: surgery.parse(f'{GROUPS}\nspec own()\ntarget linear "0" {{ {steps} }}')
           for name, steps in STEPS.items()}
    return own | {name: surgery.load(name, **settings).retarget("0") for name, settings in SHIPPED.items()}


class Watch(TorchDispatchMode):
    """The sizes of all tensors that are made; views of the frozen weight are not made."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.made = weight.untyped_storage().data_ptr(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.weight:
                self.made[f"{func} {tuple(tensor.shape)}"] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return result


def largest(spec: surgery.Spec) -> tuple[str, int]:
    """The largest tensor that a step makes, a second one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    surgery.apply(model, spec)
    for _ in range(2):
        with Watch(model[0].get_parameter("weight")) as watch:
            model(torch.randn(TOKENS, IN, requires_grad=True)).square().sum().backward()
    return max(watch.made.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name, spec", specs().items(), ids=list(specs()))
def test_no_large_matrix_is_made(name, spec):
    what, size = largest(spec)
    assert size <= ALLOWED, f"{what} has {size} numbers, and {ALLOWED} are allowed"


def test_a_dense_formula_is_seen():
    assert largest(surgery.load("hira", rank=4).retarget("0"))[1] == OUT * IN
