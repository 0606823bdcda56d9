"""`check out == in`: a definition for square weights makes sense from its text alone, and is held to it on a model."""

from __future__ import annotations

import pytest
import torch

from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.planning.check import check
from surgery.runtime.apply import apply

SPEC = """
spec s()

update own() {{
  check {condition}
  param K[in, in] = 0
  return K @ W
}}

target linear {{
  add own()
}}
"""


@pytest.mark.parametrize("condition", ["out == in", "in == out", "1 < 2 and (out == in and in >= 1)"])
def test_the_two_sizes_are_one(condition):
    spec = parse(SPEC.format(condition=condition))
    assert check(spec) == []
    apply(torch.nn.Sequential(torch.nn.Linear(6, 6)), spec)
    with pytest.raises(SurgeryError) as told:
        apply(torch.nn.Sequential(torch.nn.Linear(6, 4)), spec)
    assert [d.code for d in told.value.diagnostics] == ["check-failed"]


@pytest.mark.parametrize("condition", ["out >= 1", "out == in or out >= 1", "not (out == in)", "out != in",
                                       "out == out", "out == in + 1", "in == 6"])
def test_nothing_else_makes_them_one(condition):
    """What holds for some weights alone is no promise for all."""
    codes = [d.code for d in check(parse(SPEC.format(condition=condition)))]
    assert "shape-mismatch" in codes


def test_a_transform_sees_one_size_on_both_sides():
    text = """
    spec s()
    transform own() on n { check out == in
      param A[out, in] = 0
      return I(n) + A }
    target linear { post own() on in
      pre own() }
    """
    assert check(parse(text)) == []
