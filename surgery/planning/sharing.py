"""Find the tensors that modules share, and their shapes.

Takes the sites that a spec operates on with the leaves of their formulas; gives, for each leaf that is `shared`, the
one tensor that is held. Promises: what is held once has one name, one start and one shape; what cannot be one tensor is
told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from surgery.diagnostics import Collector, Diagnostic
from surgery.ir.expression import Leaf
from surgery.ir.operations import shape_text
from surgery.ir.sizes import known_shape
from surgery.layers.survey import Site
from surgery.semantics.definitions import unlike_shared


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that modules share: its `name` at the root of the model, the `identity` that its draw depends on, and
    its shape, of which each module takes the first entries of each axis."""

    identity: str
    name: str
    shape: tuple[int, ...]


#: A site with the leaves of its formula that are shared.
User = tuple[Site, Iterable[Leaf]]


def identity(site: Site, leaf: Leaf) -> str:
    """What tells a tensor that modules share from any other one. Parameters' names have no dot, so that two are never
    one text."""
    owner = {"layer": site.layer_name, "module": site.name}.get(leaf.scope, "")
    scope, _, name = (leaf.group or "").rpartition(".")
    return leaf.group or "" if leaf.scope == "target" else ".".join(filter(None, [scope, owner, name]))


def alone(site: Site, leaf: Leaf) -> SharedTensor:
    """The tensor of a leaf where no other user needs it larger, as in the scope of a target: there each shape has its
    own. (No name of a spec's has a hyphen.)"""
    shape, text = known_shape(leaf.shape), identity(site, leaf)
    sizes = f".{'x'.join(map(str, shape))}" if leaf.scope == "target" else ""
    return SharedTensor(text, f"{text}{sizes}".replace(".", "-"), shape)


def shared_tensors(users: Iterable[User], report: Collector) -> dict[str, dict[str, SharedTensor]]:
    """For each site's name and the key of a leaf that is shared beyond its target, the one tensor that is held. Reports
    what is said to be one tensor and cannot be."""
    groups: dict[str, list[tuple[Site, Leaf]]] = {}  # by identity
    of_targets: dict[str, list[tuple[Site, Leaf]]] = {}  # by name, since each shape has a tensor of its own
    for site, leaves in users:
        for leaf in (each for each in leaves if each.group):
            if leaf.scope == "target":
                of_targets.setdefault(alone(site, leaf).name, []).append((site, leaf))
            else:
                groups.setdefault(identity(site, leaf), []).append((site, leaf))
    told: dict[Diagnostic, None] = {}
    for rows in (*groups.values(), *of_targets.values()):
        told |= dict.fromkeys(_faults(rows))
    report.add(*told)
    found: dict[str, dict[str, SharedTensor]] = {}
    taken: set[str] = set()
    for text, rows in {} if told else groups.items():
        shape = tuple(max(sizes) for sizes in zip(*(known_shape(leaf.shape) for _, leaf in rows)))
        # Names of modules may have hyphens: where two identities come to one name, the later has a number behind it.
        name = base = text.replace(".", "-")
        while name in taken:
            name = f"{base}-{len(taken)}"
        taken.add(name)
        for site, leaf in rows:
            found.setdefault(site.name, {})[leaf.key] = SharedTensor(text, name, shape)
    return found


def _faults(rows: list[tuple[Site, Leaf]]) -> Iterator[Diagnostic]:
    """Why the leaves of one identity cannot be one tensor."""
    (site, first), shapes = rows[0], {leaf.shape for _, leaf in rows}
    if first.scope == "layer" and site.layer_name is None:
        yield Diagnostic("unsupported-module", f"{site.name} stands in no list of layers, and "
                         f"`{first.name}` is one tensor of each layer", first.span,
                         helps=("leave the module out with `except`, or say `shared(model)`",))
    for _, leaf in rows[1:]:
        # In a target a start may name W, and is that of the first module; but places that exist in its weight need not
        # exist in one of another shape.
        of_first = leaf.scope == "target" and leaf.is_of_module and first.is_of_module and not leaf.whole
        if what := first.unlike(replace(leaf, init=first.init) if of_first else leaf):
            yield from unlike_shared(leaf, first, what).diagnostics
    if len(shapes) > 1 and first.manifold:
        yield Diagnostic("unlike-shared", f"`{first.name}` is needed in {len(shapes)} sizes, and a "
                         f"part of a matrix `on {first.manifold}` is not on it", first.span,
                         helps=("share it among modules of one size, as `shared(target)` does",))
    if len(shapes) > 1 and first.init is not None and first.init.shape:
        yield Diagnostic("unlike-shared", f"`{first.name}` is needed in {len(shapes)} sizes, and it "
                         f"starts at a tensor {shape_text(first.init.shape)}", first.span,
                         helps=("start it at a number or a draw, which fill any size",))


def held(site: Site, leaf: Leaf, shared: Mapping[str, SharedTensor]) -> SharedTensor:
    """The tensor that stands for a leaf which is shared."""
    return shared.get(leaf.key) or alone(site, leaf)
