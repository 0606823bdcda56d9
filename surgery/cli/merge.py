"""`surgery merge`: a model with an adapter merged in."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from surgery.cli.model_options import base_of, free, say_errors
from surgery.cli.options import command, dtype_option, force_option, trust_option
from surgery.cli.output import Output


@command(click.argument("folder", metavar="DIR"), click.argument("model", required=False),
         click.option("-o", "--out", metavar="OUT", required=True, help="Save the merged model here."),
         click.option("--then", "after", multiple=True, metavar="DIR",
                      help="Merge this adapter too, on what those before made."),
         dtype_option, force_option, trust_option, example="surgery merge out -o out-merged")
def merge(output: Output, folder: str, model: str | None, out: str, after: tuple[str, ...], dtype: str | None,
          force: bool) -> None:
    """Save a model with an adapter merged in.

    DIR holds the saved adapter; MODEL is its base model unless you name another.
    """
    from surgery.models.loading import preprocessors
    from surgery.runtime.save import MODEL, save_merged
    from surgery.runtime.stack import Surgeries

    free(out, force, MODEL)
    subject, base, _ = base_of(output, folder, model, dtype)
    with output.busy("merging"):
        surgeries = Surgeries(subject)
        for i, each in enumerate((folder, *after)):
            surgeries.add(f"number_{i + 1}", Path(each))
        surgeon = surgeries.use(*surgeries.names)
        assert surgeon is not None  # it is None where no name is given
        errors = surgeon.merge()
    with output.busy(f"saving {out}"):
        save_merged(surgeon, out, preprocessors(base, output.trust), force)
    say_errors(output, errors)
    output.say(f"saved     {out}\nnext      surgery modules {shlex.quote(out)}")
    output.data(adapters=[folder, *after], model=base, out=out, relative_errors=errors)
