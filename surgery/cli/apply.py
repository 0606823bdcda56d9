"""`surgery apply`: operate on a model and save the adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.model_options import free, loaded
from surgery.cli.options import (
    checked,
    command,
    dtype_option,
    force_option,
    import_libraries,
    model_argument,
    revision_option,
    self_contained_option,
    sets,
    spec_argument,
    strict_option,
    targets,
    trust_option,
)
from surgery.cli.output import Output
from surgery.cli.training_options import COUNT, READ, given
from surgery.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgery.experiments.tasks import AnyTask
    from surgery.language.tree import Spec
    from surgery.runtime.surgeon import Surgeon

_LARGEST_SEED = (1 << 64) - 1  # that torch takes


@command(spec_argument, model_argument, click.option("-o", "--out", metavar="DIR", help="Save the adapter here."),
         sets, targets,
         click.option("--data", metavar="FILE", help="Measure what starts name (G, C) on this, as `train` reads it."),
         click.option("--batches", "count", type=COUNT, help="Batches of it, of 8 items each.  [default: 8]"), *READ,
         click.option("--merge", is_flag=True, help="Save the merged model instead of the adapter."),
         click.option("--no-load", is_flag=True, help="Read the weights one at a time; no forward pass is tried."),
         click.option("--seed", type=click.IntRange(0, _LARGEST_SEED), default=0, show_default=True,
                      help="Seed of the drawn parameters."),
         self_contained_option, dtype_option, force_option, strict_option, trust_option, revision_option,
         example="surgery apply sora demo:llama -o out --set rank=8")
def apply(output: Output, spec: str, model: str, out: str | None, sets: tuple[str, ...], targets: tuple[str, ...],
          data: str | None, count: int | None, kind: str | None, label: str | None, threshold: float | None,
          merge: bool, no_load: bool, seed: int, self_contained: bool, dtype: str | None, force: bool,
          strict: bool) -> None:
    """Operate on a model and save the adapter.

    The model is loaded with its weights, operated on as SPEC says, and checked to start unchanged. A spec whose
    parameters start at what data gives (`surgery specs` says which) needs --data. A model that does not fit into
    memory is not loaded, as with --no-load.
    """
    asked = checked(spec, sets, targets)
    if merge and out is None:
        raise click.UsageError("--merge needs -o DIR.")
    if no_load and (out is None or merge or data is not None):
        raise click.UsageError("--no-load needs -o DIR, and neither --merge nor --data.")
    import_libraries(output)
    from surgery.experiments.tasks import read_task
    from surgery.models.names import revised
    from surgery.runtime.apply import apply as operate
    from surgery.runtime.save import MODEL
    from surgery.runtime.saved_format import ADAPTER

    if out is not None:  # refused now, since loading may take minutes
        free(out, force, MODEL if merge else ADAPTER)
    model = revised(model, output.revision)
    if out is not None and not (merge or data) and (no_load or _is_too_large(output, model, dtype)):
        return _unloaded(output, spec, asked, model, out, seed, dtype, force, strict, self_contained)
    subject = loaded(output, model, dtype)
    measured = {} if data is None else _measured(
        output, subject, model, read_task(data, kind, label=label, threshold=threshold), count)
    with output.busy("operating"):
        surgeon = operate(subject, asked, seed=seed, strict=strict, **measured)
    if out is not None:
        _save(output, surgeon, out, model, merge, force, self_contained)
    report = surgeon.report()
    output.say(f"{spec} on {model}: {counted(len(surgeon.plan.placed), 'weight')}\n\n{report}\n"
               f"start     {surgeon.proof}")
    _say_saved(output, out, merge)
    output.data(source=spec, model=model, out=out, merged=merge, seed=seed, loaded=True,
                logits_change=surgeon.proof.start, **report.to_json())


def _is_too_large(output: Output, model: str, dtype: str | None) -> bool:
    from surgery.runtime.apply_files import too_large

    if why := too_large(model, dtype, output.trust):
        output.note(f"{model} is not loaded: {why}")
    return bool(why)


def _unloaded(output: Output, spec: str, asked: Spec, model: str, out: str, seed: int, dtype: str | None, force: bool,
              strict: bool, self_contained: bool) -> None:
    from surgery.runtime.apply_files import apply_files

    done = apply_files(model, asked, out, seed=seed, dtype=dtype, strict=strict, force=force, trust=output.trust,
                       self_contained=self_contained, step=output.busy)
    output.diagnostics(done.plan.warnings)
    output.say(f"{spec} on {model}: {counted(len(done.plan.placed), 'weight')}\n\n{done.report}\n"
               f"start     {done.proof}")
    _say_saved(output, out, False)
    output.data(source=spec, model=model, out=out, merged=False, seed=seed, loaded=False, logits_change=None,
                **done.report.to_json())


def _say_saved(output: Output, out: str | None, merged: bool) -> None:
    """What was saved, if anything, and a command to paste, so its paths are quoted as a shell reads them."""
    if out is None:
        return
    saved, after = shlex.quote(out), shlex.quote(f"{Path(out)}-merged")
    following = f"surgery modules {saved}" if merged else f"surgery merge {saved} -o {after}"
    output.say(f"saved     {out}\nnext      {following}")


def _measured(output: Output, subject: PreTrainedModel, model: str, task: AnyTask, count: int | None) -> dict[str, Any]:
    """What starts that data gives are measured on: `count` batches of a task, and its loss."""
    from surgery.experiments.evaluation import refuse_unfit
    from surgery.experiments.training import Setting, measured_on
    from surgery.models.loading import tokenizer

    refuse_unfit(subject, task)
    setting = Setting(batch=8, length=512)
    return measured_on(subject, tokenizer(model, output.trust), task, setting, **given({"count": count}))


def _save(output: Output, surgeon: Surgeon, out: str, model: str, merge: bool, force: bool,
          self_contained: bool) -> None:
    """Write the adapter, or the merged model with the tokenizer and the like of `model`."""
    from surgery.models.loading import preprocessors
    from surgery.runtime.save import save_merged

    with output.busy(f"saving {out}"):
        if merge:
            save_merged(surgeon, out, preprocessors(model, output.trust), force)
        else:
            surgeon.save(out, base_model=model, force=force, self_contained=self_contained)
