"""The setting of theorem 1 of Chang et al. (arXiv 2511.00051): a rank-r update and a conditioned one of higher rank."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.analysis.spectra import Spectrum

FOLDER = Path(__file__).parents[2] / "examples" / "entropy"


def module():
    found = importlib.util.spec_from_file_location("entropy", FOLDER / "entropy.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


example = module()
shares = st.lists(st.floats(1e-3, 1), min_size=3,
                  max_size=12).map(lambda w: tuple(sorted((x / sum(w) for x in w), reverse=True)))


def spectrum(p: tuple[float, ...]) -> Spectrum:
    """Of a matrix that has the values p."""
    return Spectrum.of(torch.diag(torch.tensor(p, dtype=torch.float64)))


@given(shares, st.integers(1, 12))
def test_the_chain_rule(p, r):
    found = example.parts(p, r)
    whole = found["h"] + (1 - found["t"]) * found["head"] + found["t"] * found["tail"]
    assert spectrum(p).entropy == pytest.approx(whole, abs=1e-9)


@given(shares)
def test_a_rank_r_update_has_at_most_log_r(p):
    found = spectrum(p)
    assert found.entropy <= math.log(found.numerical_rank) + 1e-12
    assert found.effective_rank <= found.numerical_rank * (1 + 1e-12)
    assert spectrum((1.0,) * len(p)).entropy == pytest.approx(math.log(len(p)))


@given(shares, st.integers(1, 11))
def test_when_a_tail_raises_the_entropy(p, r):
    """Exactly where h(t) / t > H(head) - H(tail); always, where the tail is at least as spread as the head."""
    found = example.parts(p, r)
    if found["t"] > 0:
        gain = spectrum(p).entropy - found["head"]
        margin = found["h"] / found["t"] - (found["head"] - found["tail"])
        assert abs(margin) < 1e-9 or (gain > 0) == (margin > 0)
        assert gain > 0 or found["tail"] < found["head"]


@pytest.mark.parametrize("spread", [s for s in example.SPREADS if s])
def test_gains_on_every_row_beat_every_update_of_that_rank(spread):
    updates = example.updates(spread)
    assert Spectrum.of(updates["lora"]).entropy == pytest.approx(math.log(example.RANK))
    for method in ("pre_diag", "post_diag"):
        found = Spectrum.of(updates[method])
        assert found.numerical_rank > example.RANK and found.effective_rank > example.RANK
        assert found.entropy > math.log(example.RANK)


def test_higher_rank_alone_is_not_enough():
    small, large = (Spectrum.of(example.updates(spread)["one gain"]) for spread in (1e-3, 1.0))
    assert small.numerical_rank == large.numerical_rank == example.RANK + 1
    assert small.entropy > math.log(example.RANK) > large.entropy


def test_the_readme_shows_what_the_example_prints(capsys):
    example.main()
    assert f"```console\n{capsys.readouterr().out}```" in (FOLDER / "README.md").read_text(encoding="utf-8")
