"""What CUDA refuses and a CPU computes, refused on a CPU: a mode for tests that have no GPU.

Takes the operations that run inside the mode, those of backward passes too (autograd runs them in the thread that
asked). Raises `Refused` with the rule that an operation breaks. Where a CPU refuses as well, the rule is here all the
same: an older or a newer one may not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALVES = {torch.float16, torch.bfloat16, torch.complex32}


class Refused(RuntimeError):
    """An operation that would fail on CUDA."""


def _one_dtype(tensors: list[Tensor]) -> bool:
    return len({t.dtype for t in tensors}) == 1


def _no_half(tensors: list[Tensor]) -> bool:
    return not any(t.dtype in HALVES for t in tensors)


def _wide_statistics(tensors: list[Tensor]) -> bool:
    """Of the tensors of a norm those with a number for each row (or channel) and not for each column are statistics."""
    x, rest = tensors[0], tensors[1:]
    norms = [t for t in rest if t.shape != x.shape and t.shape != x.shape[-t.ndim:]]
    others = [t for t in rest if all(t is not n for n in norms)]
    wanted = torch.float32 if x.dtype in HALVES else x.dtype
    return all(t.dtype == wanted for t in norms) and _one_dtype([x, *others])


def _long_places(tensors: list[Tensor]) -> bool:
    return not any(t.dtype in (torch.int32, torch.int16, torch.int8) for t in tensors)


def _whole_ids(tensors: list[Tensor]) -> bool:
    return all(t.dtype in (torch.int64, torch.int32) or t.is_floating_point() for t in tensors)


def _no_narrower(tensors: list[Tensor]) -> bool:
    """The first is written into."""
    into, *others = (t for t in tensors if t.is_floating_point() or t.is_complex())
    return all(torch.promote_types(into.dtype, t.dtype) == into.dtype for t in others if t.ndim)


Rule = Callable[[list[Tensor]], bool]
# By the names of operations (of which an in-place one ends with _): what must hold of their tensors, and torch's word.
RULES: list[tuple[str, Rule, str]] = [
    # at::native::addmm_out_cuda, baddbmm_out_cuda, dot, mv and cuDNN: "expected mat1 and mat2 to have the same dtype"
    (r"(add)?(mm|mv|r|bmm)|baddbmm|dot|vdot|linear|_?convolution.*|conv.*|.*bilinear", _one_dtype,
     "the operands of a product have one dtype"),
    # layer_norm_cuda.cu and its like read mean and 1/σ as accscalar_t, and gain and offset as the input's dtype:
    # "expected scalar type Float but found BFloat16"
    (r"native_(layer|group|batch)_norm(_backward)?|_fused_rms_norm.*", _wide_statistics,
     "the statistics of a norm are float32 for half types, and its gain is of the input's dtype"),
    # SpectralOps.cpp: "cuFFT doesn't support tensor of type: BFloat16"; half for powers of two alone
    (r"_?fft_.*", _no_half, "cuFFT has no transform of bfloat16, nor of every size in float16"),
    # BatchLinearAlgebra.cpp (MAGMA, cuSOLVER, cuBLAS): "... not implemented for 'Half'" and linalg.*: "Low precision
    # dtypes not supported". Norms and products of vectors are none of them.
    (r"_?linalg_(?!vector_norm|vecdot|cross).*|cholesky.*|lu_.*|triangular_solve|geqrf|ormqr|logdet|slogdet|inverse",
     _no_half, "linear algebra has no half types"),
    # ScatterGatherChecks.h, TensorAdvancedIndexing: "Expected dtype int64 for index"; `index` takes int32 of late alone
    (r"(scatter|gather|take|put|index)(_add|_put|_reduce|_select|_copy|_fill)?", _long_places,
     "places are int64"),
    # EmbeddingBackward: "Expected tensor for argument 'indices' to have one of the following scalar types: Long, Int"
    (r"embedding.*", _whole_ids, "token ids are int64 or int32"),
    # "not implemented for 'Half'"
    (r"_?cdist.*|histc|unique.*", _no_half, "there is no half type for it"),
    # No refusal of CUDA's, and none of torch's: a wider operand is rounded without a word.
    (r"(add|sub|mul|div|addcmul|addcdiv|lerp)_", _no_narrower, "what is written into is as wide as what comes"),
]
_COMPILED = [(re.compile(rf"(?:{pattern})_?" if not pattern.endswith("_") else pattern), rule, words)
             for pattern, rule, words in RULES]
# Whatever moves or copies between devices and dtypes.
_ANYWHERE = {"copy_", "_to_copy", "_copy_from", "set_", "lift_fresh"}


class AsCuda(TorchDispatchMode):
    """Refuses what CUDA refuses. `seen` are the names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        self.seen.add(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for words in _broken(name, tensors):
            what = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in tensors)
            raise Refused(f"{name} of {what}: {words}")
        return function(*args, **kwargs or {})


@cache
def _rules_of(name: str) -> list[tuple[Rule, str]]:
    return [(rule, words) for pattern, rule, words in _COMPILED if pattern.fullmatch(name)]


def _broken(name: str, tensors: list[Tensor]) -> Iterator[str]:
    """The rules that an operation breaks."""
    if not tensors:
        return
    yield from (words for rule, words in _rules_of(name) if not rule(tensors))
    # TensorIterator: "Expected all tensors to be on the same device", but for a number in a tensor on the CPU
    places = {t.device for t in tensors if t.ndim or t.device.type != "cpu"}
    if len(places) > 1 and name not in _ANYWHERE:
        yield "all tensors are on one device, or numbers on the CPU"
