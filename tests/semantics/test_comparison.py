"""Comparisons of tensors: what they are is tried with the rules; here, what is told where they cannot stand."""

from __future__ import annotations

import pytest
import torch
from operands import expression, tensors, value_and_gradients

from surgery.language.library import parse
from surgery.planning.check import check


@pytest.mark.parametrize(("text", "wanted"), [
    ("A > B", lambda a, b: a > b), ("A < B", lambda a, b: a < b), ("A >= A", lambda a, b: a >= a),
    ("A <= 0.5", lambda a, b: a <= 0.5), ("0 < A", lambda a, b: a > 0), ("A >= B", lambda a, b: a >= b),
])
def test_each_entry_is_compared(text, wanted):
    leaves = tensors(2, alike=True)
    found = value_and_gradients(expression(text), leaves)
    assert torch.equal(found["the value"], wanted(leaves["own.A"], leaves["own.B"]).double())
    assert not any(gradient.any() for name, gradient in found.items() if name != "the value")


@pytest.mark.parametrize(("body", "said"), [
    ("return (W == W) * W", "`==` needs compile-time values"), ("check W > 0 return 0 * W", "a check is of compile-time values"),
    ("return if W > 0 then W else 0 * W", "a condition is needed here"), ("return (W > 0 and W < 1) * W", "a condition is"),
    ('return (W > "a") * W', "a number or a tensor is needed here"),
])
def test_where_it_cannot_stand(body, said):
    (found,) = (d for d in check(parse(f"update own() {{ {body} }} target linear {{ add own() }}")) if d.severity == "error")
    assert found.code == "wrong-type" and said in found.message, found.message
