"""The mistakes that `python dev.py mutate` makes: programs still, and others than those that stand there."""

from __future__ import annotations

import ast
from pathlib import Path

from mutate import ROOT, drawn, mistakes


def test_a_mistake_is_another_program():
    path = Path(__file__).relative_to(ROOT).with_name("mutate.py")
    source, known = (ROOT / path).read_bytes(), list(mistakes(path))
    chosen = drawn(known, seed=0)[:40]
    assert len({mistake.what for mistake in known}) >= 12
    assert chosen == drawn(known, seed=0)[:40] != drawn(known, seed=1)[:40]
    for mistake in chosen:
        assert ast.dump(ast.parse(mistake.put_in(source))) != ast.dump(ast.parse(source)), mistake.shown(source)
