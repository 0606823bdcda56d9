"""The tree of a model's modules, with what a spec can take of them.

Takes a model (on the meta device too); gives a rich tree or plain data. Promises: layers of a list that are alike are
one branch, named by a range that is a pattern: `{0..31}`.
"""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree
from torch import nn

from surgery.matching.module_tree import Node, outline


def tree(model: nn.Module, names: set[str], every: bool) -> Tree:
    """The model as a tree, with the branches that lead to `names`. `every`: layers that are alike are not joined."""
    root = Tree(Text(type(model).__name__, "bold"))
    _grow(root, outline(model, names, every))
    return root


def _grow(tree: Tree, above: Node) -> None:
    for node in above.children:
        label = Text.assemble((node.step, "bold"), (f"  {node.cls}", "dim"))
        if node.site is not None:  # a spec can take it: its kind and shape
            label.append(f"  {node.site.kind} {node.site.sides}{' (output head)' * node.site.is_head}", "cyan")
        _grow(tree.add(label), node)
