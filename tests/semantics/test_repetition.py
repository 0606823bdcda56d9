"""`for` in a target: what it stands for written out, its three forms, and what is told of a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import Tower, perturb
from reference import Reading
from torch import nn

from surgery.diagnostics import SurgeryError
from surgery.language.formatter import format_text
from surgery.language.library import parse
from surgery.language.to_python import python_text
from surgery.language.tree import Spec, every_step
from surgery.planning.check import check
from surgery.planning.formulas import formula_lines, formulas
from surgery.runtime.apply import apply
from surgery.semantics.resolved_spec import resolved

TURNS = """
# turns pairs of entries that stand `apart` from one another
transform pairs(apart: int = 1) on n : orthogonal {
  param Q[n / 2, 2, 2] = 0
  let P = kron(I(n / (2 * apart)), shuffle(2, apart))
  return P.T @ block_diag(cayley(skew(Q))) @ P
}
"""
LOOP = f"""spec own(count: int = 3)
{TURNS}
target linear {{
  add low_rank(2)
  for i in 0..count {{ pre pairs(pow(2, i)) on in  for j in i..i + 1 {{ pre pairs(apart = 2 * j + 2) }} }}
  post diagonal()
}}
"""
WRITTEN = f"""spec own()
{TURNS}
target linear {{
  add low_rank(2)
  pre pairs(1) on in  pre pairs(2)  pre pairs(2) on in  pre pairs(4)  pre pairs(4) on in  pre pairs(6)
  post diagonal()
}}
"""


def formula(text: str, out: int = 24, in_: int = 16, **settings):
    ((_, found),) = resolved(parse(text)).formulas(out, in_)
    return found


def test_it_is_its_steps_written_out():
    loop, written = formula(LOOP), formula(WRITTEN)
    assert loop.weight is written.weight and loop.parts == written.parts
    assert [leaf.key for leaf in loop.leaves] == [leaf.key for leaf in written.leaves]


def test_it_is_what_a_second_reading_of_the_text_says():
    torch.manual_seed(1)
    layer = nn.Linear(16, 24).double()
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    surgeon = apply(Tower(layer), parse(LOOP), dtype=torch.float64)
    perturb(surgeon.model)
    (adapter,) = surgeon.adapters.values()
    tensors = {key: value.detach().numpy() for key, value in adapter.values().items()}
    wanted, _ = Reading(LOOP).operated(weight, bias, tensors)
    assert np.abs(adapter.weights(layer)[0].detach().numpy() - wanted).max() < 1e-12


def test_a_bound_may_rest_on_a_size():
    text = f"{TURNS} target linear {{ for i in 0..log2(in) {{ pre pairs(pow(2, i)) on in }} }}"
    assert [d.message for d in check(parse(text))] == []
    assert len(formula(text, 24, 16).parts) == 4
    with pytest.raises(SurgeryError, match="a bound of `for` must be a whole number") as error:
        formula(text, 24, 48)
    assert error.value.diagnostics[0].helps == ("write `floor(log2(in))`",)


def test_show_says_what_is_repeated():
    spec = parse(LOOP.replace("0..count", "0..log2(in)"))
    page = "\n".join(line for target, found in formulas(spec) for line in formula_lines(target, found))
    assert "pre pairs(pow(2, i)), for i in 0..log2(in), orthogonal" in page
    assert "pre pairs(apart = 2 * j + 2), for i in 0..log2(in) for j in i..i + 1" in page
    known = "\n".join(line for target, found in formulas(parse(LOOP)) for line in formula_lines(target, found))
    assert "pre pairs(pow(2, 2)), orthogonal" in known and "for i" not in known


def test_text_json_and_python_are_one_thing():
    spec = parse(LOOP)
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
    once = format_text(LOOP)
    assert format_text(once) == once and parse(once) == spec
    assert "  for i in 0..count {\n    pre pairs(pow(2, i)) on in\n    for j in i..i + 1 {\n" in once
    assert len([*every_step(spec.targets[0].steps)]) == 4


def test_comments_stay_with_what_they_stand_at():
    text = ("target linear {\n  # the butterfly\n  for i in 0..2 {  # each\n    pre diagonal()  # a gain\n"
            "    # the end\n  }\n  post scale()\n}\n")
    assert format_text(text) == text


def test_for_is_no_reserved_word():
    assert check(parse("spec own(for: int = 2) target linear { for i in 0..for { pre diagonal() } }")) == []


@pytest.mark.parametrize(("body", "code", "said"), [
    ("for i in 0..1.5 { pre diagonal() }", "wrong-type", "a bound of `for` must be a whole number, not float `1.5`"),
    ("for i in 0..true { pre diagonal() }", "wrong-type", "not bool `true`"),
    ("for i in 0..W { pre diagonal() }", "unknown-name", "unknown name `W`"),
    ("for in in 0..2 { pre diagonal() }", "duplicate-name", "`in` is the number of columns of W here"),
    ("for rank in 0..2 { pre diagonal() }", "duplicate-name", "`rank` has a value here already"),
    ("for i in 0..2 { for i in 0..2 { add low_rank(rank) } }", "duplicate-name", "`i` has a value here already"),
    ("for i in 0..1001 { pre diagonal() }", "too-large", "this target has more than 1,000 steps"),
    ("for i in 0..120 { pre orthogonal(1) }", "too-large", "more than 100 operations"),
    ("for i in 2..2 { pre diagonal() }", "bad-value", "nothing is left of this target"),
    ("for i in 0..2 { add low_rank(i) }", "check-failed", "`check rank >= 1` is not met"),
    ("for i in 0..2 { }", "syntax", "a `for` needs at least one step"),
    ("for i in 0.2 { pre diagonal() }", "syntax", "expected `..`"),
    ("for i in 0..2 pre diagonal()", "syntax", "expected"),
    *((n * "for i in 0..2 { " + "pre diagonal() " + n * "}", "syntax", "`for` stands inside `for`") for n in (9, 3000)),
])
def test_mistakes(body, code, said):
    text = f"spec own(rank: int = 2) target linear {{ {body} }}"
    try:
        found = [d for d in check(parse(text)) if d.severity == "error"]
    except SurgeryError as error:
        found = list(error.diagnostics)
    assert found[0].code == code and said in found[0].message, found[0].message
    assert found[0].span is not None


@pytest.mark.parametrize(("text", "value"), [
    ("pow(2, 10)", 1024), ("pow(2, -1) * 4", 2), ("log2(4096)", 12), ("floor(log2(12))", 3), ("floor(pow(2.0, 0.5) * 2)", 2),
])
def test_powers_and_logarithms_of_known_numbers(text, value):
    found = formula(f"update own() {{ param A[{text}, in] = 0 return ones(out, {text}) @ A }} target linear {{ add own() }}")
    assert found.leaves[0].shape == (value, 16)
    assert Reading(f"spec s(x: int = {text})").settings == {"x": value}


@pytest.mark.parametrize(("text", "code"), [
    ("pow(2, 1000)", "bad-value"), ("log2(0)", "bad-value"), ("pow(0, -1)", "bad-value"), ("log2(-1)", "bad-value"),
    ("floor(true)", "wrong-type"), ("pow(2, false)", "wrong-type"), ('log2("2")', "wrong-type"),
])
def test_what_has_no_power_or_logarithm(text, code):
    (error,) = check(parse(f"spec own(x: float = {text}) target linear {{ add low_rank(2, x) }}"))
    assert error.code == code
