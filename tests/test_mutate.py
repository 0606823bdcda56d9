"""The mistakes that `python dev.py mutate` makes: programs still, and others than those that stand there."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import ROOT, Mistake, Watch, drawn, mistakes, order_for


def test_a_mistake_is_another_program():
    path = Path(__file__).relative_to(ROOT).with_name("mutate.py")
    source, known = (ROOT / path).read_bytes(), list(mistakes(path))
    chosen = drawn(known, seed=0)[:40]
    assert len({mistake.what for mistake in known}) >= 12
    assert chosen == drawn(known, seed=0)[:40] != drawn(known, seed=1)[:40]
    for mistake in chosen:
        assert ast.dump(ast.parse(mistake.put_in(source))) != ast.dump(ast.parse(source)), mistake.shown(source)


def test_a_mistake_meets_first_the_quick_tests_that_reach_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "module.py"
    path.write_text("TABLE = (\n    1,\n    2)\n\n\ndef f(a):\n    return a + 1 if a else \\\n        a - 1\n")
    watch, before = Watch({str(path): {2, 7, 8}}), sys.gettrace()
    try:
        watch.pytest_sessionstart()
        f = runpy.run_path(str(path))["f"]
        for test, argument in (("t.py::slow", 1), ("t.py::quick", 2), ("t.py::other", None), ("t.py::none", 0)):
            watch.pytest_runtest_logstart(test)
            argument is None or f(argument)
    finally:
        said = watch.answer()
        sys.settrace(before)
    assert said["reached"] == {"t.py::slow": [("module.py", 7)], "t.py::quick": [("module.py", 7)],
                               "t.py::none": [("module.py", 7), ("module.py", 8)]}
    seconds = {"t.py::slow": 9.0, "t.py::other": 2.0, "t.py::quick": 1.0, "t.py::none": 3.0}
    study = {"t.py": {**said, "seconds": seconds, "took": 15.0},
             "u.py": {"reached": {}, "seconds": {"u.py::u": 1.0}, "took": 1.0}}

    def order(line: int) -> list[str]:
        text = path.read_bytes().splitlines(keepends=True)
        end = len(b"".join(text[:line])) - 1
        return [name.rpartition(":")[2] for name in order_for(
            Mistake(Path("module.py"), line, end - 1, end, "", ""), tmp_path, study)]

    assert order(7) == ["quick", "none", "slow", "other"]
    assert order(8) == ["none", "slow", "other", "quick"]
    assert order(2) == ["u", "slow", "other", "quick", "none"]  # a constant that no line of the program stands for


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to this bound")
def test_a_process_that_takes_too_much_memory_is_stopped():
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]}\nfrom mutate import "
           "bound_memory\nbound_memory(2**28)\nprint(len(bytearray(2**27)), flush=True)\nbytearray(2**29)"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"{2**27}\n") and done.stderr.strip().endswith("MemoryError")
