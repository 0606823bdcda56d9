"""`surgery import`: make an adapter of PEFT a saved surgery."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from surgery.cli.model_options import free, loaded
from surgery.cli.options import command, dtype_option, force_option, import_libraries, revision_option, trust_option
from surgery.cli.output import Output
from surgery.text import counted


@command(click.argument("folder", metavar="PEFT_DIR"), click.argument("model", required=False),
         click.option("-o", "--out", metavar="DIR", required=True, help="Save the surgery here."), dtype_option,
         force_option, trust_option, revision_option, example="surgery import peft-adapter -o out")
def import_(output: Output, folder: str, model: str | None, out: str, dtype: str | None, force: bool) -> None:
    """Make a PEFT adapter a saved surgery.

    PEFT_DIR holds adapter_config.json and adapter_model.safetensors (or adapter_model.bin, of which tensors alone are
    read); MODEL is the model that the adapter was made for unless you name another. PEFT need not be installed.
    """
    import_libraries(output, folder)
    from surgery.models.names import base_name
    from surgery.peft.folder import Folder
    from surgery.peft.import_adapter import read
    from surgery.runtime.saved_format import ADAPTER

    free(out, force, ADAPTER)
    adapter = Folder(Path(folder))
    base = base_name(folder, model, adapter.config.get("base_model_name_or_path"))
    subject = loaded(output, base, dtype, adapter)  # with room for a head that the adapter brings
    with output.busy(f"importing {folder}"):
        imported = read(subject, adapter)
        output.diagnostics(imported.warnings)
        surgeon = imported.operate()
    with output.busy(f"saving {out}"):
        surgeon.save(out, base_model=base, revision=adapter.config.get("revision"), peft=adapter.config, force=force)
    kind, report = adapter.config["peft_type"], surgeon.report()
    output.say(f"{kind} for {base}: {counted(len(surgeon.plan.placed), 'module')}\n\n{report}")
    output.say(f"saved     {out}\nnext      surgery merge {shlex.quote(out)} -o {shlex.quote(f'{Path(out)}-merged')}")
    output.data(adapter=folder, model=base, out=out, peft_type=kind, text=surgeon.spec.to_surg(), **report.to_json())


