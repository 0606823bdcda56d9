"""Where PEFT's layer is not the method of its paper, each with a measure of how far it is from it.

Linear layers of 64 x 64, parameters moved by normal noise of 0.1 where nothing else is said; sizes are relative to the
norm of what is expected, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.oft.layer import OFTRotationModule
from peft_pair import One, adapted, perturb, relative
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Difference:
    """`what` PEFT does, in words; `of`: what is measured; `measure` gives it."""

    method: str
    what: str
    of: str
    measure: Callable[[], float]

    def __str__(self) -> str:
        return f"{self.method}: {self.of}"


def _layers(config: peft.PeftConfig, layer: nn.Module | None = None, noise: float = 0.0) -> tuple:
    """The base layer, PEFT's in evaluation mode, and an input."""
    torch.manual_seed(0)
    base = One(layer or nn.Linear(64, 64))
    theirs = adapted(base, config).eval()
    perturb(theirs.parameters(), size=noise)
    images = isinstance(base.layer, (nn.Conv1d, nn.Conv2d))
    return base, theirs, torch.randn(2, 4, *(9 for _ in base.layer.weight.shape[2:])) if images else torch.randn(8, 64)


def _start(config: peft.PeftConfig, layer: Callable[[], nn.Module] = lambda: nn.Linear(64, 64)) -> Callable[[], float]:
    """How far an adapted layer starts from the base layer."""

    def measure() -> float:
        base, theirs, x = _layers(config, layer())
        return relative(theirs(x), base(x))

    return measure


def _of(config_class: type, **fields: Any) -> peft.PeftConfig:
    return config_class(**fields, target_modules=["layer"])


# ---------------------------------------------------------------------------------------------------- rotations


def _rotation(neumann: bool, size: float) -> Tensor:
    torch.manual_seed(0)
    module = OFTRotationModule(1, 32 * 31 // 2, 32, 32, use_cayley_neumann=neumann)
    nn.init.normal_(module.weight, std=size)
    return module.get_weight().detach().double()


def _defect(size: float) -> Callable[[], float]:
    def measure() -> float:
        turned = _rotation(True, size)
        return float((turned @ turned.T - torch.eye(32)).abs().max())

    return measure


def _transposed() -> float:
    return relative(_rotation(True, 0.02), _rotation(False, 0.02))


def _projected() -> float:
    base, theirs, x = _layers(_of(peft.OFTConfig, coft=True, eps=0.1, use_cayley_neumann=False), noise=0.1)
    weight = theirs.base_model.model.layer.oft_R["default"].weight
    before = weight.detach().clone()
    theirs(x)
    return relative(weight, before)


def _factors() -> float:
    peft.tuners.boft.layer._FBD_CUDA = False
    config = _of(peft.BOFTConfig, boft_block_size=8, boft_n_butterfly_factor=2)
    layer = peft.get_peft_model(One(nn.Linear(64, 64)), config).base_model.model.layer
    return 1 - len(layer.boft_R["default"]) / config.boft_n_butterfly_factor


def _pairs(factor: int) -> set[tuple[int, ...]]:
    """The half-blocks of 4 entries that a factor of PEFT's mixes."""
    order = peft.tuners.boft.layer.Linear.block_butterfly_perm(None, 64, 8 // 2**factor, 4, 3)
    return {tuple(sorted(set((block // 4).tolist()))) for block in order.split(8)}


def _paired_again() -> float:
    second, third = _pairs(1), _pairs(2)
    return len(second & third) / len(third)


def _dilated() -> float:
    base, theirs, x = _layers(_of(peft.HRAConfig, r=2), nn.Conv2d(4, 8, 3, dilation=2))
    return theirs(x).numel() / base(x).numel() - 1


# ----------------------------------------------------------------------------------------------- gradients and maps


def _input_gradient() -> float:
    base, theirs, x = _layers(_of(peft.C3AConfig, block_size=16), noise=1.0)
    weight = (theirs(torch.eye(64)) - theirs(torch.zeros(1, 64))).T
    x, direction = x.requires_grad_(), torch.randn(8, 64)
    (found,) = torch.autograd.grad((theirs(x) * direction).sum(), x)
    return relative(found - direction @ base.layer.weight, direction @ (weight - base.layer.weight))


def _padded() -> float:
    """How far PEFT's layer is from what it merges, for a LoRA on a convolution that pads by reflection."""
    layer = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
    _, theirs, x = _layers(_of(peft.LoraConfig, r=4), layer, noise=0.1)
    with torch.no_grad():
        return relative(theirs(x), theirs.merge_and_unload()(x))


def _scrambled() -> float:
    base, theirs, x = _layers(_of(peft.LoKrConfig, r=8, alpha=8), nn.Conv1d(4, 8, 3), noise=0.1)
    layer = theirs.base_model.model.layer
    left, right = layer.lokr_w1["default"], layer.lokr_w2["default"]
    meant = torch.einsum("ab, cdk -> acbdk", left, right).reshape(8, 4, 3)
    return relative(layer.get_delta_weight("default"), meant)


def _paired() -> float:
    _, theirs, _ = _layers(_of(peft.RandLoraConfig, r=8, randlora_alpha=8), noise=0.1)
    layer = theirs.base_model.model.layer
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]
    scale, gain = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    meant = torch.einsum("mnr, rn, rk, nk -> mk", b, scale, a[:, 0], gain)
    return relative(layer.get_delta_weight("default"), meant)


def _by_column() -> float:
    _, theirs, _ = _layers(_of(peft.LoraConfig, r=4, use_dora=True), nn.Embedding(64, 16))
    layer = theirs.base_model.model.layer
    perturb(iter([layer.lora_embedding_A["default"]]), size=0.1)
    weight = layer.base_layer.weight
    whole = weight + layer.get_delta_weight("default")
    by_row = whole * (weight.norm(dim=1) / whole.norm(dim=1))[:, None]
    return relative(theirs(torch.arange(64)), by_row)


# ------------------------------------------------------------------------------------- dropout and the base layer


def _dropped(**fields: Any) -> Callable[[], float]:
    """How far dropout alone moves the output, where the update is zero."""

    def measure() -> float:
        base, theirs, x = _layers(_of(peft.LoraConfig, r=8, lora_dropout=0.5, **fields))
        if "use_dora" in fields:
            perturb(theirs.base_model.model.layer.lora_magnitude_vector.parameters(), size=0.1)
        still = theirs(x)
        return relative(theirs.train()(x), still)

    return measure


def _switched_off(start: str) -> Callable[[], float]:
    def measure() -> float:
        base, theirs, x = _layers(_of(peft.LoraConfig, r=8, init_lora_weights=start))
        with theirs.disable_adapter():
            return relative(theirs(x), base(x))

    return measure


_NO_I = "starts elsewhere than the base layer"
DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "oft", "The default, five terms of the Cayley-Neumann series, is no rotation. Our `oft` is exact; the row "
        "`oft, Cayley-Neumann` has PEFT's.", "max abs(R Rᵀ - I), parameters of 0.05", _defect(0.05)),
    Difference("oft", "The same, as training goes on.", "max abs(R Rᵀ - I), parameters of 0.1", _defect(0.1)),
    Difference(
        "oft", "The series is that of the exact branch transposed: a parameter turns the other way.",
        "R of both branches, parameters of 0.02", _transposed),
    Difference(
        "oft", "On a kernel larger than 1, patches are turned and added up again where they overlap. Refused here.",
        "the output at the start", _start(_of(peft.OFTConfig, oft_block_size=4), lambda: nn.Conv2d(4, 8, 3))),
    Difference(
        "coft", "A forward pass writes the projected parameter back. Ours is in the formula, with the parameter free.",
        "the parameter, after a pass with eps = 0.1", _projected),
    Difference(
        "boft", "Without the CUDA extension, one factor is taken whatever was asked for: the row `boft, one factor`.",
        "share of two factors that is missing", _factors),
    Difference(
        "boft", "The third factor pairs the half-blocks that the second has paired, so that it mixes nothing further. "
        "Ours pairs those that are 4 apart, as the paper does.",
        "share of the third factor's pairs that are the second's", _paired_again),
    Difference(
        "hra", "A convolution's dilation, and a stride or padding that differ by axis, are not read (BOFT's neither). "
        "Refused here.", "too many outputs, dilation of 2", _dilated),
    Difference(
        "hra", f"An odd number of reflections {_NO_I}. Ours come in pairs; the row `hra of odd rank` has PEFT's.",
        "the output at the start, r = 7", _start(_of(peft.HRAConfig, r=7))),
    Difference(
        "hra", f"After Gram-Schmidt any number {_NO_I}. The row `hra, Gram-Schmidt` has PEFT's.",
        "the output at the start, r = 8", _start(_of(peft.HRAConfig, r=8, apply_GS=True))),
    Difference(
        "c3a", "The gradient that goes back to the input is that of blocks flipped over, for blocks of 3 or more. "
        "Ours is the formula's own.", "the update's part of the gradient of the input", _input_gradient),
    Difference(
        "c3a", f"The default start (`xavier_uniform`) {_NO_I}. Ours is zero.", "the output at the start",
        _start(_of(peft.C3AConfig, block_size=16))),
    Difference(
        "fourierft", f"The default start (`init_weights = False`) {_NO_I}. Ours is zero.", "the output at the start",
        _start(_of(peft.FourierFTConfig, n_frequency=100))),
    Difference(
        "unilora", f"As in the paper, it {_NO_I}. Ours too, and says `shifted`.", "the output at the start",
        _start(_of(peft.UniLoraConfig))),
    Difference(
        "vblora", f"As in the paper, it {_NO_I}. Ours too, and says `shifted`.", "the output at the start",
        _start(_of(peft.VBLoRAConfig, vector_length=16))),
    Difference(
        "lokr", "On a one-dimensional convolution with a whole second factor, the kernel is mixed with the channels. "
        "Refused here.", "the update and the Kronecker product", _scrambled),
    Difference(
        "lora", "On a convolution that pads otherwise than with zeros (`padding_mode`), the update is padded with zeros "
        "all the same (so is that of LoHa, LoKr and HiRA). Refused here.", "the output and that of PEFT's own merge",
        _padded),
    Difference(
        "randlora", "The columns of B meet the rows of the scaled A in another order than in the paper's sum. As B is "
        "random, it is the paper's with other columns, which is how the row sees it.",
        "the update and the paper's sum", _paired),
    Difference(
        "dora", "On an embedding there is a norm for each feature, not for each token: the row `dora on embeddings`.",
        "the weight and that of a norm for each token", _by_column),
    Difference(
        "dora", "Dropout also reaches the frozen layer's part, (m / ‖·‖ - 1) x Wᵀ. Ours reaches the update alone.",
        "the output under dropout of 0.5, where the update is zero", _dropped(use_dora=True)),
    Difference(
        "pissa", "Dropout reaches B A and not the part that was taken off the weight. Ours reaches the difference.",
        "the output at the start, under dropout of 0.5", _dropped(init_lora_weights="pissa")),
    Difference(
        "pissa", "The frozen weight is rewritten: with the adapter switched off, it is not the base model. Ours is.",
        "the output while switched off", _switched_off("pissa")),
    Difference("olora", "The same.", "the output while switched off", _switched_off("olora")),
    Difference(
        "olora", "On transformers' Conv1D the weight is taken apart as it is stored, [in, out]. Refused here.",
        "the output at the start", _start(_of(peft.LoraConfig, r=8, init_lora_weights="olora", fan_in_fan_out=True),
                                          lambda: Conv1D(64, 64))),
)
