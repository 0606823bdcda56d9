"""How near to the limit a step is: Surgery's beside the same mathematics written by hand, for one model and no other.

    python examples/limit.py                        # 4 Llama layers, 4 x 128 tokens, in float32
    python examples/limit.py --rounds 20 --tokens 4,512

By hand there are no checks, no switches and no set-up that is asked for again: a function with the products that
the formula needs and no more, its sums written into what is there. What that costs over the frozen model is what the
machine asks for the method. Both are held to each other first, values and gradients, and have the same parameters. All
take turns in one process; told are medians of the ratios to the frozen model's time in the same round, with half the
distance between their quartiles.
"""

from __future__ import annotations

import argparse
import warnings
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from transformers import logging

import surgery
from surgery.experiments.bench import Bench, Subject
from surgery.experiments.timing import seconds, sharing, turned
from surgery.models.demo import load_demo

RANKS, SCALE = {"lora": 8, "pre_diag": 16, "dora": 16}, 2.0  # as they ship
PATTERN = "**.{q,k,v,up,down}_proj"
NONE = torch.empty(0)


class Update(torch.autograd.Function):
    """y = x Wᵀ + s x Aᵀ Bᵀ: [tokens, in] -> [tokens, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        h = x @ A.T
        ctx.save_for_backward(x, W, A, B, h)
        return (x @ W.T).addmm_(h, B.T, alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (x, W, A, B, h) = grads, ctx.saved_tensors
        back = (g @ B).mul_(SCALE)
        return (g @ W).addmm_(back, A), None, back.T @ x, (h.T @ g).T.mul(SCALE)


class Gain(torch.autograd.Function):
    """y = d (x Wᵀ) + s x Aᵀ Bᵀ, or with `both` d (x Wᵀ + s x Aᵀ Bᵀ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, d: Tensor, both: bool) -> Tensor:
        h, z = x @ A.T, x @ W.T
        z = z.addmm_(h, B.T, alpha=SCALE) if both else z
        ctx.save_for_backward(x, W, A, B, d, h, z)
        ctx.both = both
        return z * d if both else (z * d).addmm_(h, B.T, alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (x, W, A, B, d, h, z) = grads, ctx.saved_tensors
        scaled = g * d
        inner = scaled if ctx.both else g
        back = (inner @ B).mul_(SCALE)
        return ((scaled @ W).addmm_(back, A), None, back.T @ x, (h.T @ inner).T.mul(SCALE),
                torch.linalg.vecdot(g, z, dim=0), None)


class ByHand(nn.Module):
    """One linear layer, [out, in] without bias, with `lora`, `pre_diag` or `dora` in it."""

    def __init__(self, layer: nn.Linear, method: str, A: Tensor, B: Tensor, gain: Tensor = NONE):
        super().__init__()
        self.layer, self.method, self.A, self.B, self.gain = layer, method, A, B, gain
        self.squares = layer.weight.square().sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        rows, W = x.reshape(-1, x.shape[-1]), self.layer.weight
        if self.method == "lora":
            y = Update.apply(rows, W, self.A, self.B)
        else:
            gain = self.gain / self._norms(W) if self.method == "dora" else self.gain
            y = Gain.apply(rows, W, self.A, self.B, gain, self.method == "dora")
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _norms(self, W: Tensor) -> Tensor:
        """Of the rows of W + s B A, which DoRA takes for a constant: ‖w‖² + (2 s w Aᵀ + s² b A Aᵀ) b."""
        A, B = self.A, self.B
        cross = (W @ A.T).mul_(2 * SCALE).addmm_(B, A @ A.T, alpha=SCALE**2)
        return torch.linalg.vecdot(cross, B).add_(self.squares).sqrt_()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=8, help="at least 2, for a spread")
    asked.add_argument("--tokens", default="4,128", help="batch and length")
    options = asked.parse_args()
    if options.rounds < 2:
        asked.error("--rounds must be at least 2")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = load_demo("llama-bench").requires_grad_(False)
    batch, length = map(int, options.tokens.split(","))
    bench = Bench(model, {}, (batch, length))
    subjects = {"frozen": bench.frozen}
    for method, rank in RANKS.items():
        spec = surgery.load(method, rank=rank, alpha=SCALE * rank, dropout=0).retarget(PATTERN)
        subjects[method] = Subject(sharing(model), bench.inputs)
        surgeon = surgery.apply(subjects[method].model, spec, check=False)
        subjects[f"{method} by hand"] = Subject(by_hand(sharing(model), method, subjects[method].model), bench.inputs)
        held_to_each_other(subjects[method], subjects[f"{method} by hand"], surgeon)
    for number in range(-1, options.rounds):
        for _, subject in turned([*subjects.items()], number):
            taken = seconds(subject.step, torch.device("cpu"))
            subject.times["step"] += [taken] * (number >= 0)  # the first round warms up
    for name, subject in subjects.items():
        ratios = [own / one for own, one in zip(subject.times["step"], bench.frozen.times["step"])]
        low, _, high = quantiles(ratios, n=4)
        print(f"{name:18} {median(ratios):.3f} ± {(high - low) / 2:.3f}")


def by_hand(model: nn.Module, method: str, operated: nn.Module) -> nn.Module:
    """The model with layers by hand, which have the parameters of the operated one."""
    for name, module in [*operated.named_modules()]:
        adapter = getattr(module, "weight_surgery", None)
        if adapter is not None:
            own = {key.split(".")[-1]: tensor for key, tensor in adapter.named_parameters()}
            A, B, layer = own.pop("A"), own.pop("B"), model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, ByHand(layer, method, A, B, *own.values()))
    return model


def held_to_each_other(ours: Subject, hand: Subject, surgeon: surgery.Surgeon) -> None:
    """Both give the same outputs and gradients, at parameters that are not where they start."""
    for tensor in surgeon.parameters():
        tensor.data += 0.02 * torch.randn_like(tensor)
    found = []
    for subject in (ours, hand):
        subject.model.train()
        subject.step()
        found.append([subject.forward().detach(), *(tensor.grad for tensor in surgeon.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


if __name__ == "__main__":
    main()
