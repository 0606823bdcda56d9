"""Specs as a whole: where they are found, how they are changed, and what is in scope in them."""

import pickle
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnosed import refusal
from torch.nn import Linear

import surgery
from surgery import Spec, Target, add
from surgery.language.library import assignment, inlined, library, locate

pytestmark = pytest.mark.usefixtures("folder")

LORA = "spec lora(rank: int = 8)\n\ntarget linear \"**.q_proj\" {\n  add low_rank(rank)\n}\n"


# -------------------------------------------------------------------------------------------------------- where from


def test_a_path_and_a_shipped_name() -> None:
    Path("mine.surg").write_text(LORA)
    assert surgery.load("mine.surg") == surgery.load(Path("mine.surg")) == surgery.parse(LORA)
    assert surgery.load("lora").name == "lora" and locate("lora") == surgery.shipped()["lora"]
    assert "low_rank" in {d.name for d in surgery.load("std").definitions}


def test_a_file_without_an_ending_outweighs_a_shipped_name() -> None:
    Path("sora").write_text(LORA)
    assert surgery.load("sora").name == "lora"


@pytest.mark.parametrize("name, words", [
    ("soar", "did you mean `sora`?"), ("mine.surg", "did you mean `mines.surg`?"),
    ("sora.surg", "`sora` is the name of a spec that ships"),
    (".", "name its files: *.surg"), ("zzz", "`surgery specs` lists those that ship"),
])
def test_what_is_not_there(name: str, words: str) -> None:
    Path("mines.surg").write_text(LORA)
    assert words in refusal(surgery.load, name)


# ----------------------------------------------------------------------------------------------------------- changed


def test_parameters() -> None:
    spec = surgery.load("lora", rank=4, alpha="2 * 4")
    assert [str(p.default) for p in spec.params[:1]] == [str(surgery.load("lora", rank="4").params[0].default)]
    assert "rank: int = 4, alpha: float = 2 * 4" in spec.to_surg()
    assert "has no parameter `rnk`" in refusal(surgery.load, "lora", rnk=4, rank=4)


@pytest.mark.parametrize("text, place",
                         [("rank=8 *", "<--set>:1:9"), ("rank", "<--set>:1:1"), (" rank = 2 @", "<--set>:1:12")])
def test_an_assignment_is_shown_as_it_was_typed(text: str, place: str) -> None:
    said = refusal(assignment, text)
    assert f"--> {place}\n" in said and f"1  | {text}\n" in said


def test_an_assignment_s_name_has_a_place() -> None:
    found = assignment(" rnk = 8")
    assert (found.name, str(found.name_span), str(found.value.span)) == ("rnk", "<--set>:1:2", "<--set>:1:8")


def test_retarget() -> None:
    spec = surgery.load("lora").retarget("**.q_proj", "mlp")
    assert 'target linear "**.q_proj", mlp {' in spec.to_surg()
    assert surgery.load("lora").retarget("queries").targets[0].selectors[0].text == "queries"


def test_one_of_several_targets_takes_other_modules() -> None:
    ia3 = surgery.load("ia3")
    (keys, other), before = ia3.retarget("**.k_proj", at=1).targets, ia3.targets
    assert [s.text for s in keys.selectors] == ["**.k_proj"] and keys.steps == before[0].steps and other == before[1]
    assert "2 targets" in refusal(ia3.retarget, "**.k_proj") and "no target 3" in refusal(ia3.retarget, "x", at=3)
    assert "no target 0" in refusal(ia3.retarget, "x", at=0)


def test_numbers_of_numpy_are_numbers() -> None:
    assert surgery.load("lora", rank=np.int64(3), alpha=np.float32(0.5)) == surgery.load("lora", rank=3, alpha=0.5)


@pytest.mark.parametrize(("said", "call"), [
    ("2^64 - 1, not 1.5", lambda: surgery.apply(Linear(4, 4), "lora", seed=1.5)),
    ("2^64 - 1, not 1000", lambda: surgery.apply(Linear(4, 4), "lora", seed=10**30)),
    ("2^64 - 1, not True", lambda: surgery.apply(Linear(4, 4), "lora", seed=True)),
    ("parameters cannot be float32", lambda: surgery.apply(Linear(4, 4), "lora", dtype="float32")),
    ("parameters cannot be torch.int8", lambda: surgery.apply(Linear(4, 4), "lora", dtype=torch.int8)),
    ("a matrix of finite numbers, not of [3]", lambda: surgery.spectrum(torch.ones(3))),
    ("a matrix of finite numbers, not of [2, 2]", lambda: surgery.spectrum(torch.full((2, 2), float("inf")))),
], ids=["seed", "large seed", "true seed", "dtype by name", "int8", "vector", "infinite"])
def test_values_that_cannot_be_used_are_told(said: str, call) -> None:
    assert said in refusal(call)


@pytest.mark.parametrize("read", [Spec.model_validate_json, lambda text: Spec.model_validate({"name": text})])
def test_json_that_does_not_fit_is_a_diagnostic(read) -> None:
    assert refusal(read, "no json").startswith("error[")
    assert Spec.model_validate_json(surgery.load("sora").model_dump_json()) == surgery.load("sora")


# ----------------------------------------------------------------------------------------------------------- in scope


def test_the_files_that_are_used() -> None:
    Path("inner").mkdir()
    Path("inner/roles.surg").write_text('use "more.surg"\nselect queries = "**.q_proj"\n')
    Path("inner/more.surg").write_text("update twice() {\n  param A[out, in] = 0\n  return 2 * A\n}\n")
    Path("mine.surg").write_text('use "inner/roles.surg"\ntarget linear queries {\n  add twice()\n}\n')
    spec = surgery.load("mine.surg")
    assert {"queries", "attention"} <= library(spec).selects.keys() and {"twice",
                                                                         "low_rank"} <= library(spec).definitions.keys()
    alone = inlined(spec)
    assert (alone.uses, [d.name for d in alone.definitions], [s.name for s in alone.selects]) == ((), ["twice"],
                                                                                                  ["queries"])
    Path("inner/more.surg").unlink()
    assert library(alone).definitions.keys() >= {"twice"} and "inner/more.surg" in refusal(library, spec)


def test_files_are_used_from_where_the_spec_was_read() -> None:
    specs = []
    for folder in (Path("here"), Path("there")):  # two files of one name and one text
        folder.mkdir()
        (folder / "roles.surg").write_text(f'use "deeper/more.surg"\nselect of_{folder} = "**.q_proj"\n')
        (folder / "deeper").mkdir()
        (folder / "deeper/more.surg").write_text(f'select deep_{folder} = "**.q_proj"\n')
        (folder / "mine.surg").write_text('use "roles.surg"\ntarget linear { add low_rank() }\n')
        with chdir(folder):
            specs += [surgery.load("mine.surg"), surgery.parse('use "roles.surg"\ntarget linear { add low_rank() }', "mine.surg")]
    with chdir("here"):
        found = [sorted(name for name in library(spec).selects if name.endswith("here") or name.endswith("there"))
                 for spec in (*specs, pickle.loads(pickle.dumps(specs[2])))]
    here, there = ["deep_here", "of_here"], ["deep_there", "of_there"]
    assert found == [here, here, there, there, there]


def test_a_spec_from_python_uses_files_of_the_working_folder() -> None:
    Path("roles.surg").write_text('select queries = "**.q_proj"\n')
    spec = Spec("mine", uses=[{"path": "roles.surg"}], targets=[Target("**.q_proj", add("low_rank"))])
    assert "queries" in library(spec).selects
