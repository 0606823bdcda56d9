"""The dense meaning of an expression: the oracle that every fast path is compared with.

Takes an expression and the tensors of its leaves (`weight`, `bias`, parameters by key; of a program also `x`, for a
linear layer in evaluation); gives its value as a tensor with a gradient. Promises: nothing is approximated, each
distinct node is computed once, any device, any float dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.ir.expression import Expr, walk
from surgery.ir.operations import operation

Leaves = Mapping[str, torch.Tensor]


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype; places stay whole numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def dense(expr: Expr, leaves: Leaves, known: dict[Any, Any] | None = None) -> torch.Tensor:
    """The value of `expr`. `leaves` maps "weight", "bias" and each parameter's key to its tensor.

    The weight's dtype and device decide those of constants and identities. `known` holds values of the same leaves, and
    grows.
    """
    like = leaves["weight"]
    values = {} if known is None else known
    for node in walk(expr):
        if node in values:
            continue
        row, args = operation(node), [values[a] for a in node.args]
        if row.evaluate is not None:
            values[node] = row.evaluate(node, args, leaves)
        elif row.jointly is not None and row.part is not None:
            # what the other parts of it are taken from too: a decomposition takes long
            computed = (row.jointly, node.args)
            if computed not in values:
                values[computed] = row.jointly(*args)
            values[node] = row.part(node.data, values[computed])
        else:  # numbers are plain ones until an operation must have tensors, so that they round in no dtype
            tensors = [like.new_tensor(a) for a in args] if all(isinstance(a, float) for a in args) else args
            values[node] = row.value(node.data, tensors, like)
    result = values[expr]
    return result if isinstance(result, torch.Tensor) else like.new_tensor(result)
