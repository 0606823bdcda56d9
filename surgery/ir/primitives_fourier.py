"""Operations for the compiler alone: a product with circulant blocks, taken apart into products of matrices.

A circulant block is diagonal in the Fourier basis. For blocks of moderate size a transform is a product with a basis
[2 f, b] (f = b // 2 + 1 cosines, then as many sines; orthonormal up to the weights of the frequencies), which leaves
each frequency's numbers together, as the products over the blocks want them:

    a circulant(c)ᵀ = waves(mixed(spectrum(a), kernel(c)))

Shapes: a [..., q b], its spectrum [2, f, ..., q] (real parts, imaginary parts), c [p, q, b], its kernel [2, f, q, p].
"""

from __future__ import annotations

from math import pi
from typing import Any

from surgery.ir import derivatives, flop_rules
from surgery.ir.expression import Shape
from surgery.ir.shape_rules import ShapeError, exactly, shape_text, vector
from surgery.ir.sizes import known, known_shape
from surgery.ir.table import CORE, Linear, Memory, Operation

BY_PRODUCTS = 128  # the largest block for which a transform by a product is cheaper than a fast one with its copies


def frequencies(size: Any) -> Any:
    """How many frequencies a real signal of a length has."""
    return size // 2 + 1


# ---------------------------------------------------------------------------------------------- shape rules


def _basis_shape(sizes: tuple) -> Shape:
    return (2 * frequencies(sizes[0]), sizes[0])


def _fits(basis: Shape, size: Any) -> Any:
    """The number of frequencies. Raises: ShapeError."""
    if exactly(2, "a Fourier basis", basis)[1] != size:
        raise ShapeError(f"needs a basis of {size}, not {shape_text(basis)}")
    return known(basis[0]) // 2


def _spectrum_shape(a: Shape, basis: Shape) -> Shape:
    twice, size = known_shape(exactly(2, "a Fourier basis", basis))
    width = known(vector(a)[-1])
    if width % size:
        raise ShapeError(f"needs slices of {size}, not {shape_text(a)}")
    return (2, twice // 2, *a[:-1], width // size)


def _waves_shape(y: Shape, basis: Shape) -> Shape:
    if len(y) < 3 or y[1] != _fits(basis, basis[-1]):
        raise ShapeError(f"needs a spectrum, not {shape_text(y)}")
    return (*y[2:-1], y[-1] * basis[1])


def _kernel_shape(c: Shape, basis: Shape) -> Shape:
    p, q, size = exactly(3, "a stack of first rows [p, q, b]", c)
    return (2, _fits(basis, size), q, p)


def _mixed_shape(x: Shape, kernel: Shape) -> Shape:
    if x[:2] != kernel[:2] or x[-1] != exactly(4, "a kernel [2, f, q, p]", kernel)[2]:
        raise ShapeError(f"{shape_text(x)} and {shape_text(kernel)} do not agree")
    return (*x[:-1], kernel[3])


# ------------------------------------------------------------------------------------------- dense meanings


def _basis(sizes: tuple, like: Any) -> Any:
    import torch

    size = sizes[0]
    steps = (torch.arange(n, dtype=torch.float64, device=like.device) for n in (frequencies(size), size))
    angles = torch.outer(*steps) * (2 * pi / size)
    return (torch.cat([angles.cos(), -angles.sin()]) / size ** 0.5).to(like.dtype)


def _spectrum(a: Any, basis: Any) -> Any:
    size = basis.shape[1]
    transformed = basis @ a.reshape(-1, size).mT
    return transformed.reshape(2, len(basis) // 2, *a.shape[:-1], a.shape[-1] // size)


def _waves(y: Any, basis: Any) -> Any:
    return (y.reshape(len(basis), -1).mT @ basis).reshape(*y.shape[2:-1], y.shape[-1] * basis.shape[1])


def _kernel(c: Any, basis: Any) -> Any:
    """Of a real signal all frequencies but the first, and the last of an even length, stand for two."""
    size = c.shape[-1]
    count = c.new_full((frequencies(size), 1, 1), 2 * size ** 0.5)
    count[0] = size ** 0.5
    if size % 2 == 0:
        count[-1] = size ** 0.5
    return (_spectrum(c.flatten(1), basis) * count).mT


def _mixed(x: Any, kernel: Any) -> Any:
    """x times the conjugate of the kernel, at each frequency."""
    import torch

    (real, imaginary), (k, m) = x.flatten(2, -2), kernel
    parts = torch.stack([real @ k + imaginary @ m, imaginary @ k - real @ m])
    return parts.reshape(*x.shape[:-1], kernel.shape[-1])


ROWS = [
    Operation("fourier", 0, _basis_shape, _basis, "the Fourier basis of b numbers: [2 f, b]", stage=CORE, sizes=("b",)),
    Operation("spectrum", 2, _spectrum_shape, _spectrum, "the Fourier transform of each slice", stage=CORE,
              linear=Linear.EACH, memory=Memory.NEW, passes=1, flops=flop_rules.each(2, 1, 1),
              derivative=derivatives.spectrum),
    Operation("waves", 2, _waves_shape, _waves, "the transpose of `spectrum`", stage=CORE, linear=Linear.EACH,
              memory=Memory.NEW, flops=flop_rules.each(2, 1, 0), derivative=derivatives.waves),
    Operation("kernel", 2, _kernel_shape, _kernel, "the spectrum of the first rows of circulant blocks", stage=CORE,
              linear=Linear.EACH),
    Operation("mixed", 2, _mixed_shape, _mixed, "x k̄ at each frequency, summed over the blocks", stage=CORE,
              linear=Linear.EACH, step_kernel="kernels.mixed", memory=Memory.NEW, flops=flop_rules.each(4, 1, 2),
              derivative=derivatives.mixed),
]
