"""`surgery export`: write an adapter in the format of PEFT."""

from __future__ import annotations

import click

from surgery.cli.model_options import base_of, free, say_errors
from surgery.cli.options import command, dtype_option, force_option, import_libraries, revision_option, trust_option
from surgery.cli.output import Output
from surgery.text import counted


@command(click.argument("folder", metavar="DIR"), click.argument("model", required=False),
         click.option("--to", "form", type=click.Choice(["peft"]), required=True, help="Whose form to write."),
         click.option("-o", "--out", metavar="OUT", required=True, help="Write the adapter here."),
         click.option("--rank", type=click.IntRange(1), help="Write a LoRA of this rank, whatever the method is."),
         dtype_option, force_option, trust_option, revision_option,
         example="surgery export out --to peft -o peft-adapter")
def export(output: Output, folder: str, model: str | None, form: str, out: str, rank: int | None, dtype: str | None,
           force: bool) -> None:
    """Write a saved surgery as a PEFT adapter.

    DIR holds the saved surgery; MODEL is its base model unless you name another. A method that PEFT has is written in
    PEFT's own form; another one as the LoRA of the least rank that is exact, or of --rank, with the error of each
    module.
    """
    import_libraries(output, folder)
    from surgery.peft.export_adapter import export_peft
    from surgery.peft.folder import ADAPTER
    from surgery.runtime.attach import attach

    free(out, force, ADAPTER)
    subject, base, meta = base_of(output, folder, model, dtype)
    with output.busy("exporting"):
        exported = export_peft(attach(subject, folder), out, rank=rank, base_model=base, like=meta.get("peft"),
                               force=force)
    if exported.rank is None:
        output.say(f"{exported.peft_type}, in PEFT's own form")
    else:
        # A LoRA in the place of another method may lose some of it: how much, module by module.
        nearest = f"of {counted(len(exported.inexact), 'module')} only the nearest update of that rank"
        loss = "nothing of the updates left out" if exported.exact else nearest
        output.say(f"LoRA of rank {exported.rank}: {loss}\n")
        say_errors(output, exported.errors, lambda names: "" if set(names) & set(exported.inexact) else "  exact")
    output.say(f"saved     {out}\nnext      PeftModel.from_pretrained(model, {out!r})")
    output.data(adapter=folder, model=base, out=out, to=form, peft_type=exported.peft_type, rank=exported.rank,
                exact=exported.exact, relative_errors=dict(exported.errors))
