"""Rows and columns at places: what they mean is in the zoo; here, that no product is computed for them."""

from __future__ import annotations

import pytest
import torch

from surgery.codegen.candidates import candidates
from surgery.codegen.program_text import program_text, step_text
from surgery.diagnostics import SurgeryError
from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.layers.kinds import CALLED, LINEAR
from surgery.planning.check import check
from surgery.semantics.resolved_spec import resolved

OUT, IN = 1024, 512


def formula(body: str):
    """The formula of a target that adds what a body says, on a weight [1024, 512]."""
    spec = parse(f"update own() {{ {body} }} target linear {{ add own() }}")
    ((_, found),) = resolved(spec).formulas(OUT, IN)
    return found


def best(body: str, kind=LINEAR):
    return candidates(formula(body), kind, training=True, has_bias=False)[0]


@pytest.mark.parametrize("places", ["top(col_norm(W), 4)", "range(8, 12)", "at"])
def test_columns_at_places_are_gathered(places):
    plan = best(f"frozen param at[4] ~ sample(of = in) param C[out, 4] = 0 return C @ rows(I(in), {places})")
    text = program_text(plan)
    assert "columns(x, " in text and "layer.eye" not in text
    step = step_text(plan.written, plan.needs)
    assert step and "add_placed(" in step.source  # of the input's gradient, where it goes


def test_what_is_placed_in_the_output_is_written_into_it():
    plan = best("param R[4, in] = 0 return columns(I(out), 4) @ R")
    step = step_text(plan.written, plan.needs)
    assert step and step.source.count("add_placed(") == 1 and "placed((" not in step.source.replace("add_placed", "")


def test_columns_of_a_called_weight_are_its_images():
    body = "frozen param at[4] ~ sample(of = in) param U[4, 4] = 0 return columns(W, at) @ U @ rows(W, range(2, 6))"
    assert best(body).reads_weight and not best(body, CALLED).reads_weight


@pytest.mark.parametrize("body", [
    "return scatter(v, at, out, in)", "return 2 * scatter(v, at, in, out).T", "return W * scatter(v, at, out, in)",
    "frozen param C[out, out] ~ normal() return C @ scatter(v, at, out, in)",
    "param A[4, in] ~ normal() return scatter(v, at, out, in) * (ones(out, 4) @ A)"])
def test_few_entries_are_no_matrix(body):
    plan = best(f"frozen param at[100] ~ sample(of = out * in) param v[100] = 0 {body}")
    text = program_text(plan)
    assert plan.strategy != "built weight" and "row_of(" in text and "scatter(" not in text


def test_many_entries_are_one():
    plan = best("frozen param at[513] ~ sample(of = out * in) param v[513] = 0 return scatter(v, at, out, in)")
    assert plan.strategy == "built weight" and "row_of(" not in program_text(plan)


def test_a_number_is_the_first_so_many():
    first = formula("param C[out, 4] = 0 return C @ rows(I(in), 4)")
    for same in ("range(0, 4)", "indices(4)"):
        assert formula(f"param C[out, 4] = 0 return C @ rows(I(in), {same})").weight is first.weight


@pytest.mark.parametrize(("text", "code", "said"), [
    ("param A[4, in] = 0 return columns(W, range(in - 3, in + 1)) @ A", "bad-value", "`columns` is given"),
    ("return rows(W, range(4, 4)) @ I(in)", "shape-mismatch", "from 4 up to 4 there is no place"),
    ("return rows(W, range(-1, 4)) @ I(in)", "bad-value", "the place `-1` is -1; it must be at least 0"),
    ("param v[4] = 0 return rows(W, v) @ W.T", "shape-mismatch", "needs places here, and this is a tensor"),
    ("frozen param at[4] ~ sample(of = in) return columns(W, at + 1)", "shape-mismatch", "cannot compute with places"),
    ("return take(W, 4)", "shape-mismatch", "needs places"),
    ("return rows(W, 1.5)", "wrong-type", "a dimension must be a whole number"),
])
def test_mistakes_with_places(text, code, said):
    (found,) = (d for d in check(parse(f"update own() {{ {text} }} target linear {{ add own() }}"))
                if d.severity == "error")
    assert found.code == code and said in found.message, found.message


def test_places_beyond_a_known_weight_are_told():
    spec = parse("update own() { param C[out, 4] = 0 return C @ rows(I(in), range(510, 514)) } target linear { add own() }")
    with pytest.raises(SurgeryError, match="places among 514 entries, and `rows` is given 512"):
        resolved(spec).formulas(OUT, IN)


def test_numbers_of_places_are_for_starts():
    """Of any places; what is computed in every step is refused, since its dtype may not hold them."""
    found = formula("frozen param at[3] ~ sample(of = in) frozen param n[3] = numbers(at) - numbers(range(2, 5)) "
                    "param C[out, 3] = 0 return C @ diag(n) @ rows(I(in), at)")
    start = {leaf.key: leaf for leaf in found.leaves}["add_own.n"]
    value = dense(start.init, {"weight": torch.zeros(1, 1).double(), "add_own.at": torch.tensor([511, 7, 300])})
    assert value.tolist() == [509, 4, 296] and not start.whole
    with pytest.raises(SurgeryError, match="bfloat16 knows no 257"):
        formula("param g = 0 return g * W @ diag(numbers(indices(in)))")
