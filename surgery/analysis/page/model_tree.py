"""The model as a tree of HTML: what each module is, and what was done to it.

Takes a report and the spectra; gives Markup. Promises: layers of a list to which the same was done are one branch; a
branch is open where something below it was operated on or trained, and the tree is not huge.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.analysis.spectra import Group, Spectra
from surgery.html import Markup, joined, tag
from surgery.layers.opaque_linear import SUFFIX
from surgery.matching.module_tree import Node, outline
from surgery.planning.figures import Report, Row

_OPEN = 150  # nodes: of a larger tree, only the first levels are open
_LEVELS = 3


class ModelTree:
    """What stands beside each module of the tree."""

    def __init__(self, report: Report, spectra: Spectra):
        self.model = report.plan.selection.survey.model
        self.operated: Mapping[str, Row] = {row.name: row for row in report.rows}
        self.trained = [name.rpartition(".")[0] for name in report.unfrozen]
        self.measured = {row.name: row for row in spectra.rows}

    def markup(self) -> Markup:
        # A called layer has inner parameters of ours under SUFFIX, which are no modules of the user's.
        names = {name.rpartition(".")[0] for name, _ in self.model.named_parameters(remove_duplicate=False)
                 if f"{SUFFIX}." not in name}
        root = outline(self.model, names | set(self.operated), mark=self._mark)
        limit = _LEVELS if sum(1 for _ in root.walk()) > _OPEN else 99
        inner = joined(self._branch(child, limit - 1) for child in root.children)
        return tag("div", tag("b", root.cls), inner, class_="tree", tabindex="0")

    def _mark(self, name: str) -> object:
        row = self.operated.get(name)
        return row and (row.target, row.parameters), name in self.trained

    def _branch(self, node: Node, levels: int) -> Markup:
        line = joined([tag("b", node.step), " ", tag("span", node.cls, class_="class"), *self._notes(node)])
        if not node.children:
            return tag("div", line, class_="leaf")
        touched = any(self._mark(n.names[0]) != (None, False) for n in node.walk())
        below = (self._branch(child, levels - 1) for child in node.children)
        return tag("details", tag("summary", line), *below, open="open" if touched and levels > 0 else None)

    def _notes(self, node: Node) -> list[object]:
        # The names of a node are those of layers that are alike, so the first one's row holds for each of them.
        row, site = self.operated.get(node.names[0]), node.site
        notes: list[object] = [f" {site.sides}"] if site else []
        if row:
            # the matrices of a stack are measured one by one, by their number
            measured = [f"{name}.{i}" for name in node.names for i in range(site.stack)] if site and site.stack \
                else node.names
            means = Group.of("", [self.measured[name] for name in measured if name in self.measured]).means
            figures = (", unchanged" if means["entropy"] is None else
                       f", entropy {means['entropy']:.2f}, stable rank {means['stable_rank']:.1f}")
            notes += [" ", tag("span", f"target {row.target + 1}", class_="tag"),
                      tag("span", f" {row.parameters * len(node.names):,} parameters{figures}", class_="figures")]
        if node.names[0] in self.trained:
            notes += [" ", tag("span", "trained", class_="tag trained")]
        return notes
