"""`surgery report`: a page about a saved adapter."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import command, trust_option
from surgery.cli.output import Output
from surgery.cli.spectra_options import base_option, measured_spectra, squared_option, summary_line


@command(click.argument("folder", metavar="DIR"), base_option,
         click.option("-o", "--out", metavar="FILE", default="report.html", show_default=True,
                      help="Write the page here."),
         squared_option, trust_option, example="surgery report out -o report.html")
def report(output: Output, folder: str, base: str | None, out: str, squared: bool) -> None:
    """Write a page about a saved adapter.

    One HTML file that needs no network: the model and what was operated on, formulas, parameters, costs, spectra, and
    training curves where the state of a Trainer lies in DIR or beside it.
    """
    from surgery.analysis.page import Page
    from surgery.analysis.page.training_curves import charts, found_state
    from surgery.analysis.spectra.updates import of_surgeon
    from surgery.cli.opened_weights import opened_adapter
    from surgery.runtime.atomic_folders import refuse_file, replacing_file

    refuse_file(Path(out))
    state = found_state(Path(folder))
    training = charts(state) if state else {}
    found = opened_adapter(output, folder, base)
    spectra = measured_spectra(output, of_surgeon(found.surgeon, found.read, found.leaves), squared, top=8)
    with output.busy(f"writing {out}"), replacing_file(Path(out)) as new:
        page = Page(Path(folder).resolve().name, found.base, found.surgeon.report(), spectra, training)
        new.write_text(page.html(), encoding="utf-8")
    output.say(f"{summary_line(spectra)}\nsaved     {out}")
    output.data(adapter=folder, base=found.base, out=out, training=state and str(state), **spectra.to_json())
