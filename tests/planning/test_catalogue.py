"""What ships: each spec with its formula and figures, and short."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
from click.testing import CliRunner
from methods_table import PAGE, README, counted, page, without_estimates

from surgery.cli.main import main
from surgery.cli.specs import specs
from surgery.language.library import shipped
from surgery.planning import shipped_specs
from surgery.planning.families import FAMILIES

LINES = {"glora": 18}  # of a method's spec without comments and blank lines, where it takes more than the usual ones
USUAL_LINES = 15
entries = cache(shipped_specs.catalogue)


def test_each_spec_has_its_figures():
    of = {entry.name: entry for entry in entries()}
    assert list(of) == list(shipped())
    assert of["lora"].parameters == 8 * (1024 + 4096) and of["oft"].parameters == 4096 * 32
    assert of["dora"].paper == "arXiv 2402.09353"
    assert {e.name for e in of.values() if e.parameters is None} == {"bitfit", "ln_tuning"}
    for entry in of.values():
        assert entry.description and (entry.step_ratio is None or entry.step_ratio >= 1), entry.name
    assert of["lora_ga"].data == ("G",) and of["eva"].data == ("C",) and of["lora_xs"].data == ()
    cheap = {"lora", "dora", "pre_diag", "post_diag", "sora", "oft", "boft", "hra", "loha", "lokr", "c3a", "road_1"}
    assert {of[name].program for name in cheap} == {"activations", "activations, W' at once", "joined blocks"}
    assert of["hira"].program == of["fourierft"].program == "dense"


@pytest.mark.parametrize("name", shipped())
def test_a_method_is_a_short_spec(name):
    text = re.sub(r"\(\n[^)]*\)", "()", shipped()[name].read_text(encoding="utf-8"))  # a long signature counts once
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) <= LINES.get(name, USUAL_LINES)


@pytest.fixture
def listed(monkeypatch):
    """The command, with the catalogue that is made already."""
    monkeypatch.setattr(shipped_specs, "catalogue", entries)


def test_the_command_lists_them(listed):
    told = CliRunner().invoke(main, ["specs"])
    assert told.exit_code == 0 and len(told.stdout.splitlines()) == 1 + len(shipped())
    found = json.loads(CliRunner().invoke(main, ["specs", "--json"]).stdout)["specs"]
    assert [each["name"] for each in found] == list(shipped())


def test_the_command_lists_a_family(listed):
    told = json.loads(CliRunner().invoke(main, ["specs", "--family", "orthogonal", "--json"]).stdout)["specs"]
    names = {each["name"] for each in told}
    assert {"sora", "oft", "hoft", "psoft", "polar"} <= names and not names & {"lora", "dora", "post_diag"}
    of = {each.name: set(each.families) for each in entries()}
    assert of["sora"] == {"additive", "multiplicative", "orthogonal", "diagonal"}
    assert of["dora"] == {"additive", "multiplicative", "magnitude"} and of["ln_tuning"] == {"unfrozen"}
    assert of["vera"] == {"additive", "shared"} and of["hira"] == {"additive", "hadamard"}
    assert of["rosa"] == {"additive", "sparse"} and of["pissa"] == {"additive", "spectral"}
    assert "bias" in of["red"] and set().union(*of.values()) == set(FAMILIES)


def test_each_family_can_be_asked_for():
    (option,) = (each for each in specs.params if each.name == "family")
    assert tuple(option.type.choices) == tuple(FAMILIES)


def test_the_page_of_methods_and_the_readme_are_of_these_specs():
    """`python tests/methods_table.py` writes them."""
    assert counted(readme := README.read_text(encoding="utf-8")) == readme and f"the {len(shipped())} published" in readme
    assert without_estimates(PAGE.read_text(encoding="utf-8")) == without_estimates(page(entries()))
