"""Values of parameters: what is of another type is told, wherever it stands, and where nothing reads it too."""

from __future__ import annotations

import pytest

import surgery
from surgery.planning.formulas import formulas

_USED = "{{ param A[out, in] = 0 return q * A }}\ntarget linear {{ add u(1, 1) }}"


def told(text: str) -> list[tuple[str, str]]:
    """The code of each mistake, and the text that it points at."""
    return [(d.code, d.span.source.text[d.span.start:d.span.end]) for d in surgery.check(surgery.parse(text))
            if d.span is not None and d.severity == "error"]


@pytest.mark.parametrize("default, code", [
    ('"a"', "wrong-type"), ("true", "wrong-type"), ("nope", "unknown-name"), ("None", "unknown-name"),
    ("4%", "wrong-type"), ("out", "unknown-name"), ("r", "unknown-name"), ("1 / 0", "bad-value"),
])
def test_a_default_is_of_its_type_where_every_call_gives_another_value_too(default: str, code: str) -> None:
    head = f"update u(q: float = 1, r: int = {default}) "
    assert [found for found, _ in told(head + _USED.format())] == [code]
    assert [found for found, _ in told(head + _USED.format().replace("u(1, 1)", "u()"))] == [code]  # and once


@pytest.mark.parametrize("head", [
    "update u(q: float = 2, r: int = 2 * 3)", "update u(q: float = 2, r: float = q / 2)", "update u(q: float, r: int)",
    "update u(q: int = 3, r: int = q + 1)", "update u(q: int, r: float = sqrt(q))",
])
def test_a_default_may_name_the_parameters_before_it(head: str) -> None:
    assert told(f"{head} {_USED.format()}") == []


@pytest.mark.parametrize("condition", ["1", '"a"', "r", "0", "r + 1"])
def test_a_check_is_a_condition_as_that_of_an_if_is(condition: str) -> None:
    of_spec = f"spec s(r: int = 4)\ncheck {condition}\ntarget linear {{ add low_rank(r) }}"
    assert told(of_spec) == [("wrong-type", condition)]
    of_definition = (f"update u(r: int = 4) {{ check {condition}  param A[out, in] = 0  return r * A }}\n"
                     "target linear { add u() }")
    assert told(of_definition) == [("wrong-type", condition)]


@pytest.mark.parametrize("call, by_two", [
    ("min(8, out, in)", "min(min(8, out), in)"), ("max(2, 4, 1, 3)", "4"),
    ("kron(ones(2), ones(3), ones(2))", "kron(kron(ones(2), ones(3)), ones(2))"),
    ("side_by_side(W, W, W)", "side_by_side(side_by_side(W, W), W)"),
    ("stacked(W, 2 * W, W)", "stacked(stacked(W, 2 * W), W)"), ("max(W, 0, 0.5 * W)", "max(max(W, 0), 0.5 * W)"),
])
def test_any_number_of_arguments_is_taken_from_the_left(call: str, by_two: str) -> None:
    text = "update u() {{ let a = {}  param A[out, in] = 0  return {} * A }}\ntarget linear {{ add u() }}"
    use = "norm(a)" if "W" in call or "ones" in call else "a"
    first, second = (formulas(surgery.parse(text.format(each, use)))[0][1].weight for each in (call, by_two))
    assert first is second


def test_arguments_of_another_kind_or_number_are_told() -> None:
    text = "update u() {{ param A[out, in] = 0  return {} * A }}\ntarget linear {{ add u() }}"
    assert told(text.format("norm(side_by_side(W, W, true))")) == [("wrong-type", "true")]
    assert [code for code, _ in told(text.format("norm(stacked(W, W, W.T @ W @ W.T, W))"))] == ["shape-mismatch"]
    many = "min({})".format(", ".join(["1"] * 33))
    assert [code for code, _ in told(text.format(many))] == ["unknown-argument"]
    assert told(text.format("max(1, 2, a = 3)")) == [("unknown-argument", "max(1, 2, a = 3)")]


def test_a_misspelt_kind_is_told_as_one() -> None:
    (found,) = surgery.check(surgery.parse("target liear { add low_rank() }"))
    assert (found.code, found.helps) == ("unknown-selector", ("did you mean `linear`?",))
