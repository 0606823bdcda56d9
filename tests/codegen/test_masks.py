"""A dropout mask in the form that a CPU has: it drops what it says, however the numbers lie in memory."""

from __future__ import annotations

import pytest
import torch

from surgery.codegen.masks import add_masked, mask, masked, masked_

LAID = {"in rows": lambda: torch.randn(30, 20), "in columns": lambda: torch.randn(20, 30).mT,
        "a part of rows": lambda: torch.randn(30, 50)[:, :20]}


@pytest.fixture(params=[False, True], ids=["", "fixed algorithms"])
def fixed(request):
    """As a user who asks torch for the same numbers in every run."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("laid", LAID)
def test_a_mask_drops_the_same_in_each_of_its_uses(laid, fixed):
    a, h, m = LAID[laid](), torch.randn(30, 3), torch.randn(3, 20)
    places = mask(a, 0.3)
    is_dropped = torch.zeros(600, dtype=torch.bool).index_fill_(0, places.long(), True).view(30, 20)
    assert 0 < is_dropped.sum() == len(places) < 600
    kept = a.clone()
    assert torch.equal(masked(a, places), kept.masked_fill(is_dropped, 0)) and torch.equal(a, kept)
    wanted = kept + 0.5 * (h @ m).masked_fill(is_dropped, 0)
    torch.testing.assert_close(add_masked(a, h, m, places, 0.5), wanted)
    assert torch.equal(masked_(a, places)[is_dropped], torch.zeros(len(places)))


def test_a_mask_reaches_the_end_of_what_is_larger_than_32_bits_count():
    """The numbers are one and the same, so that they take no memory."""
    torch.manual_seed(0)
    for count, p in ((2**31 + 2**20, 2e-3), (2**33, 1e-7), (100, 1e-6)):
        places = mask(torch.empty(1).expand(count), p).long()
        assert (places.diff() > 0).all() and ((places >= 0) & (places < count)).all()
        assert abs(len(places) - count * p) < 5 * (count * p) ** 0.5 + 1
        assert count * p < 100 or places[-1] > 0.9 * count
