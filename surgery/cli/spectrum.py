"""`surgery spectrum`: what an adapter, or training, did to the weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command, trust_option
from surgery.cli.output import Output, aligned
from surgery.cli.spectra_options import asked, base_option, squared_option, tracked
from surgery.diagnostics import did_you_mean, fail
from surgery.text import counted, figure_text, plain, sides_text, some

if TYPE_CHECKING:
    from surgery.analysis.spectra import Spectra
    from surgery.analysis.spectra.updates import Pending

_TITLES = {"numerical_rank": "rank", "entropy": "entropy", "normalised_entropy": "of max", "stable_rank": "stable rank",
           "effective_rank": "eff. rank", "relative_size": "‖ΔW‖/‖W‖", "overlap_out": "overlap out", "overlap_in": "in"}
_DEFECT = "‖RRᵀ-I‖/√n"


@command(click.argument("first", metavar="DIR|BASE"), click.argument("second", metavar="[TUNED]", required=False),
         base_option, squared_option, trust_option,
         click.option("--top", type=click.IntRange(0), default=8, show_default=True, metavar="K",
                      help="Overlap of the K strongest directions of ΔW with those of W; 0 leaves it out."),
         click.option("--csv", "table", metavar="FILE", help="Write the table of modules as CSV."),
         click.option("--plot", "picture", metavar="FILE",
                      help="Draw entropy, stable rank and singular values (png, svg, pdf)."),
         example="surgery spectrum out --plot spectra.png")
def spectrum(output: Output, first: str, second: str | None, base: str | None, squared: bool, top: int,
             table: str | None, picture: str | None) -> None:
    """Measure what an adapter, or training, did to the weights.

    DIR is a saved adapter, or BASE and TUNED are two models. For each ΔW = W' - W: the entropy -Σ p log p of its
    singular values, p = σ / Σ σ; stable rank ‖ΔW‖_F² / ‖ΔW‖₂²; effective rank, which is e to the entropy; size; and how
    much of its strongest directions lies among the strongest of W. Singular values that rounding alone makes are not
    counted.
    """
    if second and base:
        raise click.UsageError("--base is for a saved adapter; here BASE and TUNED are models.")
    from surgery.analysis.saved_weights import opened_adapter
    from surgery.analysis.spectra import gathered

    _ready(table, picture)
    pending, left_out = (_of_models(output, first, second) if second
                         else (opened_adapter(first, base, asked(output)).updates(), []))
    spectra = gathered(pending, squared, top, tracked(output))
    _say(output, spectra, left_out)
    _write(output, spectra, table, picture, Path(second or first).name)
    output.data(subject=first, tuned=second, not_compared=left_out, **spectra.to_json())


def _ready(table: str | None, picture: str | None) -> None:
    """Refuse files that cannot be written or drawn, before any work. Raises: SurgeryError."""
    from surgery.runtime.atomic_folders import refuse_file

    for file in filter(None, (table, picture)):
        refuse_file(Path(file))
    if picture:
        from surgery.extras import need

        need("matplotlib", "plot", "a plot")
        from surgery.analysis.spectra.plot import FORMATS

        if Path(picture).suffix not in FORMATS:
            raise fail("bad-output", f"cannot draw {picture}: its name must end in one of {', '.join(FORMATS)}",
                       helps=tuple(filter(None, [did_you_mean(Path(picture).suffix, FORMATS)])))


# --------------------------------------------------------------------------------------------------------- what of


def _of_models(output: Output, base: str, tuned: str) -> tuple[list[Pending], list[str]]:
    """The updates between two models, and the weights of the tuned one that the base has not in that shape."""
    from surgery.analysis.saved_weights import opened_weights
    from surgery.analysis.spectra.checkpoint import pairs
    from surgery.analysis.spectra.updates import of_models

    one, other = (opened_weights(name, asked(output)) for name in (base, tuned))
    both = pairs(one, other)
    if not both:
        raise fail("bad-value", f"{base} and {tuned} have no weight in common")
    # By the tensor, since a tied weight is compared under one of its names and must not be reported under another.
    compared = {id(tensor) for site in both for tensor in site.held}
    left_out = [s.name for s in other.survey.sites if compared.isdisjoint(map(id, s.held)) and one.of(s) is None]
    return of_models(both), left_out


# ------------------------------------------------------------------------------------------------------------ words


def _say(output: Output, spectra: Spectra, left_out: Sequence[str]) -> None:
    titles = {figure: title for figure, title in _TITLES.items() if spectra.top or "overlap" not in figure}
    if len(spectra.unchanged) < len(spectra.rows):  # figures of no change at all would be rows of dashes
        output.say("\n".join([*aligned(_module_table(spectra, titles)), ""]))
        for title, groups in (("module type (mean)", spectra.types), ("layer (mean)", spectra.layers)):
            rows = [[g.name, str(g.count), *(figure_text(g.means[figure]) for figure in titles)] for g in groups]
            output.say("\n".join([*aligned([[title, "weights", *titles.values()], *rows]), ""]))
    output.say(spectra.summary)
    if spectra.unchanged:
        output.note(f"unchanged: {_weights(spectra.unchanged)}")
    if left_out:
        output.note(f"not compared, since the base has no such weight: {_weights(left_out)}")


def _module_table(spectra: Spectra, titles: Mapping[str, str]) -> list[list[str]]:
    from surgery.analysis.spectra.summary import FIGURES

    # The column of rotations stands only where some update holds one.
    is_turned = any(row.orthogonality for row in spectra.rows)
    table = [["module", "shape", *titles.values(), *([_DEFECT] if is_turned else [])]]
    for row in spectra.rows:
        worst = [row.worst_defect] if is_turned else []
        figures = [FIGURES[figure](row) if row.changed else None for figure in titles]
        table.append([row.name, sides_text(*row.spectrum.shape), *map(figure_text, [*figures, *worst])])
    return table


def _weights(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'weight')}: {some(names)}"


# ------------------------------------------------------------------------------------------------------------ files


def _write(output: Output, spectra: Spectra, table: str | None, picture: str | None, label: str) -> None:
    from surgery.runtime.atomic_folders import replacing_file

    if table:
        with replacing_file(Path(table)) as new:
            new.write_text(_csv(spectra), encoding="utf-8")
    if picture:
        from surgery.analysis.spectra.plot import draw

        with output.busy(f"drawing {picture}"), replacing_file(Path(picture)) as new:
            draw({label: spectra}, new, label)
    for file in filter(None, (table, picture)):
        output.say(f"saved     {file}")


def _csv(spectra: Spectra) -> str:
    """One line a module: its figures without the singular values."""
    text = io.StringIO()
    fields = ["name", "type", "layer", "out", "in", *_TITLES, "norm", "orthogonality"]
    table = csv.DictWriter(text, fields, lineterminator="\n", extrasaction="ignore")
    table.writeheader()  # with the same columns for every adapter, so that files can be joined
    for row in spectra.rows:
        out, in_ = row.spectrum.shape
        cells = {**row.to_json(), "out": out, "in": in_, "orthogonality": row.worst_defect}
        table.writerow({field: _cell(value) for field, value in cells.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet shows and does not run: text that begins as a formula does stands behind a `'`."""
    text = plain(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.lstrip().startswith(("=", "+", "-", "@")) else text
