"""Solves with a gradient of their own, which holds less than autograd's: what they give, and nothing beside it.

Where something looks into them that wants autograd's own operations (`is_traced`) they are those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether something looks into the program that knows autograd's own operations better than a node of ours: a compiler
    (which plans the backward pass itself), a transform of torch.func, forward differentiation."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or transformed


def inverse(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """(a + factor b)⁻¹, or those of a stack. Not by `torch.add(a, b, alpha=factor)`: where b is a product, torch 2.13's compiler
    forgets the factor."""
    return torch.linalg.inv_ex(a + factor * b).inverse  # does not wait for a device to say that one exists


def cayley(k: Tensor) -> Tensor:
    """(I - k/2)⁻¹ (I + k/2) = (I/2 - k/4)⁻¹ - I: one factorisation, and a gradient of two products."""
    return _cayley(k) if is_traced() else _Cayley.apply(k)


def _cayley(k: Tensor) -> Tensor:
    eye = _eye(k)
    return inverse(eye / 2, k, -0.25) - eye


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


class _Cayley(torch.autograd.Function):
    """c(k) with the gradient in k of <c(k), g>, (I + c)ᵀ g (I + c)ᵀ / 4."""

    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        rotation = _cayley(k)
        ctx.save_for_backward(rotation)
        return rotation

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (rotation,) = ctx.saved_tensors
        solved = (rotation + _eye(rotation)).mT / 2
        return solved @ g @ solved
