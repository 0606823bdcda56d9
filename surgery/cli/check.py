"""`surgery check`: what is wrong with specs, without a model or with one."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.help import told_of_code
from surgery.cli.options import command, files_below, opened, sets, skeleton_of, strict_option, trust_option
from surgery.cli.output import FORMATS, Output
from surgery.diagnostics import Collector, SurgeryError
from surgery.text import counted


@command(click.argument("specs", nargs=-1, metavar="SPEC..."),
         click.option("--model", help="Check against this model too (its configuration is enough)."), sets,
         strict_option, trust_option,
         click.option("--output-format", "form", type=click.Choice(FORMATS), default="full", show_default=True,
                      help="How to show what is wrong: with the source, a line each, as GitHub's annotations, or as "
                           "one object of SARIF or JSON."),
         click.option("--explain", metavar="CODE", help="The same as `surgery help CODE`."),
         example="surgery check specs/sora.surg --model demo:llama --set rank=8")
def check(output: Output, specs: tuple[str, ...], model: str | None, sets: tuple[str, ...], strict: bool,
          form: str, explain: str | None) -> None:
    """Check specs, without a model or with one.

    Syntax, names, types, shapes, claims, and that the operated model starts as the base model. A SPEC that is a folder
    is every .surg file below it.
    """
    from surgery.language.library import shipped

    if explain:
        return told_of_code(output, explain)
    if not specs:
        raise click.UsageError("Missing argument 'SPEC...'.")
    if output.as_json and form not in ("full", "json"):
        raise click.UsageError(f"--json and --output-format={form} are two forms.")
    names = files_below(specs, shipped())
    skeleton = skeleton_of(output, model) if model else None
    results = {spec: _checked(output, spec, sets, skeleton) for spec in names}
    failed = [spec for spec, found in results.items() if found.errors or (strict and found.found)]
    for spec, found in results.items():
        if form == "full":
            output.say(f"{spec}: {_verdict(found, spec not in failed)}")
    output.data(specs=[{"spec": spec, "ok": spec not in failed} for spec in results])
    if failed:
        raise SurgeryError(d for found in results.values() for d in found.found)


def _checked(output: Output, name: str, sets: tuple[str, ...], skeleton: Any) -> Collector:
    """What is wrong with a spec; it is shown."""
    from surgery.planning.check import check as findings
    from surgery.semantics.arguments import guard

    found = Collector()
    with guard(found):
        spec = opened(name, sets)
        with output.busy("checking"):
            found.add(*findings(spec, skeleton))
    output.diagnostics(found.found, name)
    return found


def _verdict(found: Collector, ok: bool) -> str:
    counts = [counted(len(part), noun) for part, noun in ((found.errors, "error"), (found.warnings, "warning")) if part]
    return ", ".join([*(["ok"] if ok else []), *counts])
