"""`surgery console`: a line at a time, what it is and what would run."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.planning.console import Console
from surgery.semantics.resolved_spec import resolved


def test_a_line_at_a_time() -> None:
    console = Console()
    said = {"param A[4, in] ~ normal(std = 0.02)": "A : [4, in]", "frozen param M[out, in] = W": "M : [out, in]",
             "let U = low_rank(2)": "U : [out, in]", "2 * out": "size `2 out`", "A @ A.T": "A Aᵀ : [4, 4]",
             "param A[3, in] ~ normal(std = 1)": "A : [3, in]", "A @ W.T": "A Wᵀ : [3, out]", "U @ A.T": "8 B A"}
    for line, text in said.items():
        assert console.tell(line).text.startswith(text)
    assert len(console.statements) == 3  # A was said twice


@pytest.mark.parametrize(("line", "code"), [
    ("A @", "syntax"), ("A @ A", "shape-mismatch"), ("param A[out] = W", "shape-mismatch"),
    ("nope(A)", "unknown-primitive"),
    ("return A", "syntax"), ("param in = 3", "duplicate-name"), ("}", "syntax"),
])
def test_a_mistake_changes_nothing(line: str, code: str) -> None:
    console = Console()
    console.tell("param A[4, in] ~ normal(std = 0.02)")
    before = list(console.statements)
    with pytest.raises(SurgeryError) as told:
        console.tell(line)
    assert told.value.diagnostics[0].code == code and console.statements == before
    assert told.value.diagnostics[0].span is not None


def test_what_has_the_shape_of_a_weight_is_shown_as_it_runs() -> None:
    lines = "param A[4, in] ~ normal(std = 0.02)\n\nA @ A\nparam B[out, 4] = 0\nB @ A\nA @ A\n"
    result = CliRunner().invoke(main, ["console", "--shape", "64,128"], input=lines)
    assert result.exit_code == 0 and result.stderr.count("error[shape-mismatch]") == 2
    assert "B A : [out, in]" in result.stdout and "def body(layer, x, a0, a1):" in result.stdout
    spec = Console().tell("W * 2").spec
    assert spec is not None
    ((_, formula),) = resolved(spec).formulas(6, 4)
    assert formula.weight.op == "add" and formula.weight.shape == (6, 4)
    assert CliRunner().invoke(main, ["console", "--json"], input="").exit_code == 2
