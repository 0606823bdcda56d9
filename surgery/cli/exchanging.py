"""Commands that exchange adapters with PEFT: import, export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.operating import base_name, base_of, free, loaded, say_errors
from surgery.cli.options import command, dtype_option, force_option, trust_option
from surgery.cli.output import Output
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.peft.export_adapter import Exported


@command(click.argument("folder", metavar="PEFT_DIR"), click.argument("model", required=False),
         click.option("-o", "--out", metavar="DIR", required=True, help="Save the surgery here."), dtype_option,
         force_option, trust_option, example="surgery import peft-adapter -o out")
def import_(output: Output, folder: str, model: str | None, out: str, dtype: str | None, force: bool) -> None:
    """Make a PEFT adapter a saved surgery.

    PEFT_DIR holds adapter_config.json and adapter_model.safetensors; MODEL is the model that the adapter was made for
    unless you name another. PEFT need not be installed.
    """
    from surgery.peft.folder import Folder
    from surgery.peft.import_adapter import read
    from surgery.runtime.saved_format import ADAPTER

    free(out, force, ADAPTER)
    adapter = Folder(Path(folder))
    base = base_name(folder, model, adapter.config.get("base_model_name_or_path"))
    subject = loaded(output, base, dtype, adapter)
    with output.busy(f"importing {folder}"):
        found = read(subject, adapter)
        output.diagnostics(found.warnings)
        surgeon = found.operate()
    with output.busy(f"saving {out}"):
        surgeon.save(out, base_model=base, revision=adapter.config.get("revision"), peft=adapter.config, force=force)
    kind, report = adapter.config["peft_type"], surgeon.report()
    output.say(f"{kind} for {base}: {counted(len(surgeon.plan.placed), 'module')}\n\n{report}")
    output.say(f"saved     {out}\nnext      surgery merge {shlex.quote(out)} -o {shlex.quote(f'{Path(out)}-merged')}")
    output.data(adapter=folder, model=base, out=out, peft_type=kind, text=surgeon.spec.to_surg(), **report.to_json())


@command(click.argument("folder", metavar="DIR"), click.argument("model", required=False),
         click.option("--to", "form", type=click.Choice(["peft"]), required=True, help="Whose form to write."),
         click.option("-o", "--out", metavar="OUT", required=True, help="Write the adapter here."),
         click.option("--rank", type=click.IntRange(1), help="Write a LoRA of this rank, whatever the method is."),
         dtype_option, force_option, trust_option, example="surgery export out --to peft -o peft-adapter")
def export(output: Output, folder: str, model: str | None, form: str, out: str, rank: int | None, dtype: str | None,
           force: bool) -> None:
    """Write a saved surgery as a PEFT adapter.

    DIR holds the saved surgery; MODEL is its base model unless you name another. A method that PEFT has is written in
    PEFT's own form; another one as the LoRA of the least rank that is exact, or of --rank, with the error of each
    module.
    """
    from surgery.peft.export_adapter import export_peft
    from surgery.peft.folder import ADAPTER
    from surgery.runtime.attach import attach

    free(out, force, ADAPTER)
    subject, base, meta = base_of(output, folder, model, dtype)
    with output.busy("exporting"):
        found = export_peft(attach(subject, folder), out, rank=rank, base_model=base, like=meta.get("peft"),
                            force=force)
    _say(output, found)
    output.say(f"saved     {out}\nnext      PeftModel.from_pretrained(model, {out!r})")
    output.data(adapter=folder, model=base, out=out, to=form, peft_type=found.peft_type, rank=found.rank,
                exact=found.exact, relative_errors=dict(found.errors))


def _say(output: Output, found: Exported) -> None:
    if found.rank is None:
        return output.say(f"{found.peft_type}, in PEFT's own form")
    nearest = f"of {counted(len(found.inexact), 'module')} only the nearest update of that rank"
    output.say(f"LoRA of rank {found.rank}: {'nothing of the updates left out' if found.exact else nearest}\n")
    say_errors(output, found.errors, lambda names: "" if set(names) & set(found.inexact) else "  exact")


COMMANDS = (import_, export)
