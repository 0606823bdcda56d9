"""The entropy of a rank-r update against conditioned ones of higher rank: the setting of Chang et al.'s theorem 1.

    python examples/entropy/entropy.py

A random W [256, 192]. LoRA's update of rank 8 has the most even spectrum that there can be, all its singular values
equal, so that its entropy is log 8. The same update is then conditioned by gains, before (Pre-Diag) and after
(Post-Diag), further and further from 1; and by one gain alone. The README beside this says what follows from what.
"""

import math

import torch
from torch import Tensor

from surgery.analysis.spectra import Spectrum

OUT, IN, RANK = 256, 192, 8
SPREADS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)


def even_update(generator: torch.Generator) -> Tensor:
    """U Vᵀ with orthonormal columns: rank 8, every singular value 1."""
    sides = [torch.randn(n, RANK, generator=generator, dtype=torch.float64) for n in (OUT, IN)]
    u, v = (torch.linalg.qr(side).Q for side in sides)
    return u @ v.T


def updates(spread: float, seed: int = 0) -> dict[str, Tensor]:
    """ΔW = W' - W of each method, for gains d = 1 + spread * noise."""
    generator = torch.Generator().manual_seed(seed)
    ba = even_update(generator)
    w = torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / math.sqrt(IN)
    d = 1 + spread * torch.randn(OUT, 1, generator=generator, dtype=torch.float64)
    one = torch.ones_like(d)
    one[0] += 100 * spread
    return {"lora": ba, "pre_diag": d * w + ba - w, "post_diag": d * (w + ba) - w, "one gain": one * w + ba - w}


def parts(p: tuple[float, ...], r: int = RANK) -> dict[str, float]:
    """The chain rule: H(p) = h(t) + (1 - t) H(head) + t H(tail), t being what the tail beyond the first r holds."""
    t = math.fsum(p[r:])
    h = entropy((t, 1 - t))
    return {"t": t, "h": h, "head": entropy(scaled(p[:r])), "tail": entropy(scaled(p[r:]))}


def scaled(p: tuple[float, ...]) -> tuple[float, ...]:
    total = math.fsum(p)
    return tuple(x / total for x in p)


def entropy(p: tuple[float, ...]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def main() -> None:
    print(f"log {RANK} = {math.log(RANK):.3f}, log {min(OUT, IN)} = {math.log(min(OUT, IN)):.3f}\n")
    print("gains      method      rank  entropy  stable rank  beyond 8")
    for spread in SPREADS:
        for method, delta in updates(spread).items():
            if (method == "lora") == (spread == 0):  # without gains all are LoRA, and LoRA is always this one
                found = Spectrum.of(delta)
                print(f"1 ± {spread:<6g} {method:10} {found.numerical_rank:5} {found.entropy:8.3f} "
                      f"{found.stable_rank:12.2f}{parts(found.p)['t']:9.1%}")


if __name__ == "__main__":
    main()
