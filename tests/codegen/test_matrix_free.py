"""No matrix [out, in], [in, in] or [out, out] is ever made where the structure allows a cheap program:
every tensor is watched."""

from __future__ import annotations

import pytest
from watched import ALLOWED, IN, OUT, largest

import surgery

STEPS = {
    "kron on out": "post group_gain()", "householder on out": "post householder(2)",
    "block rotation on out": "post block_orthogonal(8)",
    "rotation on in": "pre orthogonal(4) on in",
    "columns at places": "add chosen(4)", "a part at places": "add part(4)",
    "both sides": "pre diagonal()  pre diagonal() on in  add low_rank(4)  post householder(2)",
}
GROUPS = """
transform group_gain() on n : diagonal {
  param g[8] = 0
  return kron(diag(exp(g)), I(n / 8))
}

update chosen(k: int) {
  param C[out, k] = 0
  return C @ rows(I(in), top(col_norm(W), k))
}

update part(k: int) {
  param M[k, k] = 0
  return columns(I(out), k) @ M @ rows(I(in), range(in - k, in))
}
"""
SHIPPED = {
    "lora": {"rank": 4}, "dora": {"rank": 4}, "pre_diag": {"rank": 4}, "post_diag": {"rank": 4}, "sora": {"rank": 4},
    "sora_reference": {"rank": 4}, "oft": {"block": 8}, "boft": {"block": 8}, "hra": {"rank": 4}, "delora": {"rank": 4},
    "gralora": {"rank": 4}, "miss": {"rank": 4}, "road_1": {}, "road_2": {}, "road_4": {}, "lokr": {"rank": 2},
    "deft": {"rank": 4},
    "pissa": {"rank": 4}, "tinylora": {},
}


def spec_of(name: str) -> surgery.Spec:
    if name in STEPS:
        return surgery.parse(f'{GROUPS}\nspec own()\ntarget linear "0" {{ {STEPS[name]} }}')
    return surgery.load(name, **SHIPPED[name]).retarget("0")


@pytest.mark.parametrize("name", [*STEPS, *SHIPPED])
def test_no_large_matrix_is_made(name):
    what, size = largest(spec_of(name))
    assert size <= ALLOWED, f"{what} has {size} numbers, and {ALLOWED} are allowed"


def test_a_dense_formula_is_seen():
    assert largest(surgery.load("hira", rank=4).retarget("0"))[1] == OUT * IN
