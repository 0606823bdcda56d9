"""The wheel in bare environments: `python dev.py matrix [ROW...]`, by hand, for long, with some 6 GB of disk.

Builds the source distribution, and from that alone the wheel; has both looked at by twine and check-wheel-contents. Then, one
row after the other: an environment of a Python with the oldest packages that pyproject.toml promises, or with the newest
that pip finds, the wheel in it, and tests/smoke.py run in an empty folder. A Python is looked for on the path, and among
those of pyenv and uv. Where an index of torch for the CPU is configured (`PIP_EXTRA_INDEX_URL`), pip takes torch from it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The oldest torch has no wheel for a Python that came after it.
ROWS = {"3.11-oldest": ("3.11", True),
        **{f"{python}-newest": (python, False) for python in ("3.11", "3.12", "3.13", "3.14")}}
SHOWN = "import sys, torch, transformers as t; print(sys.version.split()[0], 'torch', torch.__version__, 'transformers', t.__version__)"


def run(*words: str | Path, cwd: Path) -> str:
    """Its output. The network is for pip alone, nothing of the checkout is found. Raises: CalledProcessError."""
    around = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=around, check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout.strip()


def environment(python: str | Path, folder: Path, *packages: str | Path) -> Path:
    """The Python of a new environment with these packages."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    made = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(made, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages, cwd=folder)
    return made


def interpreter(version: str) -> str | None:
    """A Python of that version which runs."""
    # A shim of pyenv lies on the path for versions that it will not start: each is asked.
    candidates: list[str | Path] = [f"python{version}", *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
                                    *Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python{version}")]
    for each in candidates:
        try:
            if run(each, "-c", "import sys; print('%d.%d' % sys.version_info[:2])", cwd=ROOT) == version:
                return str(each)
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def oldest() -> list[str]:
    """Each dependency in the oldest version that is promised."""
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [re.sub(r">=([^,]+).*", r"==\1", each) for each in promised]


def built(work: Path) -> Path:
    """The wheel, made from the source distribution; both as an index wants them."""
    tools = environment(sys.executable, work / "tools", "build", "twine", "check-wheel-contents")
    run(tools, "-m", "build", "--outdir", work / "dist", cwd=ROOT)  # of a source distribution it then makes the wheel
    print(run(tools, "-m", "twine", "check", "--strict", *sorted((work / "dist").iterdir()), cwd=work))
    (wheel,) = (work / "dist").glob("*.whl")
    print(run(tools.parent / "check-wheel-contents", wheel, cwd=work), flush=True)
    return wheel


def tried(row: str, wheel: Path, work: Path) -> str:
    """What became of a row, in a line; with what was printed where it failed."""
    version, is_oldest = ROWS[row]
    python, folder, began = interpreter(version), work / row, time.monotonic()
    if python is None:
        return f"not tried: no Python {version} on this machine"
    try:
        made = environment(python, folder, wheel, *(oldest() if is_oldest else ()))
        empty = folder / "empty"
        empty.mkdir()
        shown = run(made, "-c", SHOWN, cwd=empty)
        run(made, shutil.copy(ROOT / "tests/smoke.py", empty), cwd=empty)
    except subprocess.CalledProcessError as error:
        return f"FAILED: {' '.join(map(str, error.cmd[1:5]))} ...\n{error.stdout[-3000:]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"passed: {shown}, in {time.monotonic() - began:.0f} s"


def main(asked: list[str]) -> int:
    if unknown := set(asked) - set(ROWS):
        print(f"no such row: {', '.join(sorted(unknown))}; say some of {', '.join(ROWS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            wheel = built(work)
        except subprocess.CalledProcessError as error:
            print(f"no wheel:\n{error.stdout[-3000:]}", file=sys.stderr)
            return 1
        told = {}
        for row in asked or ROWS:
            told[row] = tried(row, wheel, work)
            print(f"{row:12} {told[row]}", flush=True)
    return int(any(each.startswith("FAILED") for each in told.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
