"""What is said of the suite's time after a run: what has grown, at the speed of the machine."""

import tomllib
from pathlib import Path

from cpu_seconds import COLLECTED, known, summary, written
from workers import is_left_out

ROOT = Path(__file__).parents[1]
BEFORE = {"tests/ir/test_a.py": 10.0, "tests/ir/test_b.py": 5.0, "tests/test_c.py": 3.0, COLLECTED: 20.0}


def test_what_has_grown_or_is_new_is_told_on_a_slower_machine() -> None:
    now = {file: 2 * took for file, took in BEFORE.items()} | {"tests/ir/test_b.py": 17.0, "tests/cli/test_d.py": 6.0}
    first, second, *grown = summary(now, BEFORE)
    assert first == "89 seconds of CPU: importing and collecting 40, ir 37, others 6, cli 6"
    assert second == "tests/cpu_seconds.txt has 38, which are 76 here"
    assert grown == ["  tests/ir/test_b.py: 17.0, and it was 10.0", "  tests/cli/test_d.py: 6.0, and it was less than 2"]
    assert len(summary({file: 2 * took for file, took in BEFORE.items()}, BEFORE)) == 2 and len(summary(now, {})) == 1


def test_what_is_small_is_written_as_one_sum() -> None:
    assert written({**BEFORE, "tests/ir/test_e.py": 0.5, "tests/ir/test_f.py": 0.7}).splitlines()[-2:] == [
        "   3.0 tests/test_c.py", "   1.2 the rest"]


def test_what_is_known_is_of_files_that_there_are() -> None:
    assert [file for file in known() if "/" in file and not (ROOT / file).exists()] == []


def test_files_of_which_nothing_is_asked_for_are_not_imported() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    assert is_left_out("test_gpu.py", options.split("'")[1]) and is_left_out("test_gpu_kernels.py", "fast")
    assert not is_left_out("test_gpu.py", "gpu") and not is_left_out("test_cli.py", "not gpu") and is_left_out("test_cli.py", "fast")
