"""`surgery merge`: a model with an adapter merged in."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from surgery.cli.model_options import free, say_errors
from surgery.cli.options import command, dtype_option, force_option, import_libraries, revision_option, trust_option
from surgery.cli.output import Output
from surgery.text import some


@command(click.argument("folder", metavar="DIR"), click.argument("model", required=False),
         click.option("-o", "--out", metavar="OUT", required=True, help="Save the merged model here."),
         click.option("--then", "after", multiple=True, metavar="DIR",
                      help="Merge this adapter too, on what those before made."),
         click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N",
                      help="Read and write in N threads."),
         click.option("--dequantise", is_flag=True, help="Write the weights that were trained on a quantised base, "
                      "dequantised."),
         dtype_option, force_option, trust_option, revision_option, example="surgery merge out -o out-merged")
def merge(output: Output, folder: str, model: str | None, out: str, after: tuple[str, ...], jobs: int,
          dequantise: bool, dtype: str | None, force: bool) -> None:
    """Save a model with an adapter merged in.

    DIR holds the saved adapter; MODEL is its base model unless you name another. The model's files are rewritten one
    weight at a time, and a merge that was killed goes on when it is run again.
    """
    # Every weight is met once, in memory that is new: torch then asks the system for it in large pages, and waits less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import_libraries(output, folder, *after)
    from surgery.models.names import base_name, revised
    from surgery.runtime.merge_files import merge_files
    from surgery.runtime.save import MODEL
    from surgery.runtime.saved_format import Saved

    free(out, force, MODEL)
    if output.revision:
        model = revised(base_name(folder, model, Saved(Path(folder)).base), output.revision)
    done = merge_files(folder, out, model, then=after, dtype=dtype, jobs=jobs, force=force, trust=output.trust,
                       dequantise=dequantise, step=output.busy)
    if done.in_memory and not dequantise:
        output.note(f"merged in memory: {done.in_memory}")
    if done.left_out:
        output.note(f"not copied, since they hold the weights as they were: {some(done.left_out)}")
    say_errors(output, done.errors)
    if done.logits is not None:
        output.say(f"logits    differ by {done.logits:.1e}, relative, from those of the quantised model that was "
                   "trained")
    if done.not_compared:
        output.note(f"not compared with the quantised model that was trained: {done.not_compared}")
    output.say(f"saved     {out}\nnext      surgery modules {shlex.quote(out)}")
    output.data(adapters=[folder, *after], model=done.base, out=out, relative_errors=done.errors,
                in_memory=done.in_memory or None, left_out=list(done.left_out), kept=done.kept,
                logits_change=done.logits, not_compared=done.not_compared or None)
