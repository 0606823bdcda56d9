"""Rotations, and a root, with a gradient of their own, which holds less than autograd's and takes fewer operations.

What it holds is what they give, and nothing beside it. Where something looks into them that wants autograd's own
operations (`is_traced`) they are those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether something looks into the program that knows autograd's own operations better than a node of ours: a
    compiler (which plans the backward pass itself), a transform of torch.func, forward differentiation."""
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  # torch's documentation names it so
    return torch.compiler.is_compiling() or is_transformed() or traced


def is_transformed() -> bool:
    """Whether a transform of torch.func looks on, or forward differentiation."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def eliminated(a: Tensor) -> Tensor:
    """a⁻¹ of each matrix in [..., n, n] by n steps of elimination without a choice of pivots, in operations that every
    format of models has. For triangles, and where a + aᵀ is positive definite: there no pivot is small."""
    n = a.shape[-1]
    eye = torch.eye(n, dtype=a.dtype, device=a.device)
    both = torch.cat([a, eye.expand_as(a)], dim=-1)
    for i in range(n):
        row = both[..., i:i + 1, :] / both[..., i:i + 1, i:i + 1]
        both = both - (both[..., :, i:i + 1] - eye[:, i:i + 1]) * row
    return both[..., n:]


def triangle(gram: Tensor) -> Tensor:
    """The lower L with L Lᵀ = gram [..., n, n], positive definite, in the same operations."""
    n, columns = gram.shape[-1], []
    for i in range(n):
        below = torch.ones(n, 1, dtype=gram.dtype, device=gram.device).tril(-i)
        columns.append(below * gram[..., :, i:i + 1] / gram[..., i:i + 1, i:i + 1].sqrt())
        gram = gram - columns[-1] @ columns[-1].mT
    return torch.cat(columns, dim=-1)


def skew(a: Tensor) -> Tensor:
    """a - aᵀ: [..., n, n], square."""
    return a - a.mT if is_traced() else _Skew.apply(a)


class _Skew(torch.autograd.Function):
    """The gradient of <a - aᵀ, g> is g - gᵀ."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a - a.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (g,) = grad_outputs
        return skew(g)


def cayley(k: Tensor) -> Tensor:
    """(I - k/2)⁻¹ (I + k/2) = (I/2 - k/4)⁻¹ - I, of each matrix in [..., n, n]: one factorisation, and a gradient of
    two products. Not finite where I - k/2 has no inverse, which no skew k lacks."""
    return _solved(k, 0.5, -0.25, -1.0)


def rotation(a: Tensor) -> Tensor:
    """cayley(a - aᵀ), of each matrix in [..., n, n]: of a skew k one factorisation gives M⁻¹ Mᵀ, M = 2 I - k."""
    return cayley(skew(a)) if is_traced() else _Rotation.apply(a)


class _Rotation(torch.autograd.Function):
    """The gradient in k of <q, g>, q = cayley(k), is h = (I + q)ᵀ g (I + q)ᵀ / 4, and that in a is h - hᵀ."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        m = _shifted(a.mT - a, 2.0)
        # k of odd side leaves one direction alone, which a solve rounds by as much as the others turn. (`solve_ex` does
        # not wait for a device to say that there is a solution.)
        is_odd = a.shape[-1] % 2
        result = _shifted(_inverse(m).mul_(4.0), -1.0) if is_odd else torch.linalg.solve_ex(m, m.mT).result
        ctx.save_for_backward(result)
        ctx.is_turned = a.mT.is_contiguous()
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (result,), (g,) = ctx.saved_tensors, grad_outputs
        # laid out as `a` is, so that a parameter seen turned takes the gradient as it is, and no copy
        turned, g = (result, g.mT) if ctx.is_turned else (result.mT, g)
        half = _plus_product(g, turned, g)
        h = _plus_product(half, half, turned, 0.25)
        return h.mT - h if ctx.is_turned else h - h.mT


def _plus_product(c: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor (c + a b), or those of a stack."""
    if c.ndim > 3:
        return factor * (c + a @ b)
    return (torch.addmm if c.ndim == 2 else torch.baddbmm)(c, a, b, beta=factor, alpha=factor)


def expm(k: Tensor) -> Tensor:
    """e^k, of each matrix in [..., n, n]."""
    return _exponential(k) if is_traced() else _Exponential.apply(k)


def _exponential(k: Tensor) -> Tensor:
    """torch takes too few terms for a matrix alone (3e-5 off in float32), and enough for one of a stack."""
    return torch.linalg.matrix_exp(torch.stack([k, torch.zeros_like(k)]))[0]


class _Exponential(torch.autograd.Function):
    """The gradient of <e^k, g> is the corner of the exponential of [[kᵀ, g], [0, kᵀ]]. It is linear in g, which is
    made small first: as autograd takes it, a large g (a loss that is scaled, a sum over tokens) has k divided by as
    much before its series, and 1e-4 of the gradient lost."""

    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        ctx.save_for_backward(k)
        return _exponential(k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (k,), (g,) = ctx.saved_tensors, grad_outputs
        n = k.shape[-1]
        with torch.no_grad():
            largest = torch.linalg.vector_norm(g, float("inf"), dim=(-2, -1), keepdim=True) if g.numel() else g
            size = (64 * n * largest).clamp_min(torch.finfo(g.dtype).tiny)
        both = torch.cat([torch.cat([k.mT, g / size], dim=-1), torch.nn.functional.pad(k.mT, (n, 0))], dim=-2)
        return expm(both)[..., :n, n:] * size


def resolvent(m: Tensor) -> Tensor:
    """(I - m/2)⁻¹, of each matrix in [..., n, n]; not finite where there is none."""
    return _solved(m, 1.0, -0.5, 0.0)


@torch.no_grad()
def balance(x: Tensor, y: Tensor) -> Tensor:
    """t, powers of two by which x diag(t) and y diag(1/t) have columns about as large as each other: [n, r] -> [r]. It
    takes no gradient: what is made of them is the same for any t, but for what a short column beside a long one loses
    to its rounding, of which the gradient has nothing left. Powers of two round nothing."""
    # by the largest entries: in float32 the square of 1e20 is infinite, and that of 1e-23 is nothing
    largest = torch.linalg.vector_norm(torch.cat([x, y], dim=-1), float("inf"), dim=-2)
    of_x, of_y = largest.clamp_min(torch.finfo(x.dtype).tiny).log2().chunk(2, dim=-1)
    return torch.div(of_y - of_x, 2, rounding_mode="trunc").exp2()  # 1, where they are as good as alike


def centred(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """[y / t - x t, y / t + x t]: [n, r], [n, r], [r] -> [n, 2 r]. t takes no gradient."""
    if is_traced():
        left, right = x * t, y / t
        return torch.cat([right - left, right + left], dim=-1)
    return _Centred.apply(x, y, t)


class _Centred(torch.autograd.Function):
    """With g = [g, h] the gradients are t (h - g) and (g + h) / t."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        result = torch.empty((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
        less, more = result.chunk(2, dim=-1)
        torch.div(y, t, out=more)
        torch.addcmul(more, x, t, value=-1, out=less)
        more.addcmul_(x, t)
        ctx.save_for_backward(t)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (t,), (less, more) = ctx.saved_tensors, grad_outputs[0].chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return (more - less) * t, (less + more) / t, None
        of_x, of_y = less.new_empty(less.shape), less.new_empty(less.shape)  # row after row, as parameters lie
        return torch.sub(more, less, out=of_x).mul_(t), torch.add(less, more, out=of_y).div_(t), None


def skew_core(u: Tensor, factor: float) -> Tensor:
    """R = -(J / c + UᵀU / 2)⁻¹ for J = [0, I; -I, 0], so that cayley(c U J Uᵀ) = I + U R Uᵀ: [n, 2 r] -> [2 r, 2 r]."""
    if torch.onnx.is_in_onnx_export():
        return _core_by_elimination(u, factor)
    return -_inverse(0.5 * (u.mT @ u) + _paired(u) / factor) if is_traced() else _SkewCore.apply(u, factor)


def _paired(u: Tensor) -> Tensor:
    """J = [0, I; -I, 0], for the columns of u."""
    eye = torch.eye(u.shape[-1] // 2, dtype=u.dtype, device=u.device)
    zero = torch.zeros_like(eye)
    return torch.cat([torch.cat([zero, eye], dim=-1), torch.cat([-eye, zero], dim=-1)])


def _core_by_elimination(u: Tensor, factor: float) -> Tensor:
    """The same without a choice of pivots: from the columns U L⁻ᵀ, which are nearly orthonormal for L Lᵀ = UᵀU and a
    little more, c U J Uᵀ has the core K = c Lᵀ J L, and I - UᵀU K / 2 of these columns has no small pivot."""
    gram = u.mT @ u
    eye = torch.eye(gram.shape[-1], dtype=u.dtype, device=u.device)
    with torch.no_grad():
        frame = triangle(gram + (1e-6 * gram.diagonal().mean() + torch.finfo(u.dtype).tiny) * eye)
        turn = eliminated(frame)
    k = factor * frame.mT @ _paired(u) @ frame
    return turn.mT @ k @ eliminated(eye - 0.5 * (turn @ gram @ turn.mT @ k)) @ turn


class _SkewCore(torch.autograd.Function):
    """The gradient of <R, g> in UᵀU is h / 2, h = Rᵀ g Rᵀ, and in U it is U (h + hᵀ) / 2."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, factor: float) -> Tensor:
        inner, r = _times(-0.5, u.mT, u), u.shape[-1] // 2
        inner.diagonal(r).sub_(1 / factor)
        inner.diagonal(-r).add_(1 / factor)
        result = _inverse(inner)
        ctx.save_for_backward(u, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (u, result), (g,) = ctx.saved_tensors, grad_outputs
        h = result.mT @ g @ result.mT
        return _times(0.5, u, h + h.mT), None


def _times(factor: float, a: Tensor, b: Tensor) -> Tensor:
    """factor a b, of two matrices, in one operation."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def inverse(a: Tensor) -> Tensor:
    """a⁻¹, of each matrix in [..., n, n]; not finite where there is none."""
    return _solved(a, 0.0, 1.0, 0.0)


def _solved(a: Tensor, start: float, factor: float, end: float) -> Tensor:
    """(start I + factor a)⁻¹ + end I, or those of a stack."""
    if not is_traced():
        return _Solved.apply(a, start, factor, end)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    # not by `torch.add(..., alpha=factor)`: where a is a product, torch 2.13's compiler forgets the factor
    shifted = start * eye + factor * a
    return (eliminated(shifted) if start and torch.onnx.is_in_onnx_export() else _inverse(shifted)) + end * eye


def _inverse(a: Tensor) -> Tensor:
    return torch.linalg.inv_ex(a).inverse  # does not wait for a device to say that there is one


def _shifted(a: Tensor, by: float) -> Tensor:
    """a + by I, written into a."""
    if by:
        a.diagonal(dim1=-2, dim2=-1).add_(by)
    return a


class _Solved(torch.autograd.Function):
    """The gradient in a of <y + end I, g>, y the inverse of start I + factor a, is -factor yᵀ g yᵀ."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, start: float, factor: float, end: float) -> Tensor:
        result = _shifted(_inverse(_shifted(factor * a, start)), end)
        ctx.save_for_backward(result)
        ctx.factor, ctx.end = factor, end
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (result,), (g,) = ctx.saved_tensors, grad_outputs
        turned = (_shifted(result.clone(), -ctx.end) if ctx.end else result).mT
        return turned @ (-ctx.factor * g) @ turned, None, None, None


def mirrored(u: Tensor) -> Tensor:
    """T Uᵀ / 2 of Π (I - 2 u uᵀ / uᵀu) = I - U T Uᵀ: [n, r] -> [r, n]. T⁻¹ is the upper triangle of UᵀU with the
    diagonal halved. A zero column is no mirror: its row is zero."""
    if not is_traced():
        return _Mirrored.apply(u)
    if torch.onnx.is_in_onnx_export():
        return eliminated(_mirrors(u)) @ u.mT
    return torch.linalg.solve_triangular(_mirrors(u), u.mT, upper=True)


def _mirrors(u: Tensor) -> Tensor:
    """The M of `_Mirrored`, with autograd's gradient."""
    gram = u.mT @ u
    return gram.triu(1) + gram.triu() + (gram.diagonal() == 0).to(u.dtype).diag_embed()


class _Mirrored(torch.autograd.Function):
    """With M = 2 / T and V = M⁻¹ Uᵀ, the gradient of <V, g> is S = M⁻ᵀ g in Uᵀ, and -2 of the upper triangle of S Vᵀ,
    once for each side, in UᵀU."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        triangle = torch.addmm(u.new_empty(()), u.mT, u, beta=0, alpha=2)  # what is below the diagonal nobody reads
        diagonal = triangle.diagonal().mul_(0.5)
        torch.threshold_(diagonal, 0.0, 1.0)
        result = torch.linalg.solve_triangular(triangle, u.mT, upper=True)
        ctx.save_for_backward(u, triangle, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (u, triangle, result), (g,) = ctx.saved_tensors, grad_outputs
        triangle = _mirrors(u) if torch.is_grad_enabled() else triangle  # a second derivative reaches u by it too
        led = torch.linalg.solve_triangular(triangle.mT, g, upper=False)
        upper = led @ result.mT
        return torch.addmm(led.mT, u, upper.triu() + upper.triu(1).mT, alpha=-2)


def root(a: Tensor) -> Tensor:
    """√a, and 0 with no gradient where a ≤ 0."""
    if not is_traced():
        return _Root.apply(a)
    none = a <= 0
    return a.masked_fill(none, 1.0).sqrt().masked_fill(none, 0.0)


class _Root(torch.autograd.Function):
    """The gradient of <√a, g> is g / (2 √a)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        result = a.clamp_min(0.0).sqrt()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (result,), (g,) = ctx.saved_tensors, grad_outputs
        return 0.5 * g / torch.threshold(result, 0.0, torch.inf)


def over_root(a: Tensor, s: Tensor) -> Tensor:
    """a / √s, and 0 with no gradient where s ≤ 0."""
    above = s.masked_fill(s <= 0, torch.inf) if is_traced() else torch.threshold(s, 0.0, torch.inf)
    return a / above.sqrt()
