"""The singular value decomposition, with a gradient that is finite everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def singular_parts(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, Vᵀ) with a = U diag(s) Vᵀ, the largest first: of [..., m, n], [..., m, r], [..., r] and [..., r, n], r the
    smaller side. The signs of each pair of vectors are torch's own: PEFT's methods start from those, and a rotation
    that was trained in one basis means another in a basis of other signs. Of one tensor they are the same at every
    call, so that the three agree wherever one is computed by itself. Where singular values are equal or zero, the
    gradient leaves out what would divide by their difference."""
    wide = torch.promote_types(a.dtype, torch.float32)  # torch has no decomposition in half precision
    u, s, v = _SingularParts.apply(a.to(wide))
    return u.to(a.dtype), s.to(a.dtype), v.to(a.dtype)


class _SingularParts(torch.autograd.Function):
    """The gradient of Townsend, "Differentiating the singular value decomposition" (2016), in terms of autograd's own
    operations, so that it has one too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.linalg.svd(a, full_matrices=False)
        return u, s, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (u, s, v), (gu, gs, gv) = ctx.saved_tensors, grad_outputs
        # what rounding leaves of a difference, and of a singular value, that is zero
        least = torch.finfo(s.dtype).eps * max(u.shape[-2], v.shape[-1]) * s[..., :1]
        columns, rows = s[..., None, :], s[..., :, None]
        is_apart = (columns - rows).abs() > least[..., None]
        gaps = _reciprocal((columns - rows) * (columns + rows), is_apart)
        inverse = _reciprocal(s, s > least)

        turned_u, turned_v = u.mT @ gu, v @ gv.mT
        inner = (gaps * (turned_u - turned_u.mT)) * columns + rows * (gaps * (turned_v - turned_v.mT))
        inside = u @ (inner + gs.diag_embed()) @ v
        beside_u = (gu - u @ turned_u) * inverse[..., None, :] @ v
        beside_v = u @ (inverse[..., :, None] * (gv - turned_v.mT @ v))
        return inside + beside_u + beside_v


def _reciprocal(x: Tensor, fits: Tensor) -> Tensor:
    """1 / x where it fits, else 0."""
    return x.where(fits, torch.ones_like(x)).reciprocal() * fits
