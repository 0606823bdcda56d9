"""`surgery check`: what is wrong with specs, without a model or with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

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
from surgery.diagnostics import Collector, SurgeryError, fail
from surgery.text import counted

if TYPE_CHECKING:
    from torch import nn


@command(click.argument("specs", nargs=-1, metavar="SPEC..."),
         click.option("--model", help="Check against this model too (its configuration is enough); \"\" for none."),
         sets, strict_option, trust_option, revision_option,
         click.option("--prove", is_flag=True,
                      help="Compute that every program gives its formula's values and gradients, even where the "
                           "rest needs no numbers (loads torch)."),
         click.option("--fix", is_flag=True, help="Write names as they were surely meant into the files."),
         click.option("--watch", is_flag=True, help="Check again whenever a file changes."),
         click.option("--output-format", "form", type=click.Choice(FORMATS), default="full", show_default=True,
                      help="How to show what is wrong: with the source, a line each, as GitHub's annotations, or as "
                           "one object of SARIF or JSON."),
         click.option("--explain", metavar="CODE", help="The same as `surgery help CODE`."),
         example="surgery check specs/sora.surg --model demo:llama --set rank=8",
         as_project=False)  # it asks itself, again at every change that it sees
def check(output: Output, specs: tuple[str, ...], model: str | None, sets: tuple[str, ...], strict: bool,
          prove: bool, fix: bool, watch: bool, form: str, explain: str | None) -> None:
    """Check specs, without a model or with one.

    Syntax, names, types, shapes, claims, and that the operated model starts as the base model. A SPEC that is a folder
    is every .surg file below it. The nearest `surgery.toml` says which specs and which model where the line does not,
    and how severe a warning is.
    """
    from surgery.files import changes
    from surgery.settings import settings

    if explain:
        return explain_code(output, explain)
    project = settings()
    specs, model = specs or project.paths, project.model if model is None else model
    if not specs:
        raise click.UsageError("Missing argument 'SPEC...'.")
    if output.as_json and form not in ("full", "json"):
        raise click.UsageError(f"--json and --output-format={form} are two forms.")
    if watch and output.is_one_object:
        raise click.UsageError("--watch shows results as they come, and not one object.")
    skeleton = skeleton_of(output, model) if model else None
    if not watch:
        return _checked(output, _files(specs, fix), skeleton, sets, strict, prove, fix)
    for _ in changes(lambda: _read_by(_files(specs, fix))):
        output.about.clear()  # what was told of the files as they were may be told again
        try:
            _checked(output, _files(specs, fix), skeleton, sets, strict, prove, fix)
        except SurgeryError as error:
            output.diagnostics(error.diagnostics)


def _checked(output: Output, names: list[str], skeleton: nn.Module | None, sets: tuple[str, ...], strict: bool,
             prove: bool, fix: bool) -> None:
    """One run over the files. Raises: SurgeryError, where one of them is wrong."""
    from surgery.planning.check import check as findings_of
    from surgery.semantics.arguments import guard
    from surgery.settings import settings

    project, results = settings(), {}
    for name in names:
        found, results[name] = Collector(), Collector()
        # One spec that does not parse must not keep the others from being checked.
        with guard(found):
            if fix:
                _mended(output, name)
            read = opened(name, sets)
            with output.busy("checking"):
                found.add(*findings_of(read, skeleton, prove=prove))
        results[name].add(*project.applied(found.found))
        output.diagnostics(results[name].found, name)
    _summary(output, results, strict)


def _summary(output: Output, results: Mapping[str, Collector], strict: bool) -> None:
    failed = [name for name, findings in results.items() if findings.errors or (strict and findings.found)]
    for name, findings in results.items():
        counts = [counted(len(part), noun)
                  for part, noun in ((findings.errors, "error"), (findings.warnings, "warning")) if part]
        if output.format == "full":
            output.say(f"{name}: {', '.join([*(['ok'] if name not in failed else []), *counts])}")
    output.data(specs=[{"spec": name, "ok": name not in failed} for name in results])
    if failed:
        raise SurgeryError(d for findings in results.values() for d in findings.found)


def _files(specs: tuple[str, ...], fix: bool) -> list[str]:
    """The files and shipped names that are meant. Raises: SurgeryError (bad-value), where one is to be changed that is
    no file of the user's."""
    from surgery.language.library import shipped

    names = files_below(specs, shipped())
    for name in names if fix else ():
        if name in shipped() and not os.path.isfile(name):
            raise fail("bad-value", f"`{name}` ships with surgery, and is not changed",
                       helps=(f"surgery init mine --from {name} writes a spec of your own that begins with it",))
    return names


def _read_by(names: list[str]) -> list[str]:
    """The files that a check of these reads: those that they use too, and the project's settings."""
    from surgery.language.library import locate, read, used
    from surgery.settings import found_file

    files = [str(path) for path in (found_file(),) if path]
    for name in names:
        try:
            path = locate(name)
            files.append(str(path))
            files += [spec.span.source.name for spec in used(read(path)) if spec.span]
        except SurgeryError:
            pass  # the check itself tells it
    return files


def _mended(output: Output, name: str) -> None:
    """Write into a file what its names were surely meant to be, and say so."""
    from pathlib import Path

    from surgery.files import SPEC_BYTES, read_bytes
    from surgery.planning.fixes import fixed
    from surgery.runtime.atomic_folders import replacing_file

    try:
        text = read_bytes(Path(name), SPEC_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return  # reading it as a spec tells why
    mended, changes = fixed(text, name)
    if mended != text:
        with replacing_file(Path(name)) as new:
            new.write_bytes(mended.encode("utf-8"))
    for change in changes:
        output.say(f"{change.place}: `{change.old}` is now `{change.new}`")
