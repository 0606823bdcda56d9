"""Marks by which gradient checkpointing sees that other surgeries are in use than when a layer ran.

torch runs a checkpointed layer again in the backward pass, with whatever stands in it then, and compares the shapes of
what it saves with those of before. Two surgeries of one form save the same shapes, and the gradients would be those of
the wrong one, without a word. So what a layer reads of an adapter is saved beside an empty tensor whose size says which
surgeries are in use: torch then raises its `CheckpointError`. (Reentrant checkpoints compare nothing.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from surgery.ir.orthogonal_maps import is_traced


def mark_of(names: Iterable[str], shares: Iterable[float]) -> int:
    """A number for surgeries in use, in order, and their shares where they are mixed."""
    return crc32(repr((*names, *shares)).encode())


def marked(tensors: Mapping[str, Tensor], mark: int | None) -> Mapping[str, Tensor]:
    """The tensors, the first that takes a gradient as what saves the mark; themselves where there is none."""
    if mark is None or not torch.is_grad_enabled() or is_traced():
        return tensors
    first = next((key for key, tensor in tensors.items() if tensor.requires_grad), None)
    return tensors if first is None else {**tensors, first: _Marked.apply(tensors[first], mark)}


class _Marked(torch.autograd.Function):
    """A tensor as it is, which saves its mark."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mark: int) -> Tensor:
        ctx.save_for_backward(torch.empty(mark, 0))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return *grad_outputs, None
