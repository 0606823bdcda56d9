"""Commands that need a spec and no model: check, fmt, specs, show."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.inspecting import skeleton_of
from surgery.cli.options import PAIR, command, opened, sets, spec_argument, strict_option, trust_option
from surgery.cli.output import Output
from surgery.diagnostics import CODES, Collector, Diagnostic, SurgeryError, did_you_mean, fail
from surgery.files import SPEC_BYTES, read_bytes
from surgery.text import counted

if TYPE_CHECKING:
    from surgery.language.tree import Spec

# -------------------------------------------------------------------------------------------------------- check


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
    from surgery.semantics.arguments import guard

    found = Collector()
    with guard(found):
        spec = opened(name, sets)
        found.add(*_findings(output, spec, skeleton))
    output.diagnostics(found.found)
    return found


def _verdict(found: Collector, ok: bool) -> str:
    counts = [counted(len(part), noun) for part, noun in ((found.errors, "error"), (found.warnings, "warning")) if part]
    return ", ".join([*(["ok"] if ok else []), *counts])


def _findings(output: Output, spec: Spec, skeleton: Any) -> list[Diagnostic]:
    """What is wrong with a spec by itself, and on the model. What runs dense is told once: on the model's sizes."""
    from surgery.planning.check import check as checked

    with output.busy("checking"):
        found = checked(spec)
        if skeleton is None or any(d.severity == "error" for d in found):
            return found
        return [*(d for d in found if d.code != "fallback"), *_misfits(spec, skeleton)]


def _misfits(spec: Spec, skeleton: Any) -> tuple[Diagnostic, ...]:
    from surgery.planning.compile import compile
    from surgery.planning.figures import Report

    try:
        plan = compile(skeleton, spec)
    except SurgeryError as error:
        return error.diagnostics
    return *plan.warnings, *Report(plan).fallbacks


def _explain_code(output: Output, code: str) -> None:
    if code not in CODES:
        near = did_you_mean(code, CODES).capitalize()
        raise click.UsageError(f"No diagnostic has the code '{code}'. {near}".rstrip())
    output.say(f"{code}: {CODES[code]}")
    output.data(code=code, meaning=CODES[code])


# ---------------------------------------------------------------------------------------------------------- fmt


@command(click.argument("files", nargs=-1, required=True, metavar="FILE..."),
         click.option("--check", "only_check", is_flag=True,
                      help="Change nothing; exit with 1 if something would change."),
         click.option("--diff", is_flag=True, help="Change nothing; show what would change."),
         example="surgery fmt specs/*.surg --check")
def fmt(output: Output, files: tuple[str, ...], only_check: bool, diff: bool) -> None:
    """Format specs in place.

    A FILE `-` is read from stdin and written to stdout. A file with a syntax error is left alone.
    """
    from surgery.semantics.arguments import guard

    report, found = Collector(), {}
    for name in files:
        with guard(report):
            found[name] = _formatted(output, name, only_check or diff, diff)
    changed, unchanged = ([name for name, new in found.items() if new is which] for which in (True, False))
    output.diagnostics(report.found)
    if found:
        output.note(_summary(len(changed), len(unchanged), only_check or diff))
    output.data(changed=changed, unchanged=unchanged)
    report.raise_errors()
    if only_check and changed:
        raise click.exceptions.Exit(1)


def _summary(changed: int, unchanged: int, dry: bool) -> str:
    done = "would be changed" if dry else "changed"
    return f"{counted(changed, 'file')} {done}, {counted(unchanged, 'file')} left unchanged"


def _formatted(output: Output, name: str, dry: bool, diff: bool) -> bool:
    """Format one file; whether its text changed."""
    from surgery.language.formatter import format_text
    from surgery.runtime.atomic_folders import replacing_file

    title = "<stdin>" if name == "-" else name
    before = _text(name, title)
    after = format_text(before, title)
    if diff:
        output.raw("".join(_difference(title, before, after)))
    elif name == "-" and not dry:
        output.raw(after)
    elif dry and after != before:
        output.say(f"{title} would be changed")
    elif after != before:
        with replacing_file(Path(name)) as new:
            new.write_bytes(after.encode("utf-8"))
    return after != before


def _difference(name: str, before: str, after: str) -> Iterator[str]:
    lines = (text.splitlines(keepends=True) for text in (before, after))
    for line in difflib.unified_diff(*lines, fromfile=name, tofile=f"{name} (formatted)"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _text(name: str, title: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else read_bytes(Path(name), SPEC_BYTES, any_kind=True)
        return data.decode("utf-8")
    except OSError as error:
        raise fail("missing-file", f"cannot read {title}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise fail("missing-file", f"cannot read {title}: byte {error.start} is not UTF-8") from None


# -------------------------------------------------------------------------------------------------------- specs


@command(example="surgery specs")
def specs(output: Output) -> None:
    """List the specs that ship, one a line.

    With what each trains on a linear layer [1024, 4096], how it runs (on activations, with a built weight, or dense),
    and what a training step costs by the cost model, as a multiple of the frozen layer's.
    """
    from surgery.planning.shipped_specs import catalogue

    entries = catalogue()
    rows = [("spec", "trains", "runs", "step", "formula"), *map(_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        output.say("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())
    output.data(specs=[entry.to_json() for entry in entries])


def _row(entry: Any) -> tuple[str, ...]:
    trains = f"{entry.parameters:,}" if entry.parameters is not None else ""
    step = f"{entry.step_ratio:.2f} x" if entry.step_ratio is not None else ""
    return entry.name, trains, entry.program, step, entry.description


# --------------------------------------------------------------------------------------------------------- show


@command(spec_argument, sets,
         click.option("--emit", type=click.Choice(["formula", "spec", "json", "python", "ir"]), default="formula",
                      show_default=True,
                      help="What to show: the formula with parameter shapes, the spec as text, as JSON or "
                      "as Python, or the compiler's expressions."),
         click.option("--program", is_flag=True,
                      help="Show the program that runs, its cost, and what it was chosen over."),
         click.option("--tokens", type=click.IntRange(1),
                      help="How many tokens a step has, for --program. Default: 1024."),
         click.option("--shape", type=PAIR, metavar="OUT,IN",
                      help="The weight's shape, for --program. Default: 1024,4096."),
         example="surgery show sora --set rank=8")
def show(output: Output, spec: str, sets: tuple[str, ...], emit: str, program: bool, tokens: int | None,
         shape: tuple[int, int] | None) -> None:
    """Show the formula of a spec, or another form."""
    from surgery.language.library import inlined

    if (tokens or shape) and not program:
        raise click.UsageError("--tokens and --shape go with --program.")
    resolved = inlined(opened(spec, sets))
    if program:
        from surgery.cli.program_view import shown

        return shown(output, resolved, *(shape or (1024, 4096)), tokens or 1024)
    text = _EMITTED[emit](resolved)
    output.raw(text if text.endswith("\n") else f"{text}\n")
    output.data(spec=resolved.model_dump(mode="json"), emit=emit, text=text)


def _pages(spec: Spec) -> str:
    """The signature, then each target as text and as equations (of a library: what it defines)."""
    from surgery.planning.formulas import formula_lines, formulas
    from surgery.semantics.arguments import signature

    heads = [signature(each) for each in ((spec,) if spec.name else spec.definitions)]
    pages = ["\n".join([_block(target), *(f"  {line}" for line in formula_lines(target, formula))])
             for target, formula in formulas(spec)]
    return "\n\n".join(["\n".join(heads), *pages])


def _programs(spec: Spec) -> str:
    from surgery.planning.formulas import formulas, program_lines

    return "\n\n".join("\n".join([_block(target), *(f"  {line}" for line in program_lines(formula.weight))])
                       for target, formula in formulas(spec))


def _block(target: Any) -> str:
    from surgery.language.tree import Spec

    return Spec(targets=(target,)).to_surg().strip()


def _python(spec: Spec) -> str:
    from surgery.language.to_python import python_text

    return python_text(spec)


_EMITTED = {"formula": _pages, "ir": _programs, "spec": lambda spec: spec.to_surg(),
            "json": lambda spec: spec.model_dump_json(indent=2), "python": _python}

COMMANDS = (check, fmt, specs, show)
