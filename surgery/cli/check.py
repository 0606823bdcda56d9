"""`surgery check`: what is wrong with specs, without a model or with one."""

from __future__ import annotations

import click

from surgery.cli.help import explain_code
from surgery.cli.options import (
    command,
    files_below,
    opened,
    revision_option,
    sets,
    skeleton_of,
    strict_option,
    trust_option,
)
from surgery.cli.output import FORMATS, Output
from surgery.diagnostics import Collector, SurgeryError
from surgery.text import counted


@command(click.argument("specs", nargs=-1, metavar="SPEC..."),
         click.option("--model", help="Check against this model too (its configuration is enough)."), sets,
         strict_option, trust_option, revision_option,
         click.option("--prove", is_flag=True,
                      help="Compute that every program gives its formula's values and gradients, even where the "
                           "rest needs no numbers (loads torch)."),
         click.option("--output-format", "form", type=click.Choice(FORMATS), default="full", show_default=True,
                      help="How to show what is wrong: with the source, a line each, as GitHub's annotations, or as "
                           "one object of SARIF or JSON."),
         click.option("--explain", metavar="CODE", help="The same as `surgery help CODE`."),
         example="surgery check specs/sora.surg --model demo:llama --set rank=8")
def check(output: Output, specs: tuple[str, ...], model: str | None, sets: tuple[str, ...], strict: bool,
          prove: bool, form: str, explain: str | None) -> None:
    """Check specs, without a model or with one.

    Syntax, names, types, shapes, claims, and that the operated model starts as the base model. A SPEC that is a folder
    is every .surg file below it.
    """
    from surgery.language.library import shipped
    from surgery.planning.check import check as findings_of
    from surgery.semantics.arguments import guard

    if explain:
        return explain_code(output, explain)
    if not specs:
        raise click.UsageError("Missing argument 'SPEC...'.")
    if output.as_json and form not in ("full", "json"):
        raise click.UsageError(f"--json and --output-format={form} are two forms.")
    skeleton, results = (skeleton_of(output, model) if model else None), {}
    for name in files_below(specs, shipped()):
        results[name] = findings = Collector()
        # One spec that does not parse must not keep the others from being checked.
        with guard(findings):
            read = opened(name, sets)
            with output.busy("checking"):
                findings.add(*findings_of(read, skeleton, prove=prove))
        output.diagnostics(findings.found, name)
    failed = [name for name, findings in results.items() if findings.errors or (strict and findings.found)]
    for name, findings in results.items():
        counts = [counted(len(part), noun)
                  for part, noun in ((findings.errors, "error"), (findings.warnings, "warning")) if part]
        if form == "full":
            output.say(f"{name}: {', '.join([*(['ok'] if name not in failed else []), *counts])}")
    output.data(specs=[{"spec": name, "ok": name not in failed} for name in results])
    if failed:
        raise SurgeryError(d for findings in results.values() for d in findings.found)
