"""The squares of a frozen weight's rows and columns: of every kind of layer what its matrix has, from one reading of it
as it is stored."""

import pytest
import torch
from layers import LAYOUTS, Tower
from packed import Int8Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.language.library import parse
from surgery.runtime.apply import apply

EXACT = 1e-12


def frozen(layer: nn.Module):
    model = Tower(layer)
    (adapter,) = apply(model, parse('target any "layers.0" { add low_rank(rank = 2) }')).adapters.values()
    return adapter.frozen(model.layers[0])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
def test_of_every_kind_of_layer(layout):
    torch.manual_seed(0)
    layer = frozen(layout.build().double())
    for axis in (0, 1):
        expected = layer.matrix(torch.float64).detach().square().sum(axis)
        torch.testing.assert_close(layer.squares(axis, torch.float64), expected, rtol=EXACT, atol=0)


def test_of_a_packed_layer_whose_weight_is_recovered():
    layer = frozen(Int8Linear(12, 18))
    for axis in (0, 1):
        expected = layer.read(torch.float64).square().sum(axis)
        torch.testing.assert_close(layer.squares(axis, torch.float64), expected, rtol=EXACT, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_weight_is_summed_wide_and_not_copied(dtype):
    torch.manual_seed(0)
    layer = frozen(nn.Linear(300, 2000, bias=False).to(dtype))

    class Largest(TorchDispatchMode):
        """The most numbers that an operation gave in a wider dtype."""

        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.numbers = max(self.numbers, result.numel())
            return result

    for axis in (0, 1):
        with Largest() as largest:
            squares = layer.squares(axis, torch.float32)
        assert squares.dtype == torch.float32 and largest.numbers < layer.weight.numel() / 5
        torch.testing.assert_close(squares.double(), layer.weight.double().square().sum(axis), rtol=1e-5, atol=0)


def test_a_weight_that_trains_has_derivatives_at_zero():
    layer = frozen(nn.Linear(4, 3, bias=False).double())
    weight = layer.module.weight.requires_grad_()
    weight.detach()[1] = 0.0
    (first,) = torch.autograd.grad(layer.squares(1, torch.float64).sum(), weight, create_graph=True)
    torch.testing.assert_close(first, 2 * weight.detach())
    (second,) = torch.autograd.grad(first.sum(), weight)
    torch.testing.assert_close(second, torch.full_like(second, 2.0))
