"""`language 1` above a spec: kept by whatever writes specs, and a newer one refused before anything else is read."""

from __future__ import annotations

import pytest
import torch

from surgery.diagnostics import SurgeryError
from surgery.language.formatter import format_text
from surgery.language.library import parse
from surgery.language.to_python import python_text
from surgery.language.tree import Spec
from surgery.runtime.apply import apply

TEXT = """# What this file is about.
language 1  # the first

# LoRA.
spec s()

target linear {
  add low_rank()
}
"""


def test_it_is_kept_in_text_json_and_python():
    spec = parse(TEXT)
    assert spec.language == 1 and spec.doc == "LoRA."
    assert format_text(TEXT) == TEXT == spec.to_surg()
    assert Spec.model_validate_json(spec.model_dump_json()) == spec != parse(TEXT.replace("language 1", ""))
    made: dict = {}
    exec(python_text(spec), made)
    assert made["spec"] == spec and made["spec"].to_surg().startswith("language 1\n\nspec s()")


def test_a_saved_adapter_keeps_it(tmp_path):
    apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), parse(TEXT)).save(tmp_path / "adapter")
    assert parse((tmp_path / "adapter" / "adapter.surg").read_text()).language == 1


def test_a_parameter_may_be_called_language():
    assert parse('spec s(language: int = 2)\ntarget linear { add low_rank(language) }').language is None


@pytest.mark.parametrize("text", ["language 2\nspec s() what ever it then says {",
                                  "\ufeff# a\n\n# b\nlanguage 99 spec s()", f"language {'9' * 5000}"])
def test_a_newer_one_is_refused_alone(text):
    with pytest.raises(SurgeryError) as told:
        parse(text)
    assert [d.code for d in told.value.diagnostics] == ["newer-language"]
    assert "install a newer version of surgery" in told.value.diagnostics[0].helps


def test_python_and_json_are_refused_as_the_text_is():
    for make in (lambda: Spec("s", language=2), lambda: Spec.model_validate_json('{"name": "s", "language": 2}')):
        with pytest.raises(SurgeryError) as told:
            make()
        assert [d.code for d in told.value.diagnostics] == ["newer-language"]


@pytest.mark.parametrize("text", ["language 0\nspec s()", "language 1.5\nspec s()", "language\nspec s()", "language 5%",
                                  "spec s()\nlanguage 1", "language 1\nlanguage 1\nspec s()"])
def test_what_is_no_version_is_told(text):
    with pytest.raises(SurgeryError) as told:
        parse(text)
    assert {d.code for d in told.value.diagnostics} == {"syntax"}
