"""Adapters on the hub: pushed with a page, fetched at a revision, the base loaded at the commit that it was trained on.

The hub is a stand-in on this machine. huggingface_hub reads its address when it is imported, so that what talks to it
runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, running
from models import perturbed

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.runtime.hub import card


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def ran(hub: Hub, text: str) -> str:
    """What a script prints that knows no other hub."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path("cache").resolve()),
                   "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                   "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    prelude = "import warnings, surgery, torch\nfrom models import perturbed\n"
    found = subprocess.run([sys.executable, "-c", prelude + text], env=environment, capture_output=True, text=True,
                           timeout=200)
    assert found.returncode == 0, found.stderr
    return found.stdout


PUSH = """
model = surgery.load_model("user/base")
surgeon = perturbed(model, "dora")
print(surgeon.push_to_hub("user/adapter"))
x = torch.arange(3, 9)[None]
torch.save(model(x).logits, "logits.pt")
surgeon.remove()
torch.save({k: v for k, v in model.state_dict().items()}, "base.pt")
"""
LOAD = """
x = torch.arange(3, 9)[None]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", surgery.diagnostics.SurgeryWarning)
    surgeon = surgery.from_pretrained("user/adapter")
assert not [w for w in said if isinstance(w.message, surgery.SurgeryWarning)]
assert torch.equal(surgeon.model(x).logits, torch.load("logits.pt"))
base = surgery.load_model("user/base")  # as it is now
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    again = surgery.attach(base, "user/adapter", revision=REVISION)
print(len([w for w in said if isinstance(w.message, surgery.SurgeryWarning)]), surgeon.spec.name)
try:
    surgery.attach(base, "user/nothing")
except surgery.SurgeryError as error:
    print(error)
"""


def test_pushed_and_loaded_again(hub: Hub) -> None:
    load_demo("llama").save_pretrained("base")
    commit = hub.commit("user/base", files_of("base"))
    address = ran(hub, PUSH).strip()
    (sha, files), = hub.commits["user/adapter"].items()
    assert address == f"{hub.address}/user/adapter/commit/{sha}"
    assert {*files} >= {"README.md", "adapter.safetensors", "adapter.surg", "meta.json"}
    assert "surgery-manifest.json" not in files
    meta = json.loads(files["meta.json"])
    assert (meta["base_model"], meta["revision"]) == ("user/base", commit)
    page = files["README.md"].decode()
    assert "base_model: user/base\n" in page and f"Base model: `user/base` at `{commit}`." in page

    # The base moves on: the adapter still finds the commit that it was trained on, and tells the new one from it.
    load_demo("llama", seed=1).save_pretrained("base")
    hub.commit("user/base", files_of("base"))
    told, error = ran(hub, f"REVISION = {sha!r}\n" + LOAD).split("\n", 1)
    assert told == "1 dora"
    assert "there is no folder user/nothing, and it cannot be had from the hub" in error


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
