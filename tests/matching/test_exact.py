"""Names as patterns: they match the names, and nothing else."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.matching.patterns import compile_pattern
from surgery.matching.patterns_from_names import patterns

SEGMENTS = ("layers", "0", "1", "2", "3", "q", "k", "mlp")
ALL = [".".join(parts) for length in (1, 2, 3) for parts in product(SEGMENTS, repeat=length)]


@pytest.mark.parametrize("names, wanted", [
    (["a.q"], ["a.q"]),
    ([f"layers.{i}.q" for i in range(4)], ["layers.{0..3}.q"]),
    ([f"layers.{i}.{m}" for i in (0, 1, 3) for m in "qk"], ["layers.{0..1,3}.{q,k}"]),
    (["layers.0.q", "layers.1.k"], ["layers.0.q", "layers.1.k"]),
    ([f"l.{i}.e.{j}" for i in range(2) for j in range(3)] + ["l.2.e.0"], ["l.{0..1}.e.{0..2}", "l.2.e.0"]),
    (["h.0.attn.c", "h.1.attn.c", "h.0.mlp.c", "h.1.mlp.c"], ["h.{0..1}.{attn,mlp}.c"]),
    ([], []),
])
def test_patterns(names: list[str], wanted: list[str]) -> None:
    assert list(patterns(names)) == wanted


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(ALL), max_size=40))
def test_they_match_the_names_and_no_other(names: set[str]) -> None:
    globs = [compile_pattern(text) for text in patterns(sorted(names))]
    assert {name for name in ALL if any(g.matches(name, {}) for g in globs)} == names
