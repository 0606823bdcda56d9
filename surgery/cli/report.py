"""`surgery report`: a page about a saved adapter."""

from __future__ import annotations

import click

from surgery.cli.options import command, import_libraries, trust_option
from surgery.cli.output import Output
from surgery.cli.spectra_options import asked, base_option, squared_option, tracked


@command(click.argument("folder", metavar="DIR"), base_option,
         click.option("-o", "--out", metavar="FILE", default="report.html", show_default=True,
                      help="Write the page here."),
         squared_option, trust_option, example="surgery report out -o report.html")
def report(output: Output, folder: str, base: str | None, out: str, squared: bool) -> None:
    """Write a page about a saved adapter.

    One HTML file that needs no network: the model and what was operated on, formulas, parameters, costs, spectra, and
    training curves where the state of a Trainer lies in DIR or beside it.
    """
    import_libraries(output, folder)
    from surgery.analysis.page import report_page

    written = report_page(folder, out, base=base, squared=squared, asked=asked(output, folder),
                          measured=tracked(output))
    output.say(f"{written.spectra.summary}\nsaved     {out}")
    output.data(adapter=folder, base=written.base, out=out, training=written.training and str(written.training),
                **written.spectra.to_json())
