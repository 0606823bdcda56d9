"""What adapters on a mixture of experts cost, beside PEFT's LoRA by `target_parameters`, in one run.

    python examples/experts.py                      # a Qwen3-MoE of 2 layers, 16 experts of which a token chooses 4
    python examples/experts.py --hidden 512 --rounds 5

Adapters stand on the experts alone. Told as multiples of the base model's: the processor's time of a training step
(512 tokens, forward and backward), of one decoded token, and of one inside `surgeon.serving()`, each the median of the
rounds with the least and the most; all take turns in every round. And the memory that a step takes at its peak.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

import surgery
from surgery.experiments.timing import peak_bytes, sharing, turned

SPECS = {"lora": {"rank": 8, "dropout": 0}, "sora": {}, "dora": {"rank": 8, "dropout": 0}, "pre_diag": {}}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CPU = torch.device("cpu")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--hidden", type=int, default=1024)
    asked.add_argument("--rounds", type=int, default=3)
    options = asked.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = base(options.hidden)
    models, surgeons = {"base": model}, {}
    for name, values in SPECS.items():
        models[name] = sharing(model, [])
        surgeons[name] = surgery.apply(models[name], surgery.load(name, **values).retarget("**.experts.*"), check=False)
    models["PEFT's LoRA"] = peft.get_peft_model(sharing(model, []), peft.LoraConfig(
        r=8, target_modules=[], target_parameters=EXPERTS))
    ids = torch.randint(0, model.config.vocab_size, (4, 128))
    steps = rounds({name: lambda m=each: step(m.train(), ids) for name, each in models.items()}, options.rounds)
    tokens = rounds({name: decoder(each.eval(), ids[:1]) for name, each in models.items()}, 3 * options.rounds)
    with ExitStack() as served:
        for surgeon in surgeons.values():
            served.enter_context(surgeon.serving())
        serving = rounds({name: decoder(models[name], ids[:1]) for name in ("base", *surgeons)}, 3 * options.rounds)
    print(f"{'':12}  {'a step':18}  {'a token':18}  {'serving':18}  memory of a step")
    for name, each in models.items():
        peak = peak_bytes(lambda m=each: step(m.train(), ids), CPU)
        print(f"{name:12}  {told(steps, name):18}  {told(tokens, name):18}  {told(serving, name):18}  "
              f"{peak / 1e6:.0f} MB")


def base(hidden: int) -> Qwen3MoeForCausalLM:
    """The model, frozen, whose embeddings ask for a gradient, so that a step passes every layer in all models alike."""
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=hidden // 8, moe_intermediate_size=3 * hidden // 8, num_experts=16, num_experts_per_tok=4))
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_() if
                                                       torch.is_grad_enabled() else y)
    return model


def step(model: nn.Module, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()


def decoder(model: Any, ids: Tensor) -> Callable[[], None]:
    """One further token after those of `ids`, which are in the cache."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def token() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return token


def rounds(calls: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """The processor's seconds of each call in each round, in which all have their turn, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, count):
        for name, call in turned([*calls.items()], number):
            begin = time.process_time()
            call()
            times[name] += [time.process_time() - begin] * (number >= 0)
    return times


def told(times: dict[str, list[float]], name: str) -> str:
    if name not in times:
        return "-"
    ratios = sorted(own / one for own, one in zip(times[name], times["base"]))
    return f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


if __name__ == "__main__":
    main()
