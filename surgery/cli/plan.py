"""`surgery plan`: what a spec would do to a model, without its weights."""

from __future__ import annotations

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


@command(spec_argument, model_argument, sets, targets, strict_option, trust_option, revision_option,
         example="surgery plan sora demo:llama --set rank=8 --target '**.q_proj'")
def plan(output: Output, spec: str, model: str, sets: tuple[str, ...], targets: tuple[str, ...], strict: bool) -> None:
    """Show what a spec would do to a model.

    Modules, parameters and memory, from the model's configuration alone: no weight is read.
    """
    asked = checked(spec, sets, targets)
    skeleton = skeleton_of(output, model)
    from surgery.planning.compile import compile
    from surgery.planning.figures import Report

    with output.busy("planning"):
        planned = compile(skeleton, asked, strict)
    output.diagnostics(planned.warnings)
    report = Report(planned)
    output.say(f"{spec} on {model}: {counted(len(planned.placed), 'weight')}\n")
    output.say(str(report))
    # The skeleton has the layers of the configuration's class, not those that a quantiser puts in their place.
    if getattr(planned.selection.survey.model.config, "quantization_config", None):
        output.note(f"{model} is quantised, and is planned with plain weights: its base model takes less memory than "
                    "that")
    output.say("memory: " + ", ".join(f"{name} {size_text(size)}" for name, size in report.memory.items()))
    output.data(source=spec, model=model, memory_bytes=report.memory, changes=len(planned.placed), **report.to_json())
