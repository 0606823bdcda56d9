"""The tree of a model's modules, with what a spec can take of them.

Takes a model (on the meta device too); gives a rich tree or plain data. Promises: layers of a list that are alike are one
branch, named by a range that is a pattern: `{0..31}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.text import Text
from rich.tree import Tree
from torch import nn

from surgery.diagnostics import fail
from surgery.patterns import compile_pattern
from surgery.sites import Site, Survey


def chosen(model: nn.Module, pattern: str | None) -> set[str]:
    """The names of the modules and weights that a pattern matches; all without one. Raises: SurgeryError (no-match)."""
    survey = Survey(model)
    names = [*(n for n in survey.modules if n), *(s.name for s in survey.sites if s.stack is not None)]
    glob = compile_pattern(pattern) if pattern else None
    found = {n for n in names if glob is None or glob.matches(n, survey.counts)}
    if glob and not found:
        from surgery.near import Population
        from surgery.patterns import marked

        near = Population((marked(n, survey.counts),) for n in names).suggest(glob)
        raise fail("no-match", f'pattern "{pattern}" matches no module of {type(model).__name__}',
                   helps=(f'did you mean "{near[0]}"?',) if near else ())
    return found


def entries(model: nn.Module, names: set[str]) -> list[dict[str, Any]]:
    """The modules as plain data, in order."""
    sites = _sites(model)
    listed = dict.fromkeys([*dict(model.named_modules()), *sites])
    return [_entry(name, model, sites.get(name)) for name in listed if name in names]


def _entry(name: str, model: nn.Module, site: Site | None) -> dict[str, Any]:
    kind = {"kind": site.kind, "shape": [site.out, site.in_], "stack": site.stack} if site else {}
    return {"name": name, "class": type(site.module if site else model.get_submodule(name)).__name__, **kind}


def _shape(site: Site) -> str:
    return f"{f'{site.stack} of ' if site.stack else ''}{site.out} x {site.in_}"


def _sites(model: nn.Module) -> dict[str, Site]:
    return {s.name: s for s in Survey(model).sites}


# --------------------------------------------------------------------------------------------------------- tree


def tree(model: nn.Module, names: set[str], every: bool) -> Tree:
    """The model as a tree, with the branches that lead to `names`. `every`: layers that are alike are not joined."""
    kept = {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)}
    root = Tree(Text(type(model).__name__, "bold"))
    _grow(root, _Branch("", model, _sites(model), kept), every)
    return root


class _Branch:
    """A module (or a fused weight of one) at its name, with what is kept below it."""

    def __init__(self, name: str, module: nn.Module, sites: Mapping[str, Site], kept: set[str]):
        self.name, self.module, self.sites, self.kept = name, module, sites, kept

    def children(self) -> Iterator[_Branch]:
        inner = [*self.module._modules.items(), *((p, self.module) for p, _ in self.module.named_parameters(recurse=False))]
        for step, module in inner:
            name = f"{self.name}.{step}".lstrip(".")
            is_weight = module is self.module
            if name in self.kept and module is not None and (not is_weight or name in self.sites):
                yield _Weight(name, module, self.sites, self.kept) if is_weight else _Branch(name, module, self.sites, self.kept)

    def label(self) -> tuple[str, str]:
        """The class, then the kind and shape of what a spec can take."""
        site = self.sites.get(self.name)
        head = " (output head)" if site and site.is_head else ""
        return type(self.module).__name__, f"{site.kind} {_shape(site)}{head}" if site else ""

    def form(self) -> tuple:
        """What two branches must share to be alike."""
        return self.label(), tuple((c.name.rpartition(".")[2], c.form()) for c in self.children())


class _Weight(_Branch):
    """A fused weight: it has nothing below it."""

    def children(self) -> Iterator[_Branch]:
        return iter(())


def _grow(tree: Tree, branch: _Branch, every: bool) -> None:
    for _, run in groupby(branch.children(), key=lambda c: c.name if every else _likeness(c)):
        alike = list(run)
        cls, site = alike[0].label()
        steps = [b.name.rpartition(".")[2] for b in alike]
        step = steps[0] if len(steps) == 1 else f"{{{steps[0]}..{steps[-1]}}}"
        _grow(tree.add(Text.assemble((step, "bold"), (f"  {cls}", "dim"), (f"  {site}" if site else "", "cyan"))), alike[0], every)


def _likeness(branch: _Branch) -> object:
    """Layers of a list are alike by their form; a module with a name of its own is like no other."""
    step = branch.name.rpartition(".")[2]
    return branch.form() if step.isdecimal() else step
