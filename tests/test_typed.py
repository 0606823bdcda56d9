"""What a type checker tells a user of the package. Needs pyright (`pip install -e '.[lint]'`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYRIGHT = shutil.which("pyright", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
# The blocks in the README and in the Python reference suppose a model, a batch and data to train on.
SUPPOSED = ("from typing import Any, cast\nmodel, data, trainer = cast(Any, None), cast(Any, None), cast(Any, None)\n"
            "batch = cast('dict[str, Any]', {})\n")


@pytest.mark.types
@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed: the extra `lint` brings it")
def test_a_users_file_is_checked_against_the_signatures(tmp_path: Path) -> None:
    blocks = [block for name in ("docs/python.md", "README.md")
              for block in re.findall(r"```py(?:thon)?\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)]
    assert ["import surgery\n" in block for block in blocks] == [True, False, True]
    (tmp_path / "readme.py").write_text(SUPPOSED + "".join(blocks), encoding="utf-8")
    (tmp_path / "users.py").write_text(
        f"{SUPPOSED}import surgery\nsurgery.apply(model, 'lora', sed=1)\nsurgery.aply(model, 'lora')\n"
        "reveal_type(surgery.apply)\nreveal_type(surgery.spectrum(surgery.apply(model, 'lora')))\n", encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}), encoding="utf-8")
    done = subprocess.run([str(PYRIGHT), "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path], capture_output=True,
                          text=True, check=False)
    told = {name: [(d["severity"], d["message"]) for d in json.loads(done.stdout)["generalDiagnostics"]
                   if Path(d["file"]).name == name] for name in ("readme.py", "users.py")}

    assert told["readme.py"] == []
    misspelt, unknown, apply, spectra = told["users.py"]
    assert misspelt == ("error", 'No parameter named "sed"')
    assert unknown[0] == "error" and '"aply"' in unknown[1]
    assert "spec: Spec | str | PathLike" in apply[1] and "seed: int = 0" in apply[1] and "-> Surgeon" in apply[1]
    assert spectra[1] == 'Type of "surgery.spectrum(surgery.apply(model, \'lora\'))" is "Spectra"'
