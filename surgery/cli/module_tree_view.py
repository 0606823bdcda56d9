"""The tree of a model's modules, with what a spec can take of them.

Takes a model (on the meta device too); gives a rich tree or plain data. Promises: layers of a list that are alike are
one branch, named by a range that is a pattern: `{0..31}`.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text
from rich.tree import Tree
from torch import nn

from surgery.diagnostics import fail
from surgery.layers.survey import Site, Survey
from surgery.matching.module_tree import Node, outline
from surgery.matching.patterns import compile_pattern
from surgery.text import sides_text


def chosen(model: nn.Module, pattern: str | None) -> set[str]:
    """The names of the modules and weights that a pattern matches; all without one. Raises: SurgeryError (no-match)."""
    survey = Survey(model)
    names = [*(n for n in survey.modules if n), *(s.name for s in survey.sites if s.stack is not None)]
    glob = compile_pattern(pattern) if pattern else None
    found = {n for n in names if glob is None or glob.matches(n, survey.counts)}
    if glob and not found:
        from surgery.matching.patterns import marked
        from surgery.matching.suggestions import Population

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


def _sites(model: nn.Module) -> dict[str, Site]:
    return {s.name: s for s in Survey(model).sites}


# --------------------------------------------------------------------------------------------------------- tree


def tree(model: nn.Module, names: set[str], every: bool) -> Tree:
    """The model as a tree, with the branches that lead to `names`. `every`: layers that are alike are not joined."""
    root = Tree(Text(type(model).__name__, "bold"))
    _grow(root, outline(model, names, every))
    return root


def _grow(tree: Tree, above: Node) -> None:
    for node in above.children:
        _grow(tree.add(Text.assemble((node.step, "bold"), (f"  {node.cls}", "dim"), (_taken(node.site), "cyan"))), node)


def _taken(site: Site | None) -> str:
    """The kind and shape of what a spec can take."""
    if site is None:
        return ""
    head = " (output head)" if site.is_head else ""
    return f"  {site.kind} {sides_text(site.out, site.in_, site.stack)}{head}"
