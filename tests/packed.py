"""Linear layers that keep their weight packed, as quantisation libraries have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Log(list):
    """One for a layer and its copies."""

    def __deepcopy__(self, memo: Any) -> Log:
        return self


class Int8Linear(nn.Module):
    """Bytes and a scale for each row; no nn.Linear, but it says how many features it takes and gives."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(out_features, 1) / 100)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None
        self.rows = Log()  # how many rows it was called on, each time

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """A dense layer's numbers, rounded."""
        packed = cls(linear.in_features, linear.out_features, linear.bias is not None)
        packed.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed.weight = (linear.weight.detach() / packed.scale).round().to(torch.int8)
        packed.bias = linear.bias
        return packed

    def dequantised(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.rows.append(x.shape[:-1].numel())
        return F.linear(x, self.dequantised(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Int4Linear(nn.Linear):
    """Two numbers a byte in the weight's place, whose shape says nothing."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        packed = torch.randint(256, (out_features * in_features // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dequantised(self, dtype: torch.dtype = torch.float64) -> Tensor:
        numbers = torch.cat([self.weight >> 4, self.weight & 15], dim=1)
        return (numbers.to(dtype) - 7.5).reshape(self.out_features, self.in_features) / 20

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Sealed(Tensor):
    """Codes that only their own layer's forward may look into."""

    ASKED_OF_ANY = {"data_ptr", "__get__", "detach"}  # `__get__`: dtype, device, _version and the like
    is_open = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not cls.is_open and function.__name__ not in cls.ASKED_OF_ANY:
            raise AssertionError(f"the packed weight is read by {function.__name__}")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class SealedLinear(Int8Linear):
    """It dequantises into a matrix that nobody else sees."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.weight = self.weight.as_subclass(Sealed)

    def forward(self, x: Tensor) -> Tensor:
        Sealed.is_open = True
        try:
            return super().forward(x).as_subclass(Tensor)
        finally:
            Sealed.is_open = False
