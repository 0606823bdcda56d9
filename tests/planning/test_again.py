"""A spec that is put on several models is read once, and says the same of each."""

import pytest
from torch import nn

import surgery
from surgery.language.library import load, parse
from surgery.planning.compile import compile
from surgery.semantics import lint as lint_module

UNUSED = """update own(r: int = 2, never: int = 3) {
  param A[r, in] ~ kaiming_uniform()
  param B[out, r] = 0
  return B @ A
}
target linear { add own() }
"""


def model(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(n, n) for n in sizes))


def test_its_names_are_resolved_once_and_its_formulas_are_those_of_each_model(monkeypatch):
    calls, lint = [], lint_module.lint
    monkeypatch.setattr(lint_module, "lint", lambda resolved: calls.append(1) or lint(resolved))
    spec = parse("target linear { add low_rank(2) }")
    plans = [compile(model(*sizes), spec) for sizes in ((4, 6), (6, 8), (4, 6))]
    assert calls == [1] and [plan.trainable for plan in plans] == [40, 56, 40]
    compile(model(4), parse("target linear { add low_rank(2) }"))
    assert calls == [1, 1]


def test_warnings_are_told_each_time_with_the_places_of_that_very_text():
    spec, below = parse(UNUSED), parse("# one line more\n" + UNUSED)
    assert spec == below  # but for where it stands
    for each, line in ((spec, 1), (below, 2), (spec, 1)):
        (warning,) = compile(model(4), each).warnings
        assert (warning.code, warning.span.line) == ("unused", line)


def test_mistakes_are_told_each_time():
    spec = parse("target linear { add low_rank(nothing) }")
    for _ in range(2):
        with pytest.raises(surgery.SurgeryError, match="nothing"):
            compile(model(4), spec)


def test_a_file_that_it_uses_may_change(tmp_path):
    (tmp_path / "a.surg").write_text(UNUSED[:UNUSED.index("target")].replace(", never: int = 3", ""))
    (tmp_path / "b.surg").write_text('use "a.surg"\ntarget linear { add own() }\n')
    spec = load(tmp_path / "b.surg")
    assert compile(model(4), spec).trainable == 16
    (tmp_path / "a.surg").write_text((tmp_path / "a.surg").read_text().replace("int = 2", "int = 3"))
    assert compile(model(4), spec).trainable == 24
