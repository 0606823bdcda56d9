"""A model's name for a model, a spec before it, a folder for a surgeon: a diagnostic says what is needed, and how to get it.

A warning is at the user's line, and not in the decorator that checks the arguments."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import surgery
from surgery.diagnostics import SurgeryError

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4))
SPEC = surgery.parse("target linear { add low_rank(rank = 2) }")


@pytest.mark.parametrize("call, words", [
    (lambda: surgery.apply(SPEC, MODEL), ("a model is needed", "this is a spec", "the model comes first")),
    (lambda: surgery.apply("demo:llama", "lora"), ("a model is needed", 'surgery.load_model("demo:llama")')),
    (lambda: surgery.apply(Path("/a/b"), "lora"), ("a model is needed", 'surgery.load_model("/a/b")')),
    (lambda: surgery.apply(MODEL.state_dict(), "lora"), ("a model is needed", "of the type OrderedDict")),
    (lambda: surgery.apply(model=None, spec="lora"), ("a model is needed", "of the type NoneType")),
    (lambda: surgery.apply(MODEL, {"r": 8}), ("a spec, its path or name", "rank=8")),
    (lambda: surgery.apply(MODEL, spec=MODEL), ("a spec, its path or name", "this is a model")),
    (lambda: surgery.plan(SPEC, MODEL), ("the model comes first",)),
    (lambda: surgery.plan("demo:llama", "lora"), ("surgery.load_model",)),
    (lambda: surgery.explain("demo:llama", SPEC, "q"), ("surgery.load_model",)),
    (lambda: surgery.modules("demo:llama"), ("surgery.load_model",)),
    (lambda: surgery.Surgeries("demo:llama"), ("surgery.load_model",)),
    (lambda: surgery.attach(MODEL, SPEC), ("a folder's path", "surgery.apply(model, spec)")),
    (lambda: surgery.attach("out", MODEL), ("a model is needed",)),
    (lambda: surgery.export_peft("out", "peft"), ("a surgeon is needed", 'surgery.attach(model, "out")')),
    (lambda: surgery.export_peft(MODEL, "peft"), ("a surgeon is needed", "surgery.apply(model, spec)")),
    (lambda: surgery.save_merged(MODEL, "out"), ("a surgeon is needed",)),
    (lambda: surgery.import_peft("out", MODEL), ("a model is needed",)),
    (lambda: surgery.load(5), ("a path or a name", "of the type int")),
    (lambda: surgery.parse(b"spec a"), ("a text is needed", "decode()")),
    (lambda: surgery.parse(Path("a.surg")), ("a text is needed", 'surgery.load("a.surg")')),
    (lambda: surgery.check(MODEL), ("a spec, its path or name", "this is a model")),
    (lambda: surgery.load_model(Path("/tmp")), ("a model's name", "str(path)")),
    (lambda: SPEC.retarget(["**.q_proj"]), ("a pattern is a text", "side by side")),
    (lambda: surgery.parse('{"peft_type": "LORA", "r": 8}'), ("looks like JSON",)),
])
def test_what_is_of_another_sort_is_told(call, words) -> None:
    with pytest.raises(SurgeryError) as told:
        call()
    text = str(told.value).replace("'", '"')
    assert [word for word in words if word.replace("'", '"') not in text] == []


def test_a_surgeon_is_no_model_and_no_folder() -> None:
    surgeon = surgery.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), SPEC)
    with pytest.raises(SurgeryError, match=r"surgeon\.model"):
        surgery.apply(surgeon, "lora")
    with pytest.raises(SurgeryError, match=r"surgeon\.save"):
        surgery.attach(surgeon.model, surgeon)
    with pytest.raises(SurgeryError, match="a folder's path"):
        surgeon.save(None)


# -------------------------------------------------------------------------------------------- where warnings come from


def saved(folder: Path) -> torch.nn.Module:
    """Another base model than the adapter's that is saved in `folder`."""
    surgery.apply(torch.nn.Sequential(torch.nn.Linear(5, 4)), SPEC, check=False).save(folder)
    return torch.nn.Sequential(torch.nn.Linear(5, 4))


def edited() -> surgery.Surgeon:
    """A surgeon whose merged weight was written into, which is lost when it is unmerged."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    surgeon = surgery.apply(model, SPEC, check=False)
    surgeon.merge()
    model[0].weight.data.mul_(2)
    return surgeon


@pytest.mark.parametrize("call", [
    lambda folder: surgery.apply(torch.nn.Sequential(torch.nn.Linear(5, 4)), surgery.parse(
        "update u { param A[out, in] = 0 return 0 * A } target linear { add u() }"), check=False),
    lambda folder: surgery.attach(saved(folder), folder),
    lambda folder: edited().unmerge(),
    lambda folder: edited().remove(),
], ids=["apply", "attach", "unmerge", "remove"])
def test_a_warning_is_at_the_line_that_called_us(call, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(tmp_path / "adapter")
    assert told and {each.filename for each in told} == {__file__}
