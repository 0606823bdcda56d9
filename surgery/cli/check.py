"""`surgery check`: what is wrong with specs, without a model or with one."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.options import command, opened, sets, skeleton_of, strict_option, trust_option
from surgery.cli.output import Output
from surgery.diagnostics import CODES, Collector, SurgeryError, did_you_mean
from surgery.text import counted


@command(click.argument("specs", nargs=-1, metavar="SPEC..."),
         click.option("--model", help="Check against this model too (its configuration is enough)."), sets,
         strict_option, trust_option,
         click.option("--explain", metavar="CODE", help="Say what a diagnostic's code means."),
         example="surgery check specs/sora.surg --model demo:llama --set rank=8")
def check(output: Output, specs: tuple[str, ...], model: str | None, sets: tuple[str, ...], strict: bool,
          explain: str | None) -> None:
    """Check specs, without a model or with one.

    Syntax, names, types, shapes, claims, and that the operated model starts as the base model.
    """
    if explain:
        return _explain_code(output, explain)
    if not specs:
        raise click.UsageError("Missing argument 'SPEC...'.")
    skeleton = skeleton_of(output, model) if model else None
    results = {spec: _checked(output, spec, sets, skeleton) for spec in specs}
    failed = [spec for spec, found in results.items() if found.errors or (strict and found.found)]
    for spec, found in results.items():
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
    output.diagnostics(found.found)
    return found


def _verdict(found: Collector, ok: bool) -> str:
    counts = [counted(len(part), noun) for part, noun in ((found.errors, "error"), (found.warnings, "warning")) if part]
    return ", ".join([*(["ok"] if ok else []), *counts])


def _explain_code(output: Output, code: str) -> None:
    if code not in CODES:
        near = did_you_mean(code, CODES).capitalize()
        raise click.UsageError(f"No diagnostic has the code '{code}'. {near}".rstrip())
    output.say(f"{code}: {CODES[code]}")
    output.data(code=code, meaning=CODES[code])
