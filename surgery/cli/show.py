"""`surgery show`: a spec as formulas, programs, Python, JSON or text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import PAIR, command, opened, sets, spec_argument
from surgery.cli.output import Output

if TYPE_CHECKING:
    from surgery.language.tree import Spec


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
