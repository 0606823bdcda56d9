"""`surgery spectrum`: what an adapter, or training, did to the weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command, import_libraries, trust_option
from surgery.cli.output import Output, aligned
from surgery.cli.spectra_options import asked, base_option, squared_option, tracked
from surgery.diagnostics import did_you_mean, fail
from surgery.text import counted, figure_text, plain, sides_text, some

if TYPE_CHECKING:
    from surgery.analysis.spectra import Spectra
    from surgery.analysis.spectra.updates import Pending

_TITLES = {"numerical_rank": "rank", "entropy": "entropy", "normalised_entropy": "of max",
           "entropy_by_largest": "by σ₁", "stable_rank": "stable rank", "effective_rank": "eff. rank",
           "relative_size": "‖ΔW‖/‖W‖", "condition_number": "κ(W')", "overlap_out": "overlap out", "overlap_in": "in"}
_DEFECT = "‖RRᵀ-I‖/√n"


@command(click.argument("subjects", metavar="DIR|MODEL...", nargs=-1, required=True),
         base_option, squared_option, trust_option,
         click.option("--top", type=click.IntRange(0), default=8, show_default=True, metavar="K",
                      help="Overlap of the K strongest directions of ΔW with those of W; 0 leaves it out."),
         click.option("--condition", is_flag=True, help="The condition number of each W' too."),
         click.option("--csv", "table", metavar="FILE", help="Write the table of modules as CSV."),
         click.option("--plot", "picture", metavar="FILE",
                      help="Draw entropy, stable rank and singular values (png, svg, pdf)."),
         example="surgery spectrum out --plot spectra.png")
def spectrum(output: Output, subjects: tuple[str, ...], base: str | None, squared: bool, top: int, condition: bool,
             table: str | None, picture: str | None) -> None:
    """Measure what adapters, or training, did to the weights.

    DIR is a saved adapter; a MODEL is measured against --base, or against the first name where that is a model:
    `spectrum BASE TUNED`. Several are shown side by side, and drawn over each other.

    For each ΔW = W' - W: the entropy -Σ p log p of its singular values, p = σ / Σ σ, and that of σ / σ₁; stable rank
    ‖ΔW‖_F² / ‖ΔW‖₂²; effective rank, which is e to the entropy; size; and how much of its strongest directions lies
    among the strongest of W. Singular values that rounding alone makes are not counted.
    """
    _ready(table, picture)
    import_libraries(output, subjects[0])  # or a model of the hub, which is asked for later
    from surgery.analysis.spectra import gathered

    found, others = {}, {}
    for label, pending, left_out in _opened(output, subjects, base):
        found[label] = gathered(pending, squared, top, tracked(output), condition)
        others[label] = left_out
    _say(output, found, others)
    _write(output, found, table, picture)
    measured = [{"subject": label, "not_compared": others[label], **each.to_json()} for label, each in found.items()]
    output.data(**measured[0] if len(measured) == 1 else {"spectra": measured})


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


def _opened(output: Output, subjects: Sequence[str],
            base: str | None) -> Iterator[tuple[str, list[Pending], list[str]]]:
    """What is measured, by its name: the updates, and the weights that are not compared."""
    from surgery.analysis.saved_weights import opened_adapter
    from surgery.runtime.saved_format import SPEC

    def is_adapter(name: str) -> bool:
        return (Path(name) / SPEC).is_file()

    first, *rest = subjects
    models = [name for name in rest if not is_adapter(name)]
    if models and base is None and is_adapter(first):
        raise click.UsageError(f"{first} is a saved adapter, and {models[0]} a model: --base MODEL says what models "
                               "are measured against.")
    if rest and base is None and not is_adapter(first):
        base, measured = first, rest
    else:
        measured = [first, *rest]
    for name in measured:
        # a name alone is an adapter's: what it lacks of one is told
        if is_adapter(name) or not (rest or base):
            yield name, opened_adapter(name, base, asked(output, name)).updates(), []
        else:
            yield name, *_of_models(output, base or first, name)


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


def _say(output: Output, found: Mapping[str, Spectra], others: Mapping[str, Sequence[str]]) -> None:
    if len(found) > 1:
        known = {name for each in found.values() for name in each.figures}
        titles = {name: title for name, title in _TITLES.items() if name in known}
        rows = [[label, str(each.total.count), *(figure_text(each.total.means[name]) for name in titles)]
                for label, each in found.items()]
        output.say("\n".join([*aligned([["(means)", "weights", *titles.values()], *rows]), ""]))
    for label, spectra in found.items():
        if len(found) == 1:
            _say_one(output, spectra)
        output.say(f"{label}: {spectra.summary}" if len(found) > 1 else spectra.summary)
        if spectra.unchanged:
            output.note(f"unchanged: {_weights(spectra.unchanged)}")
        if others[label]:
            output.note(f"not compared, since the base has no such weight: {_weights(others[label])}")


def _say_one(output: Output, spectra: Spectra) -> None:
    """Its modules, and the means of module types and layers."""
    titles = {figure: title for figure, title in _TITLES.items() if figure in spectra.figures}
    if not titles:  # figures of no change at all would be rows of dashes
        return
    output.say("\n".join([*aligned(_module_table(spectra, titles)), ""]))
    for title, groups in (("module type (mean)", spectra.types), ("layer (mean)", spectra.layers)):
        rows = [[g.name, str(g.count), *(figure_text(g.means[figure]) for figure in titles)] for g in groups]
        output.say("\n".join([*aligned([[title, "weights", *titles.values()], *rows]), ""]))


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


def _write(output: Output, found: Mapping[str, Spectra], table: str | None, picture: str | None) -> None:
    from surgery.runtime.atomic_folders import replacing_file

    if table:
        with replacing_file(Path(table)) as new:
            new.write_text(_csv(found), encoding="utf-8")
    if picture:
        from surgery.analysis.spectra.plot import draw

        ends = [Path(name).name for name in found]
        labels = ends if len({*ends}) == len(ends) else list(found)
        with output.busy(f"drawing {picture}"), replacing_file(Path(picture)) as new:
            draw(dict(zip(labels, found.values())), new, ", ".join(labels))
    for file in filter(None, (table, picture)):
        output.say(f"saved     {file}")


def _csv(found: Mapping[str, Spectra]) -> str:
    """One line a module: its figures without the singular values; of several subjects, with the subject."""
    text = io.StringIO()
    fields = [*(["subject"] if len(found) > 1 else []), "name", "type", "layer", "out", "in", *_TITLES, "norm",
              "orthogonality"]
    table = csv.DictWriter(text, fields, lineterminator="\n", extrasaction="ignore")
    table.writeheader()  # with the same columns for every adapter, so that files can be joined
    for label, row in ((label, row) for label, spectra in found.items() for row in spectra.rows):
        out, in_ = row.spectrum.shape
        cells = {**row.to_json(), "out": out, "in": in_, "orthogonality": row.worst_defect, "subject": label}
        table.writerow({field: _cell(value) for field, value in cells.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet shows and does not run: text that begins as a formula does stands behind a `'`."""
    text = plain(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.lstrip().startswith(("=", "+", "-", "@")) else text
