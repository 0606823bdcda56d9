"""Adapters on the hub: pushed with a page, fetched at a revision, the base loaded at the commit that it was trained on.

The hub is a stand-in on this machine, in a process of its own.
"""

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import huggingface_hub.constants
import pytest
import torch
from hub import running
from models import perturbed

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.runtime.hub import card

pytestmark = pytest.mark.usefixtures("folder")


def told_by_the_hub() -> None:
    """Pushes and loads in a process of its own, with the hub in it; found.json says what was seen."""
    with running() as hub:
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path("cache").resolve()),
                       "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                       "NO_PROXY": "127.0.0.1"}
        importlib.reload(huggingface_hub.constants)  # which were read when it was imported
        load_demo("llama").save_pretrained("base")
        found: dict[str, Any] = {"commit": hub.commit("user/base", files_of("base"))}
        model, x = surgery.load_model("user/base"), torch.arange(3, 9)[None]
        surgeon = perturbed(model, "dora")
        found["address"] = surgeon.push_to_hub("user/adapter")
        wanted = model(x).logits
        ((sha, files),) = hub.commits["user/adapter"].items()
        found |= {"expected": f"{hub.address}/user/adapter/commit/{sha}", "files": [*files],
                  "meta": json.loads(files["meta.json"]), "page": files["README.md"].decode()}

        surgery.apply(surgery.load_model("user/base"), "dora", check=False).save("memory")

        # The base moves on: the adapter still finds the commit that it was trained on, and tells the new one from it.
        load_demo("llama", seed=1).save_pretrained("base")
        hub.commit("user/base", files_of("base"))
        surgeon, found["warnings"] = warned(lambda: surgery.from_pretrained("user/adapter"))
        found |= {"same": torch.equal(surgeon.model(x).logits, wanted), "name": surgeon.spec.name}
        surgery.apply_files(f"user/base@{found['commit']}", "dora", "files")  # as it was then
        found["files alone"] = [Path("memory", n).read_bytes() == Path("files", n).read_bytes() for n in os.listdir("files")]
        base = surgery.load_model("user/base")  # as it is now
        _, found["warnings of another"] = warned(lambda: surgery.attach(base, "user/adapter", revision=sha))
        with pytest.raises(SurgeryError) as error:
            surgery.attach(load_demo("llama"), "user/nothing")
        found["error"] = str(error.value)
    Path("found.json").write_text(json.dumps(found))


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def warned(run: Callable[[], Any]) -> tuple[Any, int]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run()
    return result, len([w for w in said if isinstance(w.message, surgery.SurgeryWarning)])


def test_pushed_and_loaded_again() -> None:
    forked.run(told_by_the_hub)
    found = json.loads(Path("found.json").read_text())
    assert found["address"] == found["expected"]
    assert {*found["files"]} >= {"README.md", "adapter.safetensors", "adapter.surg", "meta.json"}
    assert "surgery-manifest.json" not in found["files"]
    assert (found["meta"]["base_model"], found["meta"]["revision"]) == ("user/base", found["commit"])
    assert "base_model: user/base\n" in found["page"]
    assert f"Base model: `user/base` at `{found['commit']}`." in found["page"]
    assert (found["same"], found["name"], found["warnings"], found["warnings of another"]) == (True, "dora", 0, 1)
    assert found["files alone"] == [True] * 4
    assert "there is no folder user/nothing, and it cannot be had from the hub" in found["error"]


def test_a_page_says_what_the_adapter_is() -> None:
    surgeon = perturbed(load_demo("llama"), surgery.parse(
        'target linear "**.q_proj" { add low_rank(rank = 2) }\ntrain "**.norm.weight"'))
    surgeon.save("adapter")
    page = card(surgeon, Path("adapter"), "user/mine")
    for part in ("library_name: surgery", "Base model: `demo:llama`.", "4 weights operated on: ", "% of ",
                 "parameters of the model: `model.norm.weight`.", "- `W' = W + ", "` for 4 weights",
                 "```surg\n", "low_rank(rank = 2)", "surgery.from_pretrained('user/mine')"):
        assert part in page, page
    assert "base_model: demo" not in page  # no model of the hub's


def test_folders_are_not_looked_for_elsewhere() -> None:
    surgeon = perturbed(load_demo("llama"), "lora")
    surgeon.save("user/adapter")
    assert surgery.from_pretrained("user/adapter").spec.name == "lora"
    assert surgery.attach(load_demo("llama"), Path("user/adapter")).spec.name == "lora"
    for name in ("nowhere", Path("user/nothing")):
        with pytest.raises(SurgeryError, match="missing-file"):
            surgery.from_pretrained(name)
    with pytest.raises(SurgeryError, match="`mine` is no repository of the hub"):
        surgeon.push_to_hub("mine")
