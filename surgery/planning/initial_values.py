"""The starting tensors of an adapter, and the check that the operated weight starts as the frozen one.

Takes a placed formula; gives its tensors by key. Promises: a draw depends on the seed, the module's name and the
parameter's name alone; nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn

from surgery.diagnostics import Diagnostic, fail
from surgery.ir.dense import dense, in_dtype
from surgery.ir.expression import Leaf, walk
from surgery.ir.manifolds import MANIFOLDS
from surgery.ir.sizes import known_shape
from surgery.language.tree import Target
from surgery.planning.compile import Placed
from surgery.semantics.distributions import DISTRIBUTIONS, draw
from surgery.text import counted

Shared = dict[str, torch.Tensor]
IDENTITY_TOLERANCE = 1e-5
MANIFOLD_TOLERANCE = 1e-4  # what float32 leaves of W's singular vectors and of what is drawn is a tenth of it


def tensors(placed: Placed, seed: int, dtype: torch.dtype, shared: Shared,
            starts: bool = True) -> dict[str, torch.Tensor]:
    """The starting tensors of one module, as they are held, parameters but for whole numbers. `shared` holds those that
    modules have in common, by name, and grows. Without `starts` they hold NaNs (and whole numbers -1), for values that
    are known: a start may take the singular vectors of W."""
    values = frozen_leaves(placed, starts and _starts_from_weight(placed))
    known: dict = {}
    made: dict[str, torch.Tensor] = {}
    for leaf in placed.formula.leaves:
        name = placed.held(leaf).name if leaf.group else ""
        if name in shared:
            made[leaf.key] = shared[name]
        else:
            if starts:
                start = _start(placed, leaf, values, seed, known)
                assert_on_manifold(leaf, start, placed.site.name)
            else:
                start = _unset(placed, leaf, values["weight"])
            made[leaf.key] = _held(start, leaf, dtype)
        if leaf.group:
            shared[name] = made[leaf.key]
        value = part_of(made[leaf.key].detach(), leaf) if leaf.group else made[leaf.key].detach()
        values[leaf.key] = in_dtype(value, values["weight"].dtype)
    return made


def part_of(held: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    """What a leaf reads of the tensor that is held for all who share it: the first entries of each axis, a view."""
    return held[tuple(slice(size) for size in known_shape(leaf.shape))]


def assert_on_manifold(leaf: Leaf, start: torch.Tensor, module: str) -> None:
    """Raises: SurgeryError (off-manifold), for a leaf that is kept on a manifold and starts elsewhere. To move it there
    would be to start from another W' than the one that is checked and proven."""
    if leaf.manifold is None or start.is_meta:
        return
    manifold = MANIFOLDS[leaf.manifold]
    if not (defect := manifold.defect(start)) <= MANIFOLD_TOLERANCE:
        name = leaf.key.rpartition(".")[2]
        raise fail("off-manifold", f"`{name}` is kept `on {leaf.manifold}`, and does not start there in {module}",
                   leaf.span, notes=(f"{manifold.maths} is {defect:.1e}; allowed is {MANIFOLD_TOLERANCE:.0e}",),
                   helps=(f"start it at {manifold.starts}",))


def starts_around_zero(leaf: Leaf) -> bool:
    """Whether a leaf starts at 0, or is drawn from a distribution around 0."""
    if leaf.draw is not None:
        row = DISTRIBUTIONS[leaf.draw.distribution]
        return row.mean is None or row.mean({**row.arguments, **dict(leaf.draw.arguments)}) == 0
    assert leaf.init is not None  # a leaf that is not drawn starts at an expression
    if any(node.op in ("weight", "bias", "param", "places") for node in walk(leaf.init)):
        return False
    return not dense(leaf.init, {"weight": torch.zeros(1, 1)}).any()  # which says the dtype and the device


def frozen_leaves(placed: Placed, reads: bool = True) -> dict[str, torch.Tensor]:
    """The frozen weight (as a matrix or a stack) and bias of a site, in float32 or wider. Where nothing `reads` it, the
    weight of a called layer is not called for: NaNs that take no memory stand in its place."""
    site = placed.site
    if reads and not site.is_meta or not site.layout.is_called:
        weight = site.layout.matrix(site.read())
    else:
        # NaN and no zeros: whatever reads it after all is seen, and does not start at a number that is silently wrong
        weight = torch.full((), torch.nan, dtype=site.wide, device=site.device).expand(site.out, site.in_)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {"weight": weight.to(dtype), **({"bias": site.bias.detach().to(dtype)} if site.bias is not None else {})}


def _starts_from_weight(placed: Placed) -> bool:
    starts = (leaf.init for leaf in placed.formula.leaves if leaf.init is not None)
    return any(start.has("weight") for start in starts)


def _held(value: torch.Tensor, leaf: Leaf, dtype: torch.dtype) -> torch.Tensor:
    value = in_dtype(value, dtype).contiguous().clone()
    return nn.Parameter(value, requires_grad=not leaf.frozen) if value.is_floating_point() else value


def _unset(placed: Placed, leaf: Leaf, weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape that is held, with nothing in it that could be taken for a value."""
    shape, stack = _shape(placed, leaf), placed.site.stack
    whole_shape = shape if leaf.group or not stack else (stack, *shape)
    value, dtype = (-1, torch.int64) if leaf.whole else (torch.nan, weight.dtype)
    return torch.full(whole_shape, value, device=weight.device, dtype=dtype)


def _shape(placed: Placed, leaf: Leaf) -> tuple[int, ...]:
    """The shape of a leaf's tensor, or of the one that it is a part of."""
    return placed.held(leaf).shape if leaf.group and leaf.scope != "target" else known_shape(leaf.shape)


def _start(placed: Placed, leaf: Leaf, values: dict[str, torch.Tensor], seed: int, known: dict) -> torch.Tensor:
    weight, stack, name = values["weight"], placed.site.stack, placed.site.name
    shape = _shape(placed, leaf)
    group = placed.held(leaf).identity if leaf.group and leaf.scope != "target" else leaf.group
    if weight.is_meta:
        return _unset(placed, leaf, weight)
    if leaf.draw is None:
        return _over_stack(placed, values, leaf, known, shape)
    if leaf.group:
        return draw(leaf.draw, shape, seed, group, shape).to(weight.device)
    if stack is None:
        return draw(leaf.draw, shape, seed, name, leaf.key).to(weight.device)
    return torch.stack([draw(leaf.draw, shape, seed, f"{name}.{i}", leaf.key)
                        for i in range(stack)]).to(weight.device)


def _over_stack(placed: Placed, values: dict[str, torch.Tensor], leaf: Leaf, known: dict,
                shape: tuple[int, ...]) -> torch.Tensor:
    """A leaf's start; for a stack, that of each of its matrices. What leaves have in common is computed once."""
    init = leaf.init
    assert init is not None  # a leaf that is not drawn starts at an expression
    if placed.site.stack is None:
        return dense(init, values, known).expand(shape)
    groups = {other.key for other in placed.formula.leaves if other.group}
    if leaf.group:  # one tensor for all: it starts at the first matrix, as where modules share it at the first module
        return dense(init, {key: value if key in groups else value[0] for key, value in values.items()}).expand(shape)
    axes = {key: None if key in groups else 0 for key in values}
    return torch.vmap(lambda each: dense(init, each).expand(shape), in_dims=(axes,))(values)


def departure(before: torch.Tensor, after: torch.Tensor) -> float:
    """‖after - before‖ / ‖before‖ (the norm of `after` where `before` is zero; infinite for a NaN)."""
    change, size = (after.double() - before.double()).norm(), before.double().norm()
    relative = float(change / size) if size > 0 else float(change)
    return relative if relative == relative else float("inf")


def not_identity(target: Target, changes: Mapping[str, float]) -> list[Diagnostic]:
    """The diagnostic for a target of which modules start elsewhere, by their names with the relative change of each."""
    if not changes:
        return []
    worst = max(changes, key=changes.__getitem__)
    how = (f"by {changes[worst]:.1e}" if changes[worst] < float("inf")
           else "beyond all numbers: W or W' is not finite")
    more = f" (and of {counted(len(changes) - 1, 'other module')}, by less)" if len(changes) > 1 else ""
    return [Diagnostic("not-identity", f"W' of {worst}{more} does not start as W: they differ {how}", target.span,
                       notes=(f"allowed is {IDENTITY_TOLERANCE:.0e}, relative, in float32",),
                       helps=("start the parameters so that the transform is I and the update is 0",
                              "or say `shifted` after the target's patterns"))]
