"""A dropout mask that is a number, from which its draws are made again wherever they are needed: no memory, no pass.

Takes an activation and a chance; gives a tensor of one int64: the chance in 2^-24 above, a seed in its low 39 bits. An
entry's own draw is a word of Philox, whose counter is its place. Promises: what the forward pass has dropped the
backward pass drops again, and `kernels_triton`, which draws the same words, drops the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7  # of Philox: the fewest that pass every test of BigCrush (Salmon et al., 2011)
SEED_BITS = 39  # the low ones of a number; above them is the chance
_LOW = 2**32 - 1


def drawn_number(a: Tensor, p: float) -> Tensor:
    """A new number for a chance, from torch's generator of the device of a."""
    chance = min(round(p * 2**24), 2**24 - 2)
    return torch.randint(chance << SEED_BITS, chance + 1 << SEED_BITS, (), dtype=torch.int64, device=a.device)


def dropped(number: Tensor, shape: tuple[int, ...]) -> Tensor:
    """True for each entry that is dropped, drawn again: [*shape]."""
    height, width = (shape[0] if len(shape) == 2 else torch.Size(shape[:-1]).numel()), shape[-1]
    counter = torch.arange((width + 3) // 4, device=number.device)
    rows = torch.arange(height, device=number.device)[:, None].expand(-1, len(counter))
    zeros = torch.zeros_like(rows)
    seed = number & ((1 << SEED_BITS) - 1)
    words = torch.stack(_philox([counter.expand_as(rows), rows, zeros, zeros], seed), -1).flatten(-2)
    return ((words[:, :width] >> 8) < (number >> SEED_BITS)).view(shape)


def _philox(c: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Four words of 32 bits for each counter of four, in int64, whose products wrap around as they should."""
    k, key = seed & _LOW, seed >> 32
    for _ in range(ROUNDS):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) & _LOW ^ c[1] ^ k, b & _LOW, (a >> 32) & _LOW ^ c[3] ^ key, a & _LOW]
        k, key = (k + 0x9E3779B9) & _LOW, (key + 0xBB67AE85) & _LOW
    return c
