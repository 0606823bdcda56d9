"""One page that shows what an adapter is and did: the model, formulas, parameters, costs, spectra, and its training.

Takes a surgeon's report, its spectra and the curves of its training; gives HTML. Promises: one file with nothing to
fetch and nothing that runs, for wide and narrow windows, light and dark; the same adapter gives the same page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
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
    # What can fail at once does so before the model is opened and its weights are measured.
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
                   # The page shows names that others chose: whatever slips in among them, nothing runs or is fetched.
                   Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
                   Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
                   tag("title", f"{self.title}: {self.spec.name}"), tag("style", Markup(style)))
        tree = ModelTree(self.report, self.spectra).markup()
        sections = [self._top(), *section("Formulas", self._formulas()), *section("Model", [tree]),
                    *section("Parameters and cost", self._costs()),
                    *section("What it did to the weights", self._spectra()), *section("Training", self._training()),
                    tag("footer", f"Written by surgery {__version__}.")]
        return f"<!doctype html>\n{tag('html', head, tag('body', *sections), lang='en')}\n"

    @property
    def spec(self) -> Spec:
        return self.report.plan.spec

    # ------------------------------------------------------------------------- the sections, from the top of the page

    def _top(self) -> Markup:
        """The names, and the few figures that a reader wants before all others."""
        spec, report, means = self.spec, self.report, self.spectra.total.means
        facts = [(f"{len(report.rows)}", "weights operated on"),
                 (f"{report.trainable:,}",
                  f"parameters train, {report.percent:.3g}\N{NO-BREAK SPACE}% of {report.total:,}"),
                 (size_text(report.bytes), "the adapter")]
        entropy, share, rank = means["entropy"], means["normalised_entropy"], means["stable_rank"]
        if entropy is not None and share is not None and rank is not None:  # they are known together
            facts += [(f"{entropy:.2f}", f"entropy of ΔW, {100 * share:.0f}\N{NO-BREAK SPACE}% of the possible (mean)"),
                      (f"{rank:.1f}", "stable rank of ΔW (mean)")]
        items = (tag("li", tag("strong", figure), tag("span", meaning)) for figure, meaning in facts)
        return tag("header", tag("h1", spec.name or self.title),
                   tag("p", spec.doc.partition("\n")[0]) if spec.doc else None,
                   tag("p", "the adapter ", tag("code", self.title), " on ", tag("code", self.base), class_="soft"),
                   tag("ul", *items, class_="facts"))

    def _formulas(self) -> Iterable[Markup]:
        for number, (target, formula) in enumerate(formulas(self.spec), start=1):
            yield tag("h3", f"Target {number}")
            yield tag("pre", "\n".join(formula_lines(target, formula)))
            yield folded("as it stands in the spec", tag("pre", Spec(targets=(target,)).to_surg().strip()))

    def _costs(self) -> Iterable[Markup]:
        report, targets = self.report, []
        for number in sorted({row.target for row in report.rows}):
            rows = [row for row in report.rows if row.target == number]
            ratio = report.step_ratio_of(self.spec.targets[number])
            targets.append((f"{number + 1}: {rows[0].formula}", len(rows), f"{sum(r.parameters for r in rows):,}",
                            f"{ratio:.2f} x frozen"))
        if report.unfrozen:  # what trains as it is costs a step nothing that the frozen model's does not
            targets.append(("train", len(report.unfrozen), f"{sum(report.unfrozen.values()):,}", "-"))
        yield table(["target", "weights", "parameters", "a step (estimate)"], targets)
        yield tag("p", f"A step, forward and backward, is counted for {TOKENS_SUPPOSED:,} tokens and not measured, ",
                  "over that of the same layers frozen.", class_="soft")
        yield table(["memory", "size"], [(name, size_text(size)) for name, size in report.memory.items()])
        if reasons := {why: len(names) for why, names in report.left_out.items()}:
            # A reason may name a place in the spec: without the folders of this machine, which are nobody's business.
            files = {target.span.source.name for target in self.spec.targets if target.span}
            rows = [(reduce(lambda text, file: text.replace(file, Path(file).name), files, why), count)
                    for why, count in reasons.items()]
            yield folded(f"{sum(reasons.values())} modules with weights are left out",
                         table(["reason", "modules"], rows))

    def _spectra(self) -> Iterable[Markup]:
        spectra, named = self.spectra, {self.title: self.spectra}
        if len(spectra.unchanged) == len(spectra.rows):
            yield tag("p", "Nothing yet: W' = W for every weight, as at the start.")
            return
        share = "σ² / Σ σ²" if spectra.squared else "σ / Σ σ"
        yield tag("p", f"ΔW = W' - W; p = {share} over its singular values; entropy -Σ p log p; stable rank ‖ΔW‖",
                  tag("sub", "F"), "² / ‖ΔW‖", tag("sub", "2"),
                  "²; effective rank exp(entropy); overlap of its ",
                  f"{spectra.top} strongest directions with those of W.", class_="soft")
        # Every line has a distribution; a figure across layers may have fewer lines, which keep their colours.
        spread = distributions(named)
        labels = [curve.label for curve in spread]
        layered = [(title, across_layers(named, figure)) for figure, title in
                   (("entropy", "entropy of ΔW (nats)"), ("stable_rank", "stable rank of ΔW"))]
        charts = [chart(title, curves, "layer", labels=labels, whole=True) for title, curves in layered if curves]
        charts.append(chart("share p of the i-th singular value", spread, "i", labels=labels, is_log=True))
        yield tag("div", *charts, class_="charts")
        yield legend(labels)
        yield _groups("module type", spectra.types)
        yield folded("by layer", _groups("layer", spectra.layers)) if spectra.layers else Markup()
        rows = [(row.name, sides_text(*row.spectrum.shape), *_cells(Group.of("", [row]).means),
                 figure_text(row.worst_defect)) for row in spectra.rows]
        yield folded("every weight", table(["weight", "shape", *_FIGURES.values(), "‖RRᵀ - I‖ / √n"], rows))

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
