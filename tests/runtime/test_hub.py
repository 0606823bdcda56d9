"""Adapters on the hub: pushed with a page, fetched at a revision, the base loaded at the commit that it was trained on.

The hub is a stand-in on this machine, in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import perturbed

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.runtime.hub import card

pytestmark = pytest.mark.usefixtures("folder")


# In one process, with the hub in it: huggingface_hub reads its address when it is imported.
SCRIPT = """
import json, os, warnings
from pathlib import Path
from hub import running

def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

def warned(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run()
    return result, len([w for w in said if isinstance(w.message, surgery.SurgeryWarning)])

with running() as hub:
    os.environ["HF_ENDPOINT"] = hub.address
    import surgery, torch
    from models import perturbed
    from surgery.models.demo import load_demo
    load_demo("llama").save_pretrained("base")
    found = {"commit": hub.commit("user/base", files_of("base"))}
    model, x = surgery.load_model("user/base"), torch.arange(3, 9)[None]
    surgeon = perturbed(model, "dora")
    found["address"] = surgeon.push_to_hub("user/adapter")
    wanted = model(x).logits
    (sha, files), = hub.commits["user/adapter"].items()
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
    try:
        surgery.attach(load_demo("llama"), "user/nothing")
    except surgery.SurgeryError as error:
        found["error"] = str(error)
print(json.dumps(found))
"""


def test_pushed_and_loaded_again() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path("cache").resolve()),
                   "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                   "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
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
