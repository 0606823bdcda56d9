"""One page that shows what an adapter is and did: the model, formulas, parameters, costs, spectra, and its training.

Takes a surgeon's report, its spectra and the curves of its training; gives HTML. Promises: one file with nothing to
fetch and nothing that runs, for wide and narrow windows, light and dark; the same adapter gives the same page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path

from surgery import __version__
from surgery.analysis.page import training_curves
from surgery.analysis.page.charts import chart, legend
from surgery.analysis.page.model_tree import ModelTree
from surgery.analysis.saved_weights import Asked, opened_adapter
from surgery.analysis.spectra import Group, Spectra, Track, gathered
from surgery.analysis.spectra.curves import Curve, across_layers, distributions
from surgery.codegen.cost_model import TOKENS_SUPPOSED
from surgery.html import Markup, folded, table, tag
from surgery.language.tree import Spec
from surgery.planning.figures import Report
from surgery.planning.formulas import formula_lines, formulas
from surgery.runtime.atomic_folders import refuse_file, replacing_file
from surgery.text import figure_text, sides_text, size_text

_DIRECTIONS = 8  # of ΔW and of W, whose overlap is measured
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_FIGURES = {"entropy": "entropy", "normalised_entropy": "of max", "stable_rank": "stable rank",
            "effective_rank": "effective rank", "numerical_rank": "rank", "relative_size": "‖ΔW‖ / ‖W‖",
            "overlap_out": "overlap out", "overlap_in": "overlap in"}


def report_page(folder: str | PathLike, out: str | PathLike = "report.html", *, base: str | None = None,
                squared: bool = False, asked: Asked = Asked(), measured: Track = lambda weights: weights) -> Written:
    """Write a page about the saved adapter in `folder`: one HTML file that needs no network.

    `base`: its base model, if it is not the one that it was saved for; `squared`: entropies of p = σ² / Σ σ². Training
    curves are in it where the state of a Trainer lies in the folder or beside it. One weight is read at a time.

    Raises: SurgeryError (bad-output, bad-adapter, unknown-model, ...); then what stood at `out` still does."""
    refuse_file(Path(out))
    state = training_curves.found_state(Path(folder))
    training = training_curves.charts(state) if state else {}
    adapter = opened_adapter(folder, base, asked)
    spectra = gathered(adapter.updates(), squared, _DIRECTIONS, measured)
    with asked.step(f"writing {out}"), replacing_file(Path(out)) as new:
        page = Page(Path(folder).resolve().name, adapter.base, adapter.surgeon.report(), spectra, training)
        new.write_text(page.html(), encoding="utf-8")
    return Written(Path(out), adapter.base, state, spectra)


@dataclass(frozen=True)
class Written:
    """A page that was written: its file, the adapter's base model, the state of a Trainer that it shows, spectra."""

    file: Path
    base: str
    training: Path | None
    spectra: Spectra


@dataclass(frozen=True)
class Page:
    """What a page shows: `title` names the adapter, `base` its base model,
    `training` has curves by the title of a chart."""

    title: str
    base: str
    report: Report
    spectra: Spectra
    training: Mapping[str, Sequence[Curve]] = field(default_factory=dict)

    def html(self) -> str:
        """The whole file."""
        style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
        head = tag("head", Markup('<meta charset="utf-8">'),
                   Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
                   Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
                   tag("title", f"{self.title}: {self.spec.name}"), tag("style", Markup(style)))
        return f"<!doctype html>\n{tag('html', head, tag('body', *self._sections()), lang='en')}\n"

    @property
    def spec(self) -> Spec:
        return self.report.plan.spec

    def _sections(self) -> list[Markup]:
        return [self._top(), *section("Formulas", self._formulas()), *section("Model", [self._tree()]),
                *section("Parameters and cost", self._costs()), *section("What it did to the weights", self._spectra()),
                *section("Training", self._training()), tag("footer", f"Written by surgery {__version__}.")]

    # --------------------------------------------------------------------------------------------------------- top

    def _top(self) -> Markup:
        spec = self.spec
        heading = tag("h1", spec.name or self.title)
        doc = tag("p", spec.doc.partition("\n")[0]) if spec.doc else None
        where = tag("p", "the adapter ", tag("code", self.title), " on ", tag("code", self.base), class_="soft")
        return tag("header", heading, doc, where, self._facts())

    def _facts(self) -> Markup:
        report, means = self.report, self.spectra.total.means
        facts = [(f"{len(report.rows)}", "weights operated on"),
                 (f"{report.trainable:,}",
                  f"parameters train, {report.percent:.3g}\N{NO-BREAK SPACE}% of {report.total:,}"),
                 (size_text(report.bytes), "the adapter")]
        entropy, share, rank = means["entropy"], means["normalised_entropy"], means["stable_rank"]
        if entropy is not None and share is not None and rank is not None:  # they are known together
            facts += [(f"{entropy:.2f}", f"entropy of ΔW, {100 * share:.0f}\N{NO-BREAK SPACE}% of the possible (mean)"),
                      (f"{rank:.1f}", "stable rank of ΔW (mean)")]
        return tag("ul", *(tag("li", tag("strong", big), tag("span", small)) for big, small in facts), class_="facts")

    # ---------------------------------------------------------------------------------------------------- formulas

    def _formulas(self) -> Iterable[Markup]:
        for number, (target, formula) in enumerate(formulas(self.spec), start=1):
            yield tag("h3", f"Target {number}")
            yield tag("pre", "\n".join(formula_lines(target, formula)))
            yield folded("as it stands in the spec", tag("pre", Spec(targets=(target,)).to_surg().strip()))

    def _tree(self) -> Markup:
        return ModelTree(self.report, self.spectra).markup()

    # ------------------------------------------------------------------------------------------------------- costs

    def _costs(self) -> Iterable[Markup]:
        header = ["target", "weights", "parameters", "a step (estimate)"]
        yield table(header, [*self._target_rows(), *self._train_rows()])
        yield tag("p", f"A step, forward and backward, is counted for {TOKENS_SUPPOSED:,} tokens and not measured, ",
                  "over that of the same layers frozen.", class_="soft")
        yield table(["memory", "size"], [(name, size_text(size)) for name, size in self.report.memory.items()])
        left_out = self.report.left_out
        if left_out:
            yield folded(f"{sum(map(len, left_out.values()))} modules with weights are left out",
                         table(["reason", "modules"],
                               [(self._told(why), len(names)) for why, names in left_out.items()]))

    def _told(self, reason: str) -> str:
        """A reason that names a place in the spec, without the folders of this machine."""
        for file in {target.span.source.name for target in self.spec.targets if target.span}:
            reason = reason.replace(file, Path(file).name)
        return reason

    def _target_rows(self) -> Iterable[Sequence[object]]:
        for number in sorted({row.target for row in self.report.rows}):
            rows = [row for row in self.report.rows if row.target == number]
            ratio = self.report.step_ratio_of(self.spec.targets[number])
            yield (f"{number + 1}: {rows[0].formula}", len(rows), f"{sum(r.parameters for r in rows):,}",
                   f"{ratio:.2f} x frozen")

    def _train_rows(self) -> Iterable[Sequence[object]]:
        unfrozen = self.report.unfrozen
        if unfrozen:
            yield "train", len(unfrozen), f"{sum(unfrozen.values()):,}", "-"

    # ----------------------------------------------------------------------------------------------------- spectra

    def _spectra(self) -> Iterable[Markup]:
        if len(self.spectra.unchanged) == len(self.spectra.rows):
            yield tag("p", "Nothing yet: W' = W for every weight, as at the start.")
            return
        share = "σ² / Σ σ²" if self.spectra.squared else "σ / Σ σ"
        yield tag("p", f"ΔW = W' - W; p = {share} over its singular values; entropy -Σ p log p; stable rank ‖ΔW‖",
                  tag("sub", "F"), "² / ‖ΔW‖", tag("sub", "2"),
                  "²; effective rank exp(entropy); overlap of its ",
                  f"{self.spectra.top} strongest directions with those of W.", class_="soft")
        labels = [curve.label for curve in distributions(self._named)]
        yield tag("div", *self._spectra_charts(labels), class_="charts")
        yield legend(labels)
        yield _groups("module type", self.spectra.types)
        yield folded("by layer", _groups("layer", self.spectra.layers)) if self.spectra.layers else Markup()
        yield folded("every weight", self._every_weight())

    @cached_property
    def _named(self) -> dict[str, Spectra]:
        return {self.title: self.spectra}

    def _spectra_charts(self, labels: Sequence[str]) -> Iterable[Markup]:
        for figure, title in (("entropy", "entropy of ΔW (nats)"), ("stable_rank", "stable rank of ΔW")):
            if curves := across_layers(self._named, figure):
                yield chart(title, curves, "layer", labels=labels, whole=True)
        yield chart("share p of the i-th singular value", distributions(self._named), "i", labels=labels, is_log=True)

    def _every_weight(self) -> Markup:
        rows = [(row.name, sides_text(*row.spectrum.shape), *_cells(Group.of("", [row]).means),
                 figure_text(row.worst_defect)) for row in self.spectra.rows]
        return table(["weight", "shape", *_FIGURES.values(), "‖RRᵀ - I‖ / √n"], rows)

    # ---------------------------------------------------------------------------------------------------- training

    def _training(self) -> Iterable[Markup]:
        if self.training:
            labels = list(dict.fromkeys(curve.label for curves in self.training.values() for curve in curves))
            yield tag("div", *(chart(title, curves, "step", labels=labels, whole=True)
                               for title, curves in self.training.items()), class_="charts")
            yield legend(labels)


def section(title: str, content: Iterable[Markup]) -> list[Markup]:
    """A heading with its content; nothing without content."""
    inner = list(content)
    return [tag("section", tag("h2", title), *inner)] if inner else []


def _groups(title: str, groups: Sequence[Group]) -> Markup:
    return table([title, "weights", *_FIGURES.values()], [(g.name, g.count, *_cells(g.means)) for g in groups])


def _cells(means: Mapping[str, float | None]) -> list[str]:
    return [figure_text(means[figure]) for figure in _FIGURES]
