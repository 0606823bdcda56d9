"""What PEFT's layers and ours are compared on: for each row of `surgery.peft.table.methods` its configurations, and how
closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft_pair import LAYERS, Layer, full, resolve

from surgery.peft.table.method import Config, Method
from surgery.peft.table.methods import METHODS

EXACT = 1e-10
# PEFT computes these, or what they rest on, in float32, whatever the layer's own dtype.
SINGLE = dict.fromkeys(("c3a", "delora", "fourierft", "deft", "deft_qr", "psoft", "pissa", "olora"), 1e-5)
WRONG_IN_PEFT = {"c3a": {"x"}}  # see peft_differences
_RANKS = ({"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 4})
_BLOCKS = tuple({"oft_block_size": size, "r": count} for size, count in ((3, 0), (6, 0), (0, 2), (5, 0)))
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    **{name: _RANKS for name in ("lora", "rslora", "lora_bias", "pissa", "olora")},
    **{name: _RANKS for name in ("dora", "dora, rank-stabilised", "dora on embeddings")},
    "vera": ({"r": 2}, {"r": 5}),
    "randlora": ({"r": 2, "randlora_alpha": 3}, {"r": 6, "randlora_alpha": 4}),
    "tinylora": ({"r": 1, "u": 3}, {"r": 3, "u": 5}),
    "unilora": ({"r": 2, "theta_d_length": 7}, {"r": 3, "theta_d_length": 20}),
    "vblora": ({"r": 2, "num_vectors": 5, "vector_length": 3},
               {"r": 3, "num_vectors": 7, "vector_length": 6, "topk": 3}),
    "loha": ({"r": 2, "alpha": 3}, {"r": 3, "alpha": 3}),
    "lokr": ({"r": 1, "alpha": 3}, {"r": 2, "alpha": 3}),
    "lokr, other sizes": ({"r": 1, "alpha": 3, "decompose_factor": 2}, {"r": 1, "alpha": 3},
                          {"r": 1, "alpha": 2, "decompose_factor": 6}),
    "lokr, whole": ({"r": 3, "alpha": 2}, {"r": 9, "alpha": 5, "decompose_factor": 2}),
    "hira": ({"r": 1}, {"r": 4}),
    "delora": ({"r": 2}, {"r": 5, "delora_lambda": 3}),
    "gralora": ({"r": 4, "alpha": 3}, {"r": 6, "gralora_k": 3, "alpha": 5}),
    "miss": ({"r": 3}, {"r": 6}),
    "miss, cut": ({"r": 5}, {"r": 7}),
    "miss_bat": ({"r": 3}, {"r": 6}),
    "miss, mini": ({"r": 3, "mini_r": 2}, {"r": 6, "mini_r": 3}),
    "c3a": ({"block_size": 3}, {"block_size": 6}),
    "fourierft": ({"n_frequency": 7, "scaling": 20.0}, {"n_frequency": 50, "scaling": 9.0, "random_loc_seed": 3}),
    "waveft": ({"n_frequency": 7}, {"n_frequency": 50, "scaling": 9.0, "random_loc_seed": 3}),
    "waveft without waves": ({"n_frequency": 7}, {"n_frequency": 50, "scaling": 9.0, "random_loc_seed": 3}),
    "shira": ({"r": 1}, {"r": 3}),
    "supertuning": ({"sparsity": 0.9}, {"sparsity": 0.5}),
    **{name: _BLOCKS for name in ("oft", "oft, Cayley-Neumann", "oft, one block for all")},
    "coft": tuple({**blocks, "eps": 60.0} for blocks in _BLOCKS),  # so wide that PEFT projects nothing
    "boft": ({"boft_block_size": 2}, {"boft_block_size": 6}),
    "boft, one factor": ({"boft_block_size": 3}, {"boft_block_size": 0, "boft_block_num": 2}),
    "hra": ({"r": 2}, {"r": 6}),
    "hra of odd rank": ({"r": 1}, {"r": 5}),
    "hra, Gram-Schmidt": ({"r": 1}, {"r": 4}),
    **{f"road_{n}": ({"group_size": 2}, {"group_size": 6}) for n in (1, 2, 4)},
    "psoft": ({"r": 2}, {"r": 5, "psoft_alpha": 3}),
    "ia3": ({},), "ia3 on inputs": ({},), "ia3 on channels": ({},),
    **{name: ({"r": 1}, {"r": 3}) for name in ("glora", "glora, as PEFT starts it", "deft", "deft_qr")},
    "beft": ({},),
    "ln_tuning": ({},),
}


def cases() -> Iterator[tuple[Method, Layer, Config]]:
    """Every layer and every configuration that a row is on, the configurations turn by turn."""
    for method in METHODS:
        fitting = {layer.name: [c for c in CONFIGS[method.name] if _is_on(method, layer, c)] for layer in LAYERS}
        on = [layer for layer in LAYERS if fitting[layer.name]]
        taken = [(layer, fitting[layer.name][i % len(fitting[layer.name])]) for i, layer in enumerate(on)]
        missing = [c for c in CONFIGS[method.name] if all(c != config for _, config in taken)]
        taken += [(next(layer for layer in on if c in fitting[layer.name]), c) for c in missing if on]
        for layer, config in taken:
            yield method, layer, config


def _is_on(method, layer, config) -> bool:
    return method.is_on(resolve(method, full(method, config)), layer.place)


