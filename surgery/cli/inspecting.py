"""Commands that look at a model without its weights: modules, explain, plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from surgery.cli.options import (
    command,
    model_argument,
    opened,
    sets,
    spec_argument,
    strict_option,
    targets,
    trust_option,
)
from surgery.cli.output import Output
from surgery.text import counted, size_text

if TYPE_CHECKING:
    from torch import nn

    from surgery.language.tree import Spec
    from surgery.planning.compile import Plan


def skeleton_of(output: Output, model: str) -> nn.Module:
    from surgery.models.loading import quiet_libraries, skeleton

    with output.busy(f"reading the configuration of {model}"):
        quiet_libraries(output.animated)
        return skeleton(model, output.trust)


def _plan(output: Output, spec: Spec, model: str, strict: bool = False) -> Plan:
    from surgery.planning.compile import compile

    skeleton = skeleton_of(output, model)
    with output.busy("planning"):
        plan = compile(skeleton, spec, strict)
    output.diagnostics(plan.warnings)
    return plan


# --------------------------------------------------------------------------------------------------------- plan


@command(spec_argument, model_argument, sets, targets, strict_option, trust_option,
         example="surgery plan sora demo:llama --set rank=8 --target '**.q_proj'")
def plan(output: Output, spec: str, model: str, sets: tuple[str, ...], targets: tuple[str, ...], strict: bool) -> None:
    """Show what a spec would do to a model.

    Modules, parameters and memory, from the model's configuration alone: no weight is read.
    """
    from surgery.planning.figures import Report

    found = _plan(output, opened(spec, sets, targets), model, strict)
    report = Report(found)
    output.say(f"{spec} on {model}: {counted(len(found.placed), 'weight')}\n")
    output.say(str(report))
    if getattr(found.selection.survey.model.config, "quantization_config", None):
        output.note(f"{model} is quantised, and is planned with plain weights: its base model takes less memory than "
                    "that")
    output.say("memory: " + ", ".join(f"{name} {size_text(size)}" for name, size in report.memory.items()))
    output.data(source=spec, model=model, memory_bytes=report.memory, changes=len(found.placed), **report.to_json())


@command(spec_argument, model_argument, click.argument("name"), sets, targets, trust_option,
         example="surgery explain sora demo:llama model.layers.0.self_attn.q_proj")
def explain(output: Output, spec: str, model: str, name: str, sets: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Say why a module is taken, or is not.

    Gives the line of SPEC that takes the module NAME of MODEL, or the reason why none does.
    """
    from surgery.language.library import library
    from surgery.matching.selection import select

    asked = opened(spec, sets, targets)
    selection = select(skeleton_of(output, model), asked, library(asked).selects)
    text = selection.explain(name)
    output.say(text)
    output.data(spec=spec, model=model, name=name, taken=name in selection.targets, text=text)


# ------------------------------------------------------------------------------------------------------ modules


@command(model_argument, click.argument("pattern", required=False), trust_option,
         click.option("--all", "every", is_flag=True,
                      help="Write every layer of a list out, also where they are alike."),
         example="surgery modules demo:llama '**.mlp.*'")
def modules(output: Output, model: str, pattern: str | None, every: bool) -> None:
    """Show a model as a tree of modules.

    With the kind and shape of every weight that a spec can take; PATTERN narrows it.
    """
    from surgery.cli.module_tree_view import chosen, entries, tree

    skeleton = skeleton_of(output, model)
    names = chosen(skeleton, pattern)
    output.say(tree(skeleton, names, every))
    output.data(model=model, modules=entries(skeleton, names))


COMMANDS = (plan, explain, modules)
