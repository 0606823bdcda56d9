"""A model's modules as a tree in which layers that are alike are one branch.

Takes a model (on the meta device too); gives `Node`s. Promises: module order; a joined branch is named by a range that
is a pattern, `{0..31}`; only branches that lead to a wanted name are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from surgery.diagnostics import fail
from surgery.given import takes
from surgery.layers.survey import Site, Survey
from surgery.matching.patterns import compile_pattern, marked
from surgery.matching.suggestions import Population

Mark = Callable[[str], object]


@takes(model="model")
def modules(model: nn.Module, pattern: str | None = None) -> list[dict[str, Any]]:
    """The modules of a model (on the meta device too) as plain data in order: `name` and `class`; and of what a spec
    can take `kind`, `shape` [out, in] and `stack`, how many such matrices one weight holds (None for a single one).

    `pattern`: those alone that it matches. Raises: SurgeryError (no-match), if it matches none.

    >>> import surgery
    >>> found = surgery.modules(surgery.load_model("demo:llama"), "**.k_proj")
    >>> found[0]["name"], found[0]["kind"], found[0]["shape"]
    ('model.layers.0.self_attn.k_proj', 'linear', [32, 64])
    """
    matching, sites = matching_names(model, pattern), {site.name: site for site in Survey(model).sites}
    rows = []
    # a fused weight is a site and no module: it comes after the modules, whose order is the model's own
    for name in dict.fromkeys([*dict(model.named_modules()), *sites]):
        if name in matching:
            site = sites.get(name)
            module = site.module if site else model.get_submodule(name)
            operable = {"kind": site.kind, "shape": [site.out, site.in_], "stack": site.stack} if site else {}
            rows.append({"name": name, "class": type(module).__name__, **operable})
    return rows


def matching_names(model: nn.Module, pattern: str | None) -> set[str]:
    """The names of the modules and weights that a pattern matches; all without one. Raises: SurgeryError (no-match)."""
    survey = Survey(model)
    names = [*(n for n in survey.modules if n), *(s.name for s in survey.sites if s.stack is not None)]
    glob = compile_pattern(pattern) if pattern else None
    matching = {n for n in names if glob is None or glob.matches(n, survey.counts)}
    if glob and not matching:
        near = Population((marked(n, survey.counts),) for n in names).suggest(glob)
        raise fail("no-match", f'pattern "{pattern}" matches no module of {type(model).__name__}',
                   helps=(f'did you mean "{near[0]}"?',) if near else ())
    return matching


@dataclass(frozen=True)
class Node:
    """A module, a fused weight of one, or several that are alike: `names` are theirs, `site` is the first one's."""

    step: str
    names: tuple[str, ...]
    cls: str
    site: Site | None
    children: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


def outline(model: nn.Module, wanted: Iterable[str], every: bool = False, mark: Mark = lambda name: None) -> Node:
    """The tree of what leads to the `wanted` modules and fused weights. Members of a list are joined where their
    classes, weights and marks agree, and those of all below them; `every` joins none."""
    kept = {".".join(name.split(".")[:i]) for name in wanted for i in range(1, name.count(".") + 2)}
    sites = {site.name: site for site in Survey(model).sites}
    return _Outline(sites, kept, every, mark).node("", [_Branch("", model)])


@dataclass(frozen=True)
class _Branch:
    name: str
    module: nn.Module
    is_weight: bool = False

    @property
    def step(self) -> str:
        return self.name.rpartition(".")[2]


class _Outline:
    def __init__(self, sites: Mapping[str, Site], kept: set[str], every: bool, mark: Mark):
        self.sites, self.kept, self.every, self.mark = sites, kept, every, mark

    def node(self, step: str, alike: list[_Branch]) -> Node:
        """The node of branches that are alike: what is below the first stands for all."""
        first, names = alike[0], tuple(branch.name for branch in alike)
        children = []
        for _, run in groupby(self.children(first), key=self.likeness):
            inner = list(run)
            # the same steps below every one of the branches, so that a node knows all the names that it stands for
            below = [_Branch(f"{name}{child.name[len(first.name):]}".lstrip("."), child.module, child.is_weight)
                     for name in names for child in inner]
            steps = inner[0].step if len(inner) == 1 else f"{{{inner[0].step}..{inner[-1].step}}}"
            children.append(self.node(steps, below))
        return Node(step, names, type(first.module).__name__, self.sites.get(first.name), tuple(children))

    def children(self, branch: _Branch) -> Iterator[_Branch]:
        if branch.is_weight:
            return
        weights = ((p, branch.module) for p, _ in branch.module.named_parameters(recurse=False))
        for step, module in (*branch.module._modules.items(), *weights):
            name, is_weight = f"{branch.name}.{step}".lstrip("."), module is branch.module
            if name in self.kept and module is not None and (not is_weight or name in self.sites):
                yield _Branch(name, module, is_weight)

    def likeness(self, branch: _Branch) -> object:
        """Members of a list are alike by their form; a module with a name of its own is like no other."""
        return self.form(branch) if branch.step.isdecimal() and not self.every else branch.name

    def form(self, branch: _Branch) -> tuple:
        site = self.sites.get(branch.name)
        own = (type(branch.module).__name__, site and (site.layout.kind, site.out, site.in_, site.stack),
               self.mark(branch.name))
        return own, tuple((child.step, self.form(child)) for child in self.children(branch))
