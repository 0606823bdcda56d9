"""The JSON schema that ships: made from the tree, and it takes what is read and refuses what is refused.

`python tests/language/test_json_schema.py` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from surgery.diagnostics import SurgeryError
from surgery.language.library import inlined, load, shipped
from surgery.language.resources import folder
from surgery.language.tree import Spec

FILE = Path(__file__).resolve().parents[2] / "surgery/language/spec.schema.json"
LIBRARIES = sorted(folder("specs").glob("std*.surg"))
STEP = {"placement": "add", "call": "low_rank(4)"}


def made() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_it_is_that_of_the_tree() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8")) == made(), f"python {Path(__file__).name} writes it anew"


def test_the_json_of_each_shipped_spec_is_valid(validator: Draft202012Validator) -> None:
    specs = [load(name) for name in (*shipped(), *LIBRARIES)]
    # `show --emit json` prints the second: the definitions that it uses are its own
    forms = [form.model_dump(mode="json") for spec in specs for form in (spec, inlined(spec))]
    wrong = [(form["name"], error.message) for form in forms for error in validator.iter_errors(form)]
    assert wrong == [] and len(forms) > 2 * len(LIBRARIES) > 0


@pytest.mark.parametrize("fits, form", [
    (True, {}), (True, {"name": "s", "doc": "What it is."}),
    (True, {"name": "s", "params": [{"name": "rank", "type": "int", "default": 8}]}),
    (True, {"name": "s", "params": [{"name": "a", "type": "float", "default": "2 * 4"},
                                    {"name": "b", "type": "bool", "default": True}]}),
    (True, {"selects": [{"name": "q", "patterns": ["**.q"]}],
            "targets": [{"selectors": [{"select": "q"}], "steps": [STEP]}]}),
    (True, {"targets": [{"steps": [{"name": "i", "first": 0, "end": "2", "steps": [STEP]}]}]}),
    (False, {"nam": "s"}), (False, {"name": 1}), (False, {"language": "1"}),
    (False, {"params": [{"name": "rank", "type": "integer"}]}), (False, {"params": [{"type": "int"}]}),
    (False, {"targets": [{"kind": "lstm"}]}), (False, {"targets": [{"steps": [{**STEP, "side": "left"}]}]}),
    (False, {"targets": [{"steps": [{"placement": "add", "call": 4}]}]}),
    (False, {"targets": [{"selectors": [{"select": "q", "more": 1}]}]}),
])
def test_it_takes_what_is_read(validator: Draft202012Validator, fits: bool, form: dict[str, Any]) -> None:
    try:
        Spec.model_validate_json(json.dumps(form))
        is_read = True
    except SurgeryError:
        is_read = False
    assert (validator.is_valid(form), is_read) == (fits, fits)


if __name__ == "__main__":
    FILE.write_text(json.dumps(made(), indent=2) + "\n", encoding="utf-8")
