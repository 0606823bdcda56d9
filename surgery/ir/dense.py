"""The dense meaning of an expression: the oracle that every fast path is compared with.

Takes an expression and the tensors of its leaves (`weight`, `bias`, parameters by key; of a program also `x`, for a
linear layer in evaluation); gives its value as a tensor with a gradient. Promises: nothing is approximated, each
distinct node is computed once, any device, any float dtype, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from surgery.ir.expression import Expr, walk
from surgery.ir.operations import operation

Leaves = Mapping[str, torch.Tensor]


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype; places stay whole numbers. (To ask torch for the dtype that it has takes as long as a
    small product.)"""
    return tensor if tensor.dtype is dtype or not tensor.is_floating_point() else tensor.to(dtype)


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which products are computed in the dtype of what they are given; nothing where they are anyway, as
    to enter one takes longer than a small product."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Whether autocast is on; for tensors without numbers there is none, and torch refuses to be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def dense(expr: Expr, leaves: Leaves, known: dict[Any, Any] | None = None) -> torch.Tensor:
    """The value of `expr`. `leaves` maps "weight", "bias" and each parameter's key to its tensor.

    The weight's dtype and device decide those of constants and identities. `known` holds values of the same leaves, and
    grows; without it each is let go of after the last that reads it.
    """
    like = leaves["weight"]
    values = {} if known is None else known
    nodes = [*walk(expr)]
    last = {arg: node for node in nodes for arg in node.args} if known is None else {}
    with without_autocast(like.device.type):
        for node in nodes:
            if node not in values:
                values[node] = _value(node, values, leaves)
            for arg in {*node.args} if known is None else ():
                if last[arg] is node:
                    del values[arg]
    result = values[expr]
    return result if isinstance(result, torch.Tensor) else like.new_tensor(result)


def _value(node: Expr, values: dict[Any, Any], leaves: Leaves) -> Any:
    """The value of a node whose arguments have theirs."""
    row, like, args = operation(node), leaves["weight"], [values[a] for a in node.args]
    if row.evaluate is not None:
        return row.evaluate(node, args, leaves)
    if row.jointly is not None and row.part is not None:
        # what the other parts of it are taken from too: a decomposition takes long
        computed = (row.jointly, node.args)
        if computed not in values:
            values[computed] = row.jointly(*args)
        return row.part(node.data, values[computed])
    # numbers are plain ones until an operation must have tensors, so that they round in no dtype
    tensors = [like.new_tensor(a) for a in args] if all(isinstance(a, float) for a in args) else args
    return row.value(node.data, tensors, like)
