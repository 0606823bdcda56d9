"""What `show --program` prints: each target's program on a weight of one shape, its cost, what it was chosen over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from surgery.cli.output import Output, aligned
from surgery.codegen.compiled import Compiled
from surgery.codegen.cost_model import frozen_last, one_pass
from surgery.codegen.program_text import program_text, step_text
from surgery.language.tree import Spec
from surgery.planning.cost_estimates import FLOAT, Estimate, amount
from surgery.planning.machines import machine
from surgery.planning.trial_sizes import shown_at
from surgery.semantics.resolved_spec import resolved


def shown(output: Output, spec: Spec, shape: tuple[int, int] | None, tokens: int, on: tuple[str, str]) -> None:
    """Print the programs of a spec, as they are chosen `on` a device for a dtype. Raises: SurgeryError where the shape
    does not fit."""
    trials = shown_at(resolved(spec), shape)
    estimates = [Estimate(Compiled.supposed(trial.formula, trial.target.kind), tokens, machine=machine(*on))
                 for trial in trials]
    text = "\n\n".join("\n".join([Spec(targets=(trial.target,)).to_surg().strip(), *_page(estimate, on)])
                       for trial, estimate in zip(trials, estimates))
    output.raw(f"{text}\n")
    output.data(spec=spec.model_dump(mode="json"), emit="program", text=text,
                programs=[{"shape": [trial.out, trial.in_], "tokens": tokens, "device": on[0], "dtype": on[1],
                           "candidates": _rows(e)} for trial, e in zip(trials, estimates)])


def _page(estimate: Estimate, on: tuple[str, str]) -> Iterator[str]:
    """The costs, then the code in training and in evaluation."""
    out, in_ = estimate.sides
    where = "" if on == ("cpu", "float32") else f" on {on[0]} in {on[1]}"
    step = f"a step of {estimate.tokens:,} tokens{where}"
    yield f"  for a {estimate.kind.word} weight [{out}, {in_}], {step}, by estimate:"
    frozen = estimate.frozen
    lines = [["", "set-up", "body", "moved in float32", "x frozen"],
             *([r["strategy"], amount(r["setup_flops"], "FLOP"), amount(r["body_flops"], "FLOP"),
                amount(r["bytes_moved"], "B"), f"{r['step_ratio']:.2f}"] for r in _rows(estimate)),
             ["the frozen layer", "-", amount(frozen.flops, "FLOP"), amount(FLOAT * frozen.moved, "B"), "1.00"]]
    head, first, *rest = aligned(lines)
    # The candidates come cheapest first, and the first is the one that runs.
    yield from (f"    {line}" for line in (head, f"{first}  runs", *rest))
    runs, at_rest = (replace(estimate, training=training).candidates[0] for training in (True, False))
    # A set-up that has nothing to compute is a function too, which says nothing to a reader.
    train, evaluate = ([text for text in program_text(plan).split("\n\n") if not text.endswith(":\n    return ()")]
                       for plan in (runs, at_rest))
    yield from ("", "  in training", *_code(train))
    # Written-out gradients exist where one node of autograd runs the whole body.
    ways = frozen_last(on[0]), one_pass(on[0])
    node = step_text(runs.written, runs.needs, *ways) if estimate.kind.is_product else None
    if node is not None:
        yield from ("\n  and the body in training, as one node of autograd", *_code([node.source]))
    others = [text for text in evaluate if text not in train]
    yield f"\n  in evaluation {'this differs' if others else 'the same'}; inside `serving()` the set-up is made once"
    yield from _code(others)


def _code(functions: Iterable[str]) -> Iterator[str]:
    return (f"    {line}".rstrip() for line in "\n\n".join(functions).splitlines())


def _rows(estimate: Estimate) -> list[dict[str, Any]]:
    """What every candidate costs: FLOP of set-up and body, bytes moved in float32, a step as a multiple of frozen."""
    costs = [(candidate, candidate.cost(estimate.tokens)) for candidate in estimate.candidates]
    return [{"strategy": candidate.strategy, "setup_flops": cost.setup_flops, "body_flops": cost.body_flops,
             "bytes_moved": FLOAT * cost.moved, "step_ratio": estimate.ratio(candidate)}
            for candidate, cost in costs]
