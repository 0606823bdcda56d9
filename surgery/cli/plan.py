"""`surgery plan`: what a spec would do to a model, without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import (
    checked,
    command,
    model_argument,
    revision_option,
    sets,
    skeleton_of,
    spec_argument,
    strict_option,
    targets,
    trust_option,
)
from surgery.cli.output import Output
from surgery.text import counted, size_text

if TYPE_CHECKING:
    from surgery.experiments.training_memory import Training
    from surgery.language.tree import Spec


@command(spec_argument, model_argument, sets, targets,
         click.option("--batch", type=click.IntRange(1), metavar="N", help="Predict what a training step of N texts "
                      "takes of memory on each device."),
         click.option("--length", type=click.IntRange(1), default=512, show_default=True, metavar="N",
                      help="Their length in tokens."),
         click.option("--optimiser", type=click.Choice(["adamw", "adamw-8bit", "sgd"]), default="adamw",
                      show_default=True, help="The optimiser of that step."),
         click.option("--checkpointing", is_flag=True, help="It computes activations twice and holds fewer."),
         click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, metavar="N",
                      help="It runs on N devices."),
         click.option("--sharded", is_flag=True, help="Each of them holds a part of the parameters (FSDP, ZeRO-3)."),
         strict_option, trust_option, revision_option,
         example="surgery plan sora demo:llama --set rank=8 --target '**.q_proj'")
def plan(output: Output, spec: str, model: str, sets: tuple[str, ...], targets: tuple[str, ...], batch: int | None,
         length: int, optimiser: str, checkpointing: bool, gpus: int, sharded: bool, strict: bool) -> None:
    """Show what a spec would do to a model.

    Modules, parameters and memory, from the model's configuration alone: no weight is read.
    """
    asked = checked(spec, sets, targets)
    skeleton = skeleton_of(output, model)
    from surgery.planning.compile import compile
    from surgery.planning.figures import Report
    from surgery.planning.quantised_sizes import packed_saving

    with output.busy("planning"):
        planned = compile(skeleton, asked, strict)
    output.diagnostics(planned.warnings)
    report = Report(planned)
    output.say(f"{spec} on {model}: {counted(len(planned.placed), 'weight')}\n")
    output.say(str(report))
    if packed_saving(planned.selection.survey) is None:
        output.note(f"{model} is quantised in a way that is not known here, and is planned with plain weights: its "
                    "base model takes less memory than that")
    output.say("memory: " + ", ".join(f"{name} {size_text(size)}" for name, size in report.memory.items()))
    step = None
    if batch is not None:
        from surgery.experiments.training_memory import Training

        how = Training(batch, length, optimiser, checkpointing, gpus, sharded)
        with output.busy("following a training step"):
            step = _step(output, skeleton_of(output, model), asked, how)  # of its own: it is operated on
    output.data(source=spec, model=model, memory_bytes=report.memory, step_bytes=step, changes=len(planned.placed),
                **report.to_json())


def _step(output: Output, skeleton: Any, spec: Spec, how: Training) -> dict[str, int] | None:
    """Say what a training step takes, or why that is not known."""
    from surgery.experiments.training_memory import training_memory

    try:
        step = training_memory(skeleton, spec, how)
    except RuntimeError as error:
        output.note(f"what a training step takes is not known: {type(skeleton).__name__} does not run on a batch that "
                    f"is made up and has no numbers ({(str(error).splitlines() or [type(error).__name__])[0]})")
        return None
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in step.items())
    total = size_text(sum(step.values()))
    output.say(f"a step of {how.batch} x {how.length:,} tokens: {total} on each device ({parts})")
    return step
