"""`surgery explain`: why a module is taken, or is not."""

from __future__ import annotations

import click

from surgery.cli.options import (
    command,
    import_libraries,
    model_argument,
    opened,
    revision_option,
    sets,
    skeleton_of,
    spec_argument,
    targets,
    trust_option,
)
from surgery.cli.output import Output


@command(spec_argument, model_argument, click.argument("name"), sets, targets, trust_option, revision_option,
         example="surgery explain sora demo:llama model.layers.0.self_attn.q_proj")
def explain(output: Output, spec: str, model: str, name: str, sets: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Say why a module is taken, or is not.

    Gives the line of SPEC that takes the module NAME of MODEL, or the reason why none does.
    """
    asked = opened(spec, sets, targets)
    import_libraries(output)
    from surgery.language.library import library
    from surgery.matching.selection import select

    selection = select(skeleton_of(output, model), asked, library(asked).selects)
    text = selection.explain(name)
    output.say(text)
    output.data(spec=spec, model=model, name=name, taken=name in selection.targets, text=text)
