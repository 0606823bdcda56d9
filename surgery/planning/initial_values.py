"""The starting tensors of an adapter, and the check that the operated weight starts as the frozen one.

Takes a placed formula; gives its tensors by key. Promises: a draw depends on the seed, the module's name and the
parameter's name alone; nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import reduce
from math import isfinite, sqrt
from types import MappingProxyType

import torch
import torch.nn as nn

from surgery.diagnostics import Diagnostic, fail
from surgery.ir.builders import fill, value_of
from surgery.ir.dense import dense, in_dtype
from surgery.ir.expression import OF_DATA, Expr, Leaf, walk
from surgery.ir.manifolds import MANIFOLDS
from surgery.ir.operations import operation
from surgery.ir.sizes import known_shape
from surgery.language.tree import Target
from surgery.layers.survey import Site
from surgery.planning.compile import Placed
from surgery.rewrite.prove_identity import without_known
from surgery.semantics.distributions import DISTRIBUTIONS, draw
from surgery.text import counted

Shared = dict[str, torch.Tensor]
IDENTITY_TOLERANCE = 1e-5
# On the CPU these are computed in float64, so that another library of linear algebra, or another number of threads,
# gives what rounds to the same numbers.
_DECOMPOSITIONS = ("left_singular", "singular", "right_singular", "qr", "inverse")
_SLICE, _SLICE_ELSEWHERE = 1 << 19, 1 << 24  # numbers: in float32 a CPU's cache has them, and threads are asked seldom
_LEAST = 1e-20  # a sum of squares in float32 beside which those that are too small for it are nothing
MANIFOLD_TOLERANCE = 1e-4  # what float32 leaves of W's singular vectors and of what is drawn is a tenth of it


def tensors(placed: Placed, seed: int, dtype: torch.dtype, shared: Shared,
            starts: bool = True, of_data: Mapping[str, torch.Tensor] = MappingProxyType({}),
            wide: bool = True) -> dict[str, torch.Tensor]:
    """The starting tensors of one module, as they are held, parameters but for whole numbers. `shared` holds those that
    modules have in common, by name, and grows. Without `starts` they hold NaNs (and whole numbers -1), for values that
    are known: a start may take the singular vectors of W. `of_data`: what data gives, by operation (`gradient`).
    `wide`: whether decompositions are computed in float64 on a CPU, where W may have float32."""
    values = frozen_leaves(placed, starts and any(leaf.init.has("weight") for leaf in placed.formula.leaves
                                                  if leaf.init is not None))
    if starts:
        values |= {op: value.to(values["weight"]) for op, value in of_data.items()}
        return _made(placed, placed.formula.leaves, values, seed, dtype, shared, wide=wide)
    made: dict[str, torch.Tensor] = {}
    for leaf in placed.formula.leaves:
        name = placed.held(leaf).name if leaf.group else ""
        made[leaf.key] = shared[name] if name in shared else _held(_unset(placed, leaf, values["weight"]), leaf, dtype)
        if leaf.group:
            shared[name] = made[leaf.key]
    return made


def _made(placed: Placed, leaves: Iterable[Leaf], values: dict[str, torch.Tensor], seed: int, dtype: torch.dtype,
          shared: Shared, nudge: int = 0, wide: bool = True) -> dict[str, torch.Tensor]:
    """The starting tensors of some leaves, those before each that it starts from among them."""
    starts, made = _Starts(placed, values, seed, nudge, wide), {}
    for leaf in leaves:
        name = placed.held(leaf).name if leaf.group else ""
        if name in shared:
            made[leaf.key] = shared[name]
        else:
            start = starts.of(leaf)
            assert_on_manifold(leaf, start, placed.site.name)
            made[leaf.key] = _held(start, leaf, dtype)
        if leaf.group:
            shared[name] = made[leaf.key]
        value = part_of(made[leaf.key].detach(), leaf) if leaf.group else made[leaf.key].detach()
        values[leaf.key] = in_dtype(value, values["weight"].dtype)
    return made


class Origin(IntEnum):
    """What a frozen leaf is made of: the spec and the seed alone, W, or a decomposition (of W, most of the time), which
    takes long for a large one."""

    SEED = 0
    WEIGHT = 1
    DECOMPOSITION = 2


def follows(placed: Placed) -> dict[str, Origin]:
    """The keys of the frozen leaves that the spec, the seed and W make again wherever they are asked for. Not so for
    what rests on data or on a bias, or on the weight of whichever of several modules comes first; nor for what is made
    of a W that calls give, which differs from one device to the next."""
    origins: dict[str, Origin] = {}  # of the leaves so far; none for what is not made again
    for leaf in placed.formula.leaves:
        init = leaf.init or Expr("const", (), 0.0)
        below = _reads(init)
        if init.has("bias", *OF_DATA) or not below <= origins.keys():
            continue
        own = Origin.DECOMPOSITION if init.has(*_DECOMPOSITIONS) else Origin(init.has("weight"))
        origin = max((own, *(origins[key] for key in below)))
        if origin is Origin.SEED or not (leaf.group or placed.site.layout.is_called):
            origins[leaf.key] = origin
    return {leaf.key: origins[leaf.key] for leaf in placed.formula.leaves if leaf.frozen and leaf.key in origins}


def _reads(init: Expr) -> set[str]:
    """The keys of the leaves that a start is made of."""
    return {node.data for node in walk(init) if node.op in ("param", "places")}


def again(placed: Placed, keys: Container[str], seed: int, dtype: torch.dtype, shared: Shared,
          weight: torch.Tensor | None, nudge: int = 0) -> dict[str, torch.Tensor]:
    """The starting tensors of some of the keys that `follows` gives, made again on the CPU of the stored `weight`
    (None where W is not read). `shared` grows, and is for one device. `nudge` (1 or -1): as another machine
    might compute them, of numbers that are others by a few roundings."""
    wanted: set[str] = set()
    for leaf in reversed(placed.formula.leaves):
        if leaf.key in keys or leaf.key in wanted:
            wanted |= {leaf.key} | (_reads(leaf.init) if leaf.init is not None else set())
    site = placed.site
    matrix = _unread(site, torch.device("cpu")) if weight is None else site.layout.matrix(weight.detach().cpu())
    values = {"weight": matrix.to(torch.promote_types(matrix.dtype, torch.float32))}
    leaves = [leaf for leaf in placed.formula.leaves if leaf.key in wanted]
    made = _made(placed, leaves, values, seed, dtype, shared, nudge)
    return {key: tensor for key, tensor in made.items() if key in keys}


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
        name = leaf.name
        raise fail("off-manifold", f"`{name}` is kept `on {leaf.manifold}`, and does not start there in {module}",
                   leaf.span, notes=(f"{manifold.maths} is {defect:.1e}; allowed is {MANIFOLD_TOLERANCE:.0e}",),
                   helps=(f"start it at {manifold.starts}",))


def starts_around_zero(leaf: Leaf) -> bool:
    """Whether a leaf starts at 0, or is drawn from a distribution around 0."""
    if leaf.draw is not None:
        row = DISTRIBUTIONS[leaf.draw.distribution]
        return row.mean is None or row.mean({**row.arguments, **dict(leaf.draw.arguments)}) == 0
    assert leaf.init is not None  # a leaf that is not drawn starts at an expression
    if leaf.is_of_module:
        return False
    return not dense(leaf.init, {"weight": torch.zeros(1, 1, device="cpu")}).any()  # it says the dtype and the device


def frozen_leaves(placed: Placed, reads: bool = True) -> dict[str, torch.Tensor]:
    """The frozen weight (as a matrix or a stack) and bias of a site, in float32 or wider. Where nothing `reads` it, the
    weight is neither copied nor called for: NaNs that take no memory stand in its place."""
    weight, *bias = frozen_parts(placed, reads)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return dict(zip(("weight", "bias"), (each.to(dtype) for each in (weight, *bias))))


def frozen_parts(placed: Placed, reads: bool = True) -> tuple[torch.Tensor, ...]:
    """The same as they are stored."""
    site = placed.site
    can = not (site.layout.is_called and site.is_meta)
    weight = site.layout.matrix(site.read()) if reads and can else _unread(site, site.device)
    return (weight, *(() if site.bias is None else (site.bias.detach(),)))


def _unread(site: Site, device: torch.device) -> torch.Tensor:
    """What stands for a weight that nothing reads. NaN and no zeros: whatever reads it after all is seen, and does not
    start at a number that is silently wrong."""
    sides = (site.stack, site.out, site.in_) if site.stack else (site.out, site.in_)
    return torch.full((), torch.nan, dtype=site.wide, device=device).expand(sides)


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


@dataclass
class _Starts:
    """What the leaves of one module start at, by the `values` of W and of the leaves so far."""

    placed: Placed
    values: dict[str, torch.Tensor]
    seed: int
    nudge: int = 0
    wide: bool = True
    known: dict = field(default_factory=dict)  # what leaves have in common is computed once
    known_wide: dict = field(default_factory=dict)

    def of(self, leaf: Leaf) -> torch.Tensor:
        placed, weight = self.placed, self.values["weight"]
        stack, name, shape = placed.site.stack, placed.site.name, _shape(placed, leaf)
        if weight.is_meta:
            return _unset(placed, leaf, weight)
        if leaf.draw is None:
            try:
                return self._computed(leaf, shape)
            # of what is not finite; torch's documentation names the error so
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                notes = () if is_finite(weight) else ("W holds numbers that are not finite",)
                raise fail("bad-value", f"`{leaf.name}` has no start in {name}: {error}", leaf.span,
                           notes=notes, helps=("`except` leaves such a weight out",)) from error
        if leaf.group:
            group = placed.held(leaf).identity if leaf.scope != "target" else leaf.group
            return draw(leaf.draw, shape, self.seed, group, shape).to(weight.device)
        if stack is None:
            return draw(leaf.draw, shape, self.seed, name, leaf.key).to(weight.device)
        return torch.stack([draw(leaf.draw, shape, self.seed, f"{name}.{i}", leaf.key)
                            for i in range(stack)]).to(weight.device)

    def _has_in_common(self, leaf: Leaf) -> bool:
        """Whether another leaf may start at something that is computed for this one too: a part of the same
        decomposition is another expression."""
        own = {*walk(leaf.init)} if leaf.init is not None else set()
        others = [other.init for other in self.placed.formula.leaves if other is not leaf and other.init is not None]
        shared = own.intersection(walk(*others))
        return any(operation(node).jointly for node in own) or any(node.args for node in shared)

    def _computed(self, leaf: Leaf, shape: tuple[int, ...]) -> torch.Tensor:
        """A leaf's start; for a stack, that of each of its matrices."""
        init, values, known = leaf.init, self.values, self.known
        assert init is not None  # a leaf that is not drawn starts at an expression
        if self.wide and init.has(*_DECOMPOSITIONS, "numbers") and values["weight"].device.type == "cpu":
            values, known = {key: in_dtype(v, torch.float64) for key, v in values.items()}, self.known_wide
        if not self._has_in_common(leaf):  # else all that it is made of would stay, each as large as W
            known = None
        if self.nudge:
            values = {key: _nudged(value, self.nudge) for key, value in values.items()}
        init = self._plainer(init, values)
        if self.placed.site.stack is None:
            return dense(init, values, known).expand(shape)
        groups = {other.key for other in self.placed.formula.leaves if other.group}
        # one tensor for all starts at the first matrix, as where modules share it at the first module
        if leaf.group:
            return dense(init, {key: v if key in groups else v[0] for key, v in values.items()}).expand(shape)
        axes = {key: None if key in groups else 0 for key in values}
        return torch.vmap(lambda each: dense(init, each).expand(shape), in_dims=(axes,))(values)

    def _plainer(self, init: Expr, values: Mapping[str, torch.Tensor]) -> Expr:
        """The same start without what is lost on zeros, ones and identities, as are those that it reads: of W + 2 B A
        with B = 0 only W is left, and no product is made as large as W. A tensor counts for what it holds: one that
        data, a user or another module gave need not be what the spec says. 0 times what is not finite is not 0."""
        read = _reads(init)
        laws = {leaf.key: law for leaf in self.placed.formula.leaves if leaf.key in read and (law := _unit(leaf))}
        known = frozenset((key, law) for key, law in laws.items()
                          if (values[key] == dense(law, {"weight": values[key]})).all())
        plainer = without_known(init, known) if known else init
        if plainer is init:
            return init
        read |= {node.op for node in walk(init)} & values.keys()
        return plainer if all(is_finite(values[key]) for key in read) else init


def _unit(leaf: Leaf) -> Expr | None:
    """Zeros, ones or an identity, if a leaf starts so by its law."""
    if (law := leaf.init) is None:
        return None
    number = value_of(law)
    if number == 0 or number == 1:
        return fill(number, leaf.shape)
    return law if law.op == "eye" and law.shape == leaf.shape else None


def _nudged(value: torch.Tensor, way: int) -> torch.Tensor:
    """A tensor whose numbers are others by a few roundings (by many more than a decomposition in float64 leaves)."""
    if not value.is_floating_point():
        return value
    change, draw = torch.ones((), dtype=value.dtype, device="cpu"), torch.Generator().manual_seed(0)
    for size in value.shape:  # a vector for each axis: as many draws as numbers would take long
        change = change[..., None] * (torch.rand(size, generator=draw, device="cpu") * 2 - 1).to(value)
    return value * (1 + way * change * (1e-12 if value.dtype == torch.float64 else 64 * torch.finfo(value.dtype).eps))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite: one pass, and no tensor of answers."""
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))  # a NaN is both bounds


def departure(before: torch.Tensor, after: torch.Tensor) -> float:
    """‖after - before‖ / ‖before‖ (the norm of `after` where `before` is zero; infinite for a NaN), to 6 digits."""
    if _are_equal(before, after):  # as most of what is asked is
        return 0.0 if is_finite(before) else float("inf")
    found = Departure()
    found.add(before, after)
    return found.relative


def _are_equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before is after or before.dtype == after.dtype and torch.equal(before, after)


class Departure:
    """The same of what comes part by part. Within a part slice by slice: the whole in a wider dtype is several times
    the weight."""

    def __init__(self) -> None:
        self.is_finite = True  # of what was before
        self._change, self._size = 0.0, 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Of a part what was before, and what came after."""
        is_cpu = before.device.type == "cpu"
        length, least = (_SLICE, torch.float32) if is_cpu else (_SLICE_ELSEWHERE, torch.float64)
        dtype = reduce(torch.promote_types, (before.dtype, after.dtype, least))
        room = torch.empty(min(length, before.numel()), dtype=dtype, device=before.device)
        change = size = torch.zeros((), dtype=torch.float64, device=before.device)
        for one, other in zip(after.detach().flatten().split(length), before.detach().flatten().split(length)):
            squares = _squares(one, other, room[:len(one)])
            change, size = change + squares[0], size + squares[1]
        self._change, self._size = self._change + float(change), self._size + float(size)
        if not isfinite(self._change + self._size):
            self.is_finite = self.is_finite and is_finite(before)

    @property
    def relative(self) -> float:
        relative = sqrt(self._change / self._size) if self._size > 0 else sqrt(self._change)
        return relative if relative == relative and self.is_finite else float("inf")


def _squares(one: torch.Tensor, other: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """‖one - other‖² and ‖other‖² in the dtype that there is `room` in. In float32 the difference of two numbers of its
    own is rounded once, and torch adds up in a tree: 6 digits are right, unless a square falls out of its range, and
    then all is done in float64."""
    change = room.copy_(one).sub_(other).square_().sum()
    size = room.copy_(other).square_().sum()
    asked = (size,) if not change and _are_equal(one, other) else (change, size)
    if room.dtype is torch.float32 and not all(_LEAST < float(each) < torch.inf for each in asked):
        return _squares(one, other, torch.empty_like(room, dtype=torch.float64))
    return change.double(), size.double()


_AS_MUCH_AS_W = ("they differ by as much as W: an update returns what is added to W, without W; a gain starts at 1",)


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
                       helps=(*_AS_MUCH_AS_W * (abs(changes[worst] - 1) < IDENTITY_TOLERANCE),
                              "start the parameters so that the transform is I and the update, which is added to W, "
                              "is 0",
                              "or say `shifted` after the target's patterns"))]
