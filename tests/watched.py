"""The largest tensor that a training step makes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery

OUT, IN, TOKENS, RANK = 640, 768, 24, 4
ALLOWED = max(TOKENS, 4 * RANK) * max(OUT, IN)  # numbers; a matrix of the weight's size has 26 times as many


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
    surgery.apply(model, spec, check=False)
    for _ in range(2):
        with Watch(model[0].get_parameter("weight")) as watch:
            model(torch.randn(TOKENS, IN, requires_grad=True)).square().sum().backward()
    return max(watch.made.items(), key=lambda item: item[1])
