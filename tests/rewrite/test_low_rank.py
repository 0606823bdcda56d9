"""The two thin factors of matrices that stand side by side, with zeros among them."""

from itertools import product

import pytest
import torch

from surgery.ir.builders import fill
from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.ir.operations import make
from surgery.rewrite.low_rank import factors

B, A, Q, P = (Expr("param", (), f"own.{name}", shape)
              for name, shape in (("B", (9, 1)), ("A", (1, 7)), ("Q", (9, 2)), ("P", (2, 7))))
PARTS: dict[str, Expr] = {
    "zeros": fill(0, (9, 7)), "B A": make("matmul", B, A), "Q P": make("matmul", Q, P)
}


@pytest.mark.parametrize(("left", "right"), [pair for pair in product(PARTS, PARTS) if pair != ("zeros", "zeros")])
def test_factors_of_neighbours_multiply_to_them(left, right):
    torch.manual_seed(0)
    whole = make("side_by_side", PARTS[left], PARTS[right])
    values = {leaf.data: torch.randn(leaf.shape, dtype=torch.float64) for leaf in (B, A, P, Q)}
    values["weight"] = torch.zeros(1, 1, dtype=torch.float64)
    u, v = factors(whole)
    assert u.shape[1] == v.shape[0] <= 4
    torch.testing.assert_close(dense(u, values) @ dense(v, values), dense(whole, values))
