"""`for` in a definition: what it stands for written out, what goes from round to round, its three forms, and what is told
of a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import Tower, perturb
from reference import Reading
from torch import nn

from surgery.diagnostics import SurgeryError
from surgery.editor.document import Document
from surgery.editor.names import occurrences
from surgery.editor.navigation import rename
from surgery.ir.expression import Formula
from surgery.language.formatter import format_text
from surgery.language.library import parse
from surgery.language.to_python import python_text
from surgery.language.tree import Spec
from surgery.planning.check import check
from surgery.planning.formulas import formula_lines, formulas
from surgery.runtime.apply import apply
from surgery.semantics.resolved_spec import resolved

BUTTERFLY = """spec own(count: int = 2)

transform butterfly(count: int = 2) on n : orthogonal {
  # what the rounds hand on
  let R = I(n)
  let apart = 1
  for i in 0..count {  # a stage
    param Q[n / 2, 2, 2] = 0  # turns pairs
    let P = kron(I(n / (2 * apart)), shuffle(2, apart))
    let R = R @ P.T @ block_diag(cayley(skew(Q))) @ P
    let apart = 2 * apart
    # the end
  }
  return R
}

target linear {
  pre butterfly(count) on in
  add low_rank(2)
}
"""
WRITTEN = """spec own()
transform butterfly() on n : orthogonal {
  param Q[n / 2, 2, 2] = 0
  param Q_2[n / 2, 2, 2] = 0
  let P = kron(I(n / 2), shuffle(2, 1))
  let O = kron(I(n / 4), shuffle(2, 2))
  return I(n) @ P.T @ block_diag(cayley(skew(Q))) @ P @ O.T @ block_diag(cayley(skew(Q_2))) @ O
}
target linear { pre butterfly() on in  add low_rank(2) }
"""
SUM = """spec own()
update own(r: int = 2) {
  shared param Z[r, in] ~ normal()
  let S = 0 * W
  let g = 1
  for i in 0..2 {
    param A[r, in] ~ normal()
    for j in i..2 {
      param B[out, r] = 0
      let S = S + g * (B @ (A + Z))
      let g = g / 2
    }
    noise m[r] ~ bernoulli(0.5)
    shared(module) param C[out, r] = 0
    let S = S + C @ diag(m) @ A
  }
  for i in 2..2 { param never = 0  let S = never * S }
  return S + g * W - g * W
}
target linear { add own()  add own(r = 2) }
"""


def formula(text: str, out: int = 24, in_: int = 16) -> Formula:
    ((_, found),) = resolved(parse(text)).formulas(out, in_)
    return found


def test_it_is_its_rounds_written_out():
    rounds, written = formula(BUTTERFLY), formula(WRITTEN)
    assert rounds.weight is written.weight
    assert [leaf.key for leaf in rounds.leaves] == [leaf.key for leaf in written.leaves]
    assert check(parse(BUTTERFLY)) == []


@pytest.mark.parametrize("text", [BUTTERFLY, SUM])
def test_it_is_what_a_second_reading_of_the_text_says(text):
    torch.manual_seed(1)
    layer = nn.Linear(16, 24).double()
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    surgeon = apply(Tower(layer), parse(text), dtype=torch.float64)
    perturb(surgeon.model)
    (adapter,) = surgeon.adapters.values()
    tensors = {key: value.detach().numpy() for key, value in adapter.values().items()}
    wanted, _ = Reading(text).operated(weight, bias, tensors)
    assert np.abs(adapter.weights(layer)[0].detach().numpy() - wanted).max() < 1e-12
    surgeon.model.eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    assert np.abs(surgeon.model(x).detach().numpy() - (x.numpy() @ wanted.T + bias)).max() < 1e-12


def test_tensors_of_rounds_have_names_as_by_hand():
    keys = [leaf.key for leaf in formula(SUM).leaves]
    of_step = ["Z", "A", "B", "B_2", "A_2", "B_3"]
    assert [k for k in keys if k.startswith("add_own.")] == [f"add_own.{name}" for name in of_step]
    assert [k for k in keys if k.startswith("shared.")] == ["shared.C", "shared.C_2"]  # one of each round for both steps


def test_calls_in_rounds_have_parameters_of_their_own():
    text = "update own() { let S = 0 * W for i in 0..3 { let S = S + low_rank(i + 1) } return S } target linear { add own() }"
    shapes = {leaf.key: leaf.shape for leaf in formula(text).leaves}
    assert shapes["add_own-low_rank.A"] == (1, 16) and shapes["add_own-low_rank_3.B"] == (24, 3) and len(shapes) == 6


def test_a_bound_may_rest_on_a_size():
    text = BUTTERFLY.replace("0..count", "0..log2(n)").replace("count: int = 2", "").replace("(count)", "()")
    assert [d.message for d in check(parse(text))] == []
    assert len(formula(text, 24, 16).leaves) == 4 + 2
    page = "\n".join(line for target, found in formulas(parse(text)) for line in formula_lines(target, found))
    assert "for i in 0..log2(n)" in page and "Q [in / 2, 2, 2] = 0" in page and "Q_2" not in page
    with pytest.raises(SurgeryError, match="a bound of `for` must be a whole number"):
        formula(text, 24, 48)


def test_a_power_of_an_unknown_sum_is_a_product():
    """So that sizes agree before it is known how many rounds there are."""
    text = ("transform own() on n { let U = I(n) for i in 0..log2(n) { param t = 1 "
            "let U = kron(I(pow(2, i)), kron(t * I(2), I(n / pow(2, i + 1)))) @ U } return U } "
            "target linear { pre own() on in }")
    assert check(parse(text)) == [] and len(formula(text).leaves) == 4


def test_what_comes_out_of_unknown_rounds_is_not_guessed():
    """Neither a number nor a shape, which each round may change."""
    text = ("update own() { let k = 1 let H = [[1]] for i in 0..log2(in) { let k = 2 * k let H = kron(H, [[1, 1], [1, -1]]) } "
            "param A[out, k] = 0 return A @ H } target linear { add own() }")
    assert check(parse(text)) == [] and formula(text).leaves[0].shape == (24, 16)


def test_text_json_and_python_are_one_thing():
    spec = parse(BUTTERFLY)
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
    assert format_text(BUTTERFLY) == BUTTERFLY


def test_a_name_is_changed_in_every_round():
    document = Document("own.surg", BUTTERFLY)
    text = BUTTERFLY
    for name in ("R", "apart", "Q", "P"):
        places = rename(document, BUTTERFLY.index(f" {name} = " if name != "Q" else " Q[") + 1, "Z")
        assert len(places) == {"R": 4, "apart": 5, "Q": 2, "P": 3}[name]
    assert {each.kind for each in occurrences(document) if text[each.span.start : each.span.end] == "i"} == {"local"}


def test_for_is_no_reserved_word():
    text = "update own() { let for = 2 for i in 0..for { let j = i } return for * W } target linear shifted { add own() }"
    assert [d.code for d in check(parse(text))] == ["unused"]


@pytest.mark.parametrize(("body", "code", "said"), [
    ("let R = W for i in 0..1.5 { let R = R }", "wrong-type", "a bound of `for` must be a whole number"),
    ("let R = W for i in 0..2 { let P = R } let Q = P", "unknown-name", "unknown name `P`"),
    ("for i in 0..2 { let R = R }", "unknown-name", "unknown name `R`"),
    ("param R = 0 for i in 0..2 { let R = R }", "duplicate-name", "name `R` stands twice"),
    ("let R = W for i in 0..2 { let R = R let R = R }", "duplicate-name", "name `R` stands twice"),
    ("let R = W for R in 0..2 { let R = R }", "duplicate-name", "name `R` stands twice"),
    ("for i in 0..2 { param A = 0 } for j in 0..2 { param A = 0 }", "duplicate-name", "name `A` stands twice"),
    ("param A_2 = 0 for i in 0..2 { param A = 0 }", "duplicate-name", "`A` is called `A_2` in round 2"),
    ("for in in 0..2 { param A = 0 }", "duplicate-name", "`in` is the number of columns of W here"),
    ("let R = W for i in 0..1001 { let P = R }", "too-large", "more than 1,000 rounds"),
    ("let R = W for i in 0..90 { let R = R + R - R }", "too-large", "more than 100 operations"),
    ("let R = W for i in 0..3 { let R = R @ R }", "shape-mismatch", "the inner dimensions"),
    ("for i in 0..2 { }", "syntax", "a `for` needs at least one statement"),
    ("for i in 0..2 { add low_rank(2) }", "syntax", "expected"),
    *(("".join(f"for i{k} in 0..2 {{ " for k in range(n)) + "let j = 1 " + n * "}", "syntax", "`for` stands inside `for`")
      for n in (9, 3000)),
])
def test_mistakes(body, code, said):
    text = f"spec s() update own() {{ {body} return 0 * W }} target linear {{ add own() }}"
    try:
        found = [d for d in check(parse(text)) if d.severity == "error"]
    except SurgeryError as error:
        found = list(error.diagnostics)
    assert (len(found), found[0].code) == (1, code) and said in found[0].message, found
    assert found[0].span is not None
