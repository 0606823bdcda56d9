"""A condition on sizes that are not known yet: both sides are read, and neither is taken for the other."""

from __future__ import annotations

import pytest

import surgery
from surgery.planning.formulas import formula_lines, formulas

TEXT = """spec s()
update own() {{
  param A[2, 2] ~ normal()
  param B[out, 2] = 0
  param C[2, in] ~ normal()
  return B @ ({part}) @ C
}}
target linear "**" {{ add own() }}"""


@pytest.mark.parametrize("part, shown", [
    ("if out < in then A.T else A", "if out < in then A.T else A"),
    ("if out < in then 2 * A else A @ A", "if out < in then 2 * A else A @ A"),
    ("if out < in then A else A", None),
    ("if 3 < 2 then A.T else A", None),
])
def test_a_side_is_shown_alone_only_where_both_are_one(part: str, shown: str | None) -> None:
    ((target, formula),) = formulas(surgery.parse(TEXT.format(part=part)))
    page = "\n".join(formula_lines(target, formula))
    assert (f"({shown})" in page) if shown else ("if" not in page and "B A C" in page)
