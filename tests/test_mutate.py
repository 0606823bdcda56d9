"""The mistakes that `python dev.py mutate` makes: programs still, and others than those that stand there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import ROOT, drawn, mistakes


def test_a_mistake_is_another_program():
    path = Path(__file__).relative_to(ROOT).with_name("mutate.py")
    source, known = (ROOT / path).read_bytes(), list(mistakes(path))
    chosen = drawn(known, seed=0)[:40]
    assert len({mistake.what for mistake in known}) >= 12
    assert chosen == drawn(known, seed=0)[:40] != drawn(known, seed=1)[:40]
    for mistake in chosen:
        assert ast.dump(ast.parse(mistake.put_in(source))) != ast.dump(ast.parse(source)), mistake.shown(source)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to this bound")
def test_a_process_that_takes_too_much_memory_is_stopped():
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]}\nfrom mutate import "
           "bound_memory\nbound_memory(2**28)\nprint(len(bytearray(2**27)), flush=True)\nbytearray(2**29)"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"{2**27}\n") and done.stderr.strip().endswith("MemoryError")
