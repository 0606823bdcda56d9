"""Probe a called layer: it must be a linear map of each row, the same at every call, with that map's gradient.

Takes a module with numbers in it; gives an `Answer`. Promises: a few calls on at most four random rows; what a layer
with quantised activations rounds is let pass.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.layers import opaque_linear

# Eight bits for an activation leave errors of a few per cent of these rows' images; a kink or a saturation makes more.
TOLERANCE = 0.08
_SHARE, _OTHER = 0.5, -1.5


@dataclass(frozen=True)
class Answer:
    """`fault`: why the layer cannot be operated on, empty if it can. `gives_gradient`: whether its input gets one."""

    fault: str = ""
    gives_gradient: bool = False


def ask(module: nn.Module) -> Answer:
    """Probe a layer by calls. Whatever it raises is reported as a fault."""
    try:
        device = opaque_linear.device(module).type
        with warnings.catch_warnings(), torch.enable_grad(), torch.autocast(device, enabled=False):
            warnings.simplefilter("ignore")  # torch warns that a layer has no gradient, which is what is asked
            return _answer(opaque_linear.twin(module))
    except Exception as failure:  # a third party's layer raises whatever it likes
        if hasattr(module, "quantization_scheme") and not opaque_linear.has_plain_weight(module):
            return Answer("compressed-tensors unpacks their weights in the model's first forward pass: run one before")
        lines = str(failure).strip().splitlines()
        return Answer(f"calling {type(module).__name__} fails ({lines[0] if lines else type(failure).__name__})")


def _answer(module: nn.Module) -> Answer:
    name = type(module).__name__
    # four rows: x, y, a x + b y and 0, always the same ones
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, opaque_linear.said_sides(module)[1], generator=generator, dtype=torch.float32, device="cpu")
    y = 3 * y
    rows = torch.stack([x, y, _SHARE * x + _OTHER * y, torch.zeros_like(x)])
    rows = opaque_linear.asking(rows.to(opaque_linear.device(module), opaque_linear.taken_dtype(module, torch.float32)))
    whole, alone = opaque_linear.forward_of(module)(rows), opaque_linear.forward_of(module)(rows[None, 2:3])
    wanted = (len(rows), opaque_linear.said_sides(module)[0])
    if tuple(whole.shape) != wanted or tuple(alone.shape) != (1, 1, wanted[1]):
        return Answer(f"{name} gives {list(whole.shape)} for {list(rows.shape)}")
    fault = _fault(module, whole.detach().double(), alone.detach().double()[0, 0])
    if fault:
        return Answer(f"{name} {fault}")
    # Wᵀ of an image W row: against the row it is the square of the image, whatever W is
    image, row = (whole[2] - whole[3]).detach(), rows[2:3].detach()
    again = row.clone().requires_grad_()
    output = opaque_linear.forward_of(module)(again)
    gradient = None
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output, again, image[None].to(output.dtype), allow_unused=True)
    if gradient is not None and not _near((gradient.double() * row).sum(), image.double().square().sum()):
        fault = f"the gradient that {name} gives is not that of its map"
    return Answer(fault, gradient is not None)


def _fault(module: nn.Module, whole: Tensor, alone: Tensor) -> str:
    """Why the images of the four rows are none of a linear map; empty if they may be."""
    first, second, together, zero = whole
    bias = opaque_linear.bias(module)
    size = (together - zero).norm()
    if not whole.isfinite().all():
        return "is no linear map: it gives what is not finite"
    if not _near(alone, together, size):
        return "is no map of each row: alone, a row gets another output than among others, or at another call"
    if not _near(together - zero, _SHARE * (first - zero) + _OTHER * (second - zero)):
        return "is no linear map: f(a x + b y) is far from a f(x) + b f(y)"
    if not _near(zero, torch.zeros_like(zero) if bias is None else bias.detach().double(), size):
        return "is no linear map: at 0 it gives something else than its bias"
    return ""


def _near(a: Tensor, b: Tensor, size: Tensor | None = None) -> bool:
    return bool((a - b).norm() <= TOLERANCE * (b.norm() if size is None else size))
