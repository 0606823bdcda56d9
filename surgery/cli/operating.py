"""Commands that load weights: apply, merge."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
from surgery.diagnostics import fail
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.models.loading import Trained
    from surgery.runtime.atomic_folders import Kind
    from surgery.runtime.surgeon import Surgeon


def free(out: str, force: bool, kind: Kind) -> None:
    """Refuse an output folder that is not ours to take, before any work. Raises: SurgeryError (bad-output)."""
    from surgery.runtime.atomic_folders import refuse_taken, refuse_unwritable

    if not out:
        raise fail("bad-output", "-o names no folder")
    refuse_taken(Path(out), kind, force)
    refuse_unwritable(Path(out))


def loaded(output: Output, model: str, dtype: str | None, saved: Trained | None = None) -> Any:
    """MODEL with its weights; with the head that an adapter was trained with."""
    from surgery.models.loading import load, load_with_saved_head, quiet_libraries

    with output.busy(f"loading {model}"):
        quiet_libraries(output.animated)
        return load_with_saved_head(model, saved, dtype, output.trust) if saved else load(model, dtype, output.trust)


# -------------------------------------------------------------------------------------------------------- apply


@command(spec_argument, model_argument, click.option("-o", "--out", metavar="DIR", help="Save the adapter here."),
         sets, targets,
         click.option("--merge", is_flag=True, help="Save the merged model instead of the adapter."),
         click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                      help="Seed of the drawn parameters."),
         dtype_option, force_option, strict_option, trust_option,
         example="surgery apply sora demo:llama -o out --set rank=8")
def apply(output: Output, spec: str, model: str, out: str | None, sets: tuple[str, ...], targets: tuple[str, ...],
          merge: bool, seed: int, dtype: str | None, force: bool, strict: bool) -> None:
    """Operate on a model and save the adapter.

    The model is loaded with its weights, operated on as SPEC says, and checked to start unchanged.
    """
    from surgery.runtime.attach import MODEL
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
    from surgery.runtime.attach import save_merged

    with output.busy(f"saving {out}"):
        if merged:
            save_merged(surgeon, out, preprocessors(model, output.trust), force)
        else:
            surgeon.save(out, base_model=model, force=force)


def _say_saved(output: Output, out: str, merged: bool) -> None:
    saved, beside = shlex.quote(out), shlex.quote(f"{Path(out)}-merged")
    following = f"surgery modules {saved}" if merged else f"surgery merge {saved} -o {beside}"
    output.say(f"saved     {out}\nnext      {following}")


# -------------------------------------------------------------------------------------------------------- merge


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
    from surgery.runtime.attach import MODEL, save_merged
    from surgery.runtime.stack import Surgeries

    free(out, force, MODEL)
    subject, base, _ = base_of(output, folder, model, dtype)
    with output.busy("merging"):
        surgeries = Surgeries(subject)
        for i, each in enumerate((folder, *after)):
            surgeries.add(f"number_{i + 1}", Path(each))
        surgeon = surgeries.use(*surgeries.names)
        errors = surgeon.merge()
    with output.busy(f"saving {out}"):
        save_merged(surgeon, out, preprocessors(base, output.trust), force)
    say_errors(output, errors)
    output.say(f"saved     {out}\nnext      surgery modules {shlex.quote(out)}")
    output.data(adapters=[folder, *after], model=base, out=out, relative_errors=errors)


def base_of(output: Output, folder: str, model: str | None, dtype: str | None) -> tuple[Any, str, Mapping[str, Any]]:
    """The base model of a saved adapter, or another, with the head that the adapter has; its name; its `meta.json`.

    Raises: SurgeryError (bad-adapter, unknown-model).
    """
    from surgery.runtime.saved_format import Saved

    saved = Saved(Path(folder))
    base = base_name(folder, model, saved.meta.get("base_model"))
    return loaded(output, base, dtype, saved), base, saved.meta


def base_name(folder: str, named: str | None, said: str | None, how: str = "name the model after the folder") -> str:
    """The model that is named, or that an adapter says it is for. Raises: SurgeryError (unknown-model) without any."""
    if base := named or said:
        return base
    raise fail("unknown-model", f"{folder} does not say which model it is for", helps=(how,))


def say_errors(output: Output, errors: Mapping[str, float],
               note: Callable[[list[str]], str] = lambda names: "") -> None:
    """The relative error of each module; modules that differ in their index alone are one line, with the largest, and
    what `note` says of them."""
    from surgery.matching.name_ranges import alike, ranged

    rows = {ranged(names): f"{max(errors[n] for n in names):.1e}{note(names)}" for names in alike(errors)}
    width = max(map(len, ["module", *rows]))
    for modules, error in {"module": "largest relative error", **rows}.items():
        output.say(f"{modules:{width}}  {error}")


COMMANDS = (apply, merge)
