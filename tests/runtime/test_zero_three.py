"""DeepSpeed's ZeRO-3 on two processes (gloo, on the CPU): an operated model trains as on one; what needs whole tensors
is refused but where they are gathered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import perturbed
from two_processes import fresh, spec_of

from surgery.diagnostics import SurgeryError

SPECS = ["lora", "sora", "vera", "delora", "fourierft", "dora"]
SCRIPT = Path(__file__).parents[1] / "zero_three.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    pytest.importorskip("deepspeed", reason="DeepSpeed is of the extra `engines`")
    folder = tmp_path_factory.mktemp("zero")
    common = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    runs = [subprocess.Popen([sys.executable, SCRIPT, folder], env={**common, "RANK": rank, "LOCAL_RANK": rank},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for rank in "01"]
    errors = [run.communicate(timeout=500)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors[0][-3000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.engines
@pytest.mark.parametrize("name", SPECS)
def test_it_trains_saves_and_merges_as_on_one_process(name: str, seen: dict) -> None:
    found = seen[name]
    assert found["trained"] <= 1e-6 < 1e-4 < found["training changes"]
    assert max(found[what] for what in ("forward", "merged", "unmerged", "attached")) <= 1e-5
    assert all("deepspeed.zero.GatheredParameters" in found["refused"][verb] for verb in ("state", "merge", "save"))


@pytest.mark.engines
def test_copies_that_would_leave_a_manifold_are_refused(seen: dict) -> None:
    assert all("trains by copies of DeepSpeed's" in said for said in seen["manifold"].values()) and len(seen["manifold"]) == 2


def test_what_is_elsewhere_is_refused_in_words() -> None:
    """As ZeRO-3 leaves a parameter: an empty tensor that knows how many numbers it had. One of the adapter's may be away
    where the weight, which is smaller, is not."""
    surgeon = perturbed(fresh(), spec_of("lora"), check=False)
    name, tensor = next((name, t) for name, t in surgeon.named_tensors().items() if name.endswith("A"))
    vars(tensor)["ds_numel"], tensor.data = tensor.numel(), torch.empty(0)
    for verb in (surgeon.state, surgeon.merge, surgeon.report, lambda: surgeon.save("never")):
        with pytest.raises(SurgeryError, match="is kept in parts by DeepSpeed's ZeRO-3"):
            verb()
