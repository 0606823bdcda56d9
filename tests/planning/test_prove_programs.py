"""`check` computes that programs give the values and gradients of their formula: a strategy with a mistake is seen."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.codegen import candidates
from surgery.ir.operations import constant, make
from surgery.planning.check import check

# of each kind of layer, with noise, dropout, a bias and a claim
KINDS = """spec s()
update u(rank: int) {{
  param A[rank, in] ~ kaiming_uniform()
  param B[out, rank] = 0
  noise m[rank] ~ bernoulli(0.5)
  return B @ diag(m) @ A
}}
target {kind} {{
  add u({rank})
  add shift()
  post magnitude() with bias
}}
"""


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "norm"])
def test_programs_of_every_kind_are_right(kind: str) -> None:
    text = KINDS.format(kind=kind, rank=2) if kind != "norm" else "target norm { pre diagonal() add shift() }"
    assert [d for d in check(surgery.parse(text), prove=True) if d.severity == "error"] == []


def test_a_bias_that_trains_beside_a_weight_that_is_made_at_once_counts_once() -> None:
    """It stands in both ways of such a program, and was said to have twice its gradient: a mistake of ours."""
    text = """update dense() { param z[out, in] = 0 return relu(z) / 4 }
    target linear shifted { add dense() add shift() }"""
    assert [d for d in check(surgery.parse(text), prove=True) if d.severity == "error"] == []


@pytest.mark.parametrize(("rank", "wrong"), [
    (3, lambda y: make("mul", constant(1.001), y)), (4, lambda y: make("detach", y)),
    (5, lambda y: make("add", y, make("mul", constant(1e-4), y)))], ids=["value", "gradient", "a little"])
def test_a_wrong_program_is_seen(rank: int, wrong, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    right = candidates.STRATEGIES["activations"]
    monkeypatch.setitem(candidates.STRATEGIES, "activations", lambda *given: wrong(right(*given)))
    (tmp_path / "s.surg").write_text(f"target linear {{ add low_rank(1{rank}, alpha = {rank}) }}")
    # the text means what its expression says: of that alone nothing is wrong
    assert check(tmp_path / "s.surg") == []
    (told,) = check(tmp_path / "s.surg", prove=True)
    assert told.code == "internal" and "does not compute its formula" in told.message
    assert "activations" in told.notes[0]
    result = CliRunner().invoke(main, ["check", str(tmp_path / "s.surg"), "--prove"])
    assert result.exit_code == 2 and "error[internal]" in result.stderr
