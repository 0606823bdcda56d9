"""`surgery apply`: operate on a model and save the adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.model_options import free, loaded
from surgery.cli.options import (
    command,
    dtype_option,
    force_option,
    model_argument,
    opened,
    sets,
    spec_argument,
    strict_option,
    targets,
    trust_option,
)
from surgery.cli.output import Output
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.runtime.surgeon import Surgeon

_LARGEST_SEED = (1 << 64) - 1  # that torch takes


@command(spec_argument, model_argument, click.option("-o", "--out", metavar="DIR", help="Save the adapter here."),
         sets, targets,
         click.option("--merge", is_flag=True, help="Save the merged model instead of the adapter."),
         click.option("--seed", type=click.IntRange(0, _LARGEST_SEED), default=0, show_default=True,
                      help="Seed of the drawn parameters."),
         dtype_option, force_option, strict_option, trust_option,
         example="surgery apply sora demo:llama -o out --set rank=8")
def apply(output: Output, spec: str, model: str, out: str | None, sets: tuple[str, ...], targets: tuple[str, ...],
          merge: bool, seed: int, dtype: str | None, force: bool, strict: bool) -> None:
    """Operate on a model and save the adapter.

    The model is loaded with its weights, operated on as SPEC says, and checked to start unchanged.
    """
    from surgery.runtime.save import MODEL
    from surgery.runtime.saved_format import ADAPTER

    if merge and out is None:
        raise click.UsageError("--merge needs -o DIR.")
    if out is not None:
        free(out, force, MODEL if merge else ADAPTER)
    asked = opened(spec, sets, targets)
    subject = loaded(output, model, dtype)
    surgeon = _operate(output, subject, asked, seed, strict)
    if out is not None:
        _save(output, surgeon, model, out, merge, force)
    report = surgeon.report()
    output.say(f"{spec} on {model}: {counted(len(surgeon.plan.placed), 'weight')}\n\n{report}\n"
               f"start     {surgeon.proof}")
    if out is not None:
        _say_saved(output, out, merge)
    output.data(source=spec, model=model, out=out, merged=merge, seed=seed, logits_change=surgeon.proof.start,
                **report.to_json())


def _operate(output: Output, model: Any, spec: Any, seed: int, strict: bool) -> Surgeon:
    from surgery.runtime.surgeon import apply

    with output.busy("operating"):
        surgeon = apply(model, spec, seed=seed, strict=strict)
    output.diagnostics(surgeon.plan.warnings)
    return surgeon


def _save(output: Output, surgeon: Surgeon, model: str, out: str, merged: bool, force: bool) -> None:
    from surgery.models.loading import preprocessors
    from surgery.runtime.save import save_merged

    with output.busy(f"saving {out}"):
        if merged:
            save_merged(surgeon, out, preprocessors(model, output.trust), force)
        else:
            surgeon.save(out, base_model=model, force=force)


def _say_saved(output: Output, out: str, merged: bool) -> None:
    saved, beside = shlex.quote(out), shlex.quote(f"{Path(out)}-merged")
    following = f"surgery modules {saved}" if merged else f"surgery merge {saved} -o {beside}"
    output.say(f"saved     {out}\nnext      {following}")
