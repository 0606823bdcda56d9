"""How values lie in memory where a product reads them: as a CPU reads them best."""

from __future__ import annotations

import pytest
import torch
from formulas import formula

from surgery.codegen.compiled import Compiled
from surgery.codegen.kernels import in_columns
from surgery.codegen.program_text import step_text
from surgery.language.library import load


@pytest.mark.parametrize("rank, turned", [(1, 0), (2, 1), (8, 1), (11, 1), (12, 0), (16, 0)])
def test_a_few_columns_lie_one_after_the_other_where_a_product_sums_over_them(rank, turned):
    plan = Compiled.supposed(formula(load("lora", rank=rank))).candidates()[0]
    step = step_text(plan.written, plan.needs)
    assert step is not None and step.source.count("in_columns(") == turned
    for others in (step_text(plan.written, plan.needs, frozen_last=True), step_text(plan.written, (False,) * 3)):
        assert others is not None and "in_columns" not in others.source


def test_what_lies_so_is_not_copied():
    a = torch.randn(5, 3)
    assert torch.equal(in_columns(a), a) and in_columns(a).stride() == (1, 5)
    assert in_columns(a.mT).data_ptr() == a.data_ptr()
