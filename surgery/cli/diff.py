"""`surgery diff`: in what two specs or two adapters differ."""

from __future__ import annotations

import click

from surgery.cli.options import command, revision_option, skeleton_of, trust_option
from surgery.cli.output import Output


@command(click.argument("a"), click.argument("b"),
         click.option("--model", help="Compare modules, parameters and costs on this model too (its configuration is "
                                      "enough)."),
         trust_option, revision_option,
         example="surgery diff lora dora --model demo:llama")
def diff(output: Output, a: str, b: str, model: str | None) -> None:
    """Show in what two specs, or two adapters, differ.

    A and B are .surg files, names of specs that ship, or two folders that `surgery apply`, `save()` or PEFT wrote. What
    they say is compared as formulas, parameters and defaults; of adapters the tensors too.
    """
    from surgery.peft.diff import diff as difference

    skeleton = skeleton_of(output, model) if model else None
    found = difference(a, b, skeleton)
    output.say(f"- {a}\n+ {b}\n")
    output.say(str(found))
    output.data(**found.to_json())
