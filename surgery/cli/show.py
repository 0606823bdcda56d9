"""`surgery show`: a spec as formulas, programs, Python, JSON or text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import DTYPES, PAIR, command, opened, sets, spec_argument
from surgery.cli.output import Output

if TYPE_CHECKING:
    from surgery.language.tree import Spec

_STAGES = ("ir", "normal-form", "cheapest", "lowered")  # as `codegen.compiled` has them, which takes long to import


@command(spec_argument, sets,
         click.option("--emit", type=click.Choice(["formula", "spec", "json", "python", *_STAGES]), default="formula",
                      show_default=True,
                      help="What to show: the formula with parameter shapes, the spec as text, as JSON or as "
                      "Python, or the compiler's expressions: as written (ir), in normal form, in the cheapest form, "
                      "over activations (lowered)."),
         click.option("--program", is_flag=True,
                      help="Show the program that runs, its cost, and what it was chosen over."),
         click.option("--tokens", type=click.IntRange(1),
                      help="How many tokens a step has, for --program and --emit lowered. Default: 1024."),
         click.option("--shape", type=PAIR, metavar="OUT,IN",
                      help="The weight's shape, for --program and the compiler's expressions. "
                      "Default: 1024,4096, or another that fits; ir and normal-form are of any shape."),
         click.option("--device", type=click.Choice(["cpu", "cuda"]),
                      help="The device that --program chooses for. Default: cpu."),
         click.option("--dtype", type=click.Choice(DTYPES), help="The dtype of the weight there. Default: float32."),
         example="surgery show sora --set rank=8")
def show(output: Output, spec: str, sets: tuple[str, ...], emit: str, program: bool, tokens: int | None,
         shape: tuple[int, int] | None, device: str | None, dtype: str | None) -> None:
    """Show the formula of a spec, or another form."""
    from surgery.language.library import inlined

    if shape and not (program or emit in _STAGES):
        raise click.UsageError("--shape goes with --program, or with --emit and one of the compiler's expressions.")
    if tokens and not (program or emit == "lowered"):
        raise click.UsageError("--tokens goes with --program or --emit lowered.")
    if (device or dtype) and not program:
        raise click.UsageError("--device and --dtype go with --program.")
    resolved = inlined(opened(spec, sets))
    if program:
        from surgery.cli.program_view import shown

        return shown(output, resolved, shape, tokens or 1024, (device or "cpu", dtype or "float32"))
    text = _stage(resolved, emit, shape, tokens or 1024) if emit in _STAGES else _EMITTED[emit](resolved)
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


def _stage(spec: Spec, stage: str, shape: tuple[int, int] | None, tokens: int) -> str:
    """Each target with its expressions as they are after a stage of the compiler."""
    from surgery.codegen.compiled import Compiled
    from surgery.planning.trial_sizes import shown_at
    from surgery.semantics.resolved_spec import resolved

    # rules of the normal form hold for any size; what is cheapest depends on the sizes
    any_size = shape is None and stage in ("ir", "normal-form")
    formulas = (resolved(spec).formulas() if any_size
                else [(trial.target, trial.formula) for trial in shown_at(resolved(spec), shape)])
    lines = [(target, Compiled.supposed(formula, target.kind).lines(stage, tokens)) for target, formula in formulas]
    return "\n\n".join("\n".join([_block(target), *(f"  {line}" for line in own)]) for target, own in lines)


def _block(target: Any) -> str:
    from surgery.language.tree import Spec

    return Spec(targets=(target,)).to_surg().strip()


def _python(spec: Spec) -> str:
    from surgery.language.to_python import python_text

    return python_text(spec)


_EMITTED = {"formula": _pages, "spec": lambda spec: spec.to_surg(),
            "json": lambda spec: spec.model_dump_json(indent=2), "python": _python}
