"""What `show --program` prints: each target's program on a weight of one shape, its cost, what it was chosen over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from surgery.cli.output import Output, aligned
from surgery.codegen.candidates import Candidate
from surgery.codegen.compiled import Compiled
from surgery.codegen.program_text import program_text, step_text
from surgery.language.tree import Spec
from surgery.planning.cost_estimates import FLOAT, Estimate, amount
from surgery.semantics.resolved_spec import resolved

FIRST = {"layer": 0, "depth": 0.0}  # where a target that asks for it stands


def shown(output: Output, spec: Spec, out: int, in_: int, tokens: int) -> None:
    """Print the programs of a spec. Raises: SurgeryError where the shape does not fit."""
    estimates = [(target, Estimate(Compiled.supposed(formula, target.kind), tokens))
                 for target, formula in resolved(spec).formulas(out, in_, FIRST)]
    text = "\n\n".join("\n".join([Spec(targets=(target,)).to_surg().strip(), *_page(estimate)])
                       for target, estimate in estimates)
    output.raw(f"{text}\n")
    output.data(spec=spec.model_dump(mode="json"), emit="program", text=text,
                programs=[{"shape": [out, in_], "tokens": tokens, "candidates": _rows(e)} for _, e in estimates])


def _page(estimate: Estimate) -> Iterator[str]:
    """The costs, then the code in training and in evaluation."""
    out, in_ = estimate.sides
    yield f"  for a {estimate.kind.word} weight [{out}, {in_}], a step of {estimate.tokens:,} tokens, by estimate:"
    yield from (f"    {line}" for line in _costs(estimate))
    runs, at_rest = (estimate.compiled.candidates(training, estimate.tokens)[0] for training in (True, False))
    train, evaluate = map(_functions, (runs, at_rest))
    yield from ("", "  in training", *_code(train), *_gradients(estimate, runs))
    others = [text for text in evaluate if text not in train]
    rest = "this differs" if others else "the rest is the same"
    yield f"\n  in evaluation the set-up is kept until a tensor changes, and {rest}"
    yield from _code(others)


def _functions(plan: Candidate) -> list[str]:
    """The functions of a program that compute something."""
    return [text for text in program_text(plan).split("\n\n") if not text.endswith(":\n    return ()")]


def _code(functions: Iterable[str]) -> Iterator[str]:
    return (f"    {line}".rstrip() for line in "\n\n".join(functions).splitlines())


def _gradients(estimate: Estimate, plan: Candidate) -> Iterator[str]:
    """The body with its gradients written out, where one node of autograd runs it."""
    text = step_text(plan.written, plan.needs) if estimate.kind.is_product else None
    if text is not None:
        yield "\n  and the body in training, as one node of autograd"
        yield from _code([text.source])


# -------------------------------------------------------------------------------------------------------- costs


def _rows(estimate: Estimate) -> list[dict[str, Any]]:
    return [_row(estimate, candidate) for candidate in estimate.candidates]


def _row(estimate: Estimate, candidate: Candidate) -> dict[str, Any]:
    cost = candidate.cost(estimate.tokens)
    return {"strategy": candidate.strategy, "setup_flops": cost.setup_flops, "body_flops": cost.body_flops,
            "bytes_moved": FLOAT * cost.moved, "step_ratio": estimate.ratio(candidate)}


def _costs(estimate: Estimate) -> list[str]:
    """A line for each program, the one that runs first, and the frozen layer's."""
    frozen = estimate.frozen
    lines = [["", "set-up", "body", "moved in float32", "x frozen"],
             *([r["strategy"], amount(r["setup_flops"], "FLOP"), amount(r["body_flops"], "FLOP"),
                amount(r["bytes_moved"], "B"), f"{r['step_ratio']:.2f}"] for r in _rows(estimate)),
             ["the frozen layer", "-", amount(frozen.flops, "FLOP"), amount(FLOAT * frozen.moved, "B"), "1.00"]]
    head, first, *rest = aligned(lines)
    return [head, f"{first}  runs", *rest]
