"""`surgery init`: a spec to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import command
from surgery.cli.output import Output
from surgery.diagnostics import fail


@command(click.argument("name"),
         click.option("--from", "base", metavar="SPEC", help="Begin with what a spec does, shipped or a file."),
         click.option("--model", help="Name the linear layers of this model (its configuration is enough)."),
         click.option("--force", is_flag=True, help="Replace the file if there is one."),
         example="surgery init mine --from lora --model demo:llama")
def init(output: Output, name: str, base: str | None, model: str | None, force: bool) -> None:
    """Write a new spec NAME.surg, with comments that say what each part is.

    The model that the nearest `surgery.toml` names is taken where none is given.
    """
    from surgery.editor.scaffold import scaffold
    from surgery.runtime.atomic_folders import replacing_file
    from surgery.settings import settings

    path = Path(name if name.endswith(".surg") else f"{name}.surg")
    if path.exists() and not force:
        raise fail("bad-output", f"{path} exists already", helps=("--force replaces it",))
    with output.busy("writing"):
        text = scaffold(path.stem, base, settings().model if model is None else model)
    with replacing_file(path) as new:
        new.write_bytes(text.encode("utf-8"))
    output.say(f"{path} is written; surgery check {path} looks whether it is right")
    output.data(file=str(path), text=text)
