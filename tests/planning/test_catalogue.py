"""What ships: each spec with its formula and figures, and short."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.language.library import shipped
from surgery.planning.shipped_specs import catalogue

LINES = {"glora": 18}  # of a method's spec without comments and blank lines, where it takes more than the usual ones
USUAL_LINES = 15


def test_each_spec_has_its_figures():
    entries = {entry.name: entry for entry in catalogue()}
    assert list(entries) == list(shipped())
    assert entries["lora"].parameters == 8 * (1024 + 4096) and entries["oft"].parameters == 4096 * 32
    assert entries["dora"].paper == "arXiv 2402.09353"
    assert {e.name for e in entries.values() if e.parameters is None} == {"bitfit", "ln_tuning"}
    for entry in entries.values():
        assert entry.description and (entry.step_ratio is None or entry.step_ratio >= 1), entry.name
    cheap = {"lora", "dora", "pre_diag", "post_diag", "sora", "oft", "boft", "hra", "loha", "lokr", "c3a", "road_1"}
    assert {entries[name].program for name in cheap} == {"activations", "joined blocks"}
    assert entries["hira"].program == entries["fourierft"].program == "dense"


@pytest.mark.parametrize("name", shipped())
def test_a_method_is_a_short_spec(name):
    text = re.sub(r"\(\n[^)]*\)", "()", shipped()[name].read_text(encoding="utf-8"))  # a long signature counts once
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) <= LINES.get(name, USUAL_LINES)


def test_the_command_lists_them():
    told = CliRunner().invoke(main, ["specs"])
    assert told.exit_code == 0 and len(told.stdout.splitlines()) == 1 + len(shipped())
    found = json.loads(CliRunner().invoke(main, ["specs", "--json"]).stdout)["specs"]
    assert [each["name"] for each in found] == list(shipped())


def test_no_torch_is_needed():
    code = ("import sys; from surgery.planning.shipped_specs import catalogue; catalogue(); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
