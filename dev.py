"""From a bare clone, with nothing but Python 3.11: `python3 dev.py demo`, `python3 dev.py test [pytest's arguments]` or
`python3 dev.py gpu [pytest's arguments]`; `python3 dev.py lint` checks types and style.

Makes `.venv` and installs the project into it (only when pyproject.toml has changed since),
then runs the demo, the tests that need no GPU (`-m fast`: those that answer within a minute; `-m sweep`: every
combination where the suite tries some), or those that need one (they are skipped where there is none);
`python3 dev.py mutate [--help]` tries the tests themselves, by hand and for long; `python3 dev.py house` prints
the shape of the code in figures; `python3 dev.py docs` builds the site of docs/ into site/;
`python3 dev.py matrix` tries the wheel in bare environments, of the oldest and the newest packages (by hand).
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
TORCH = "torch==2.13.0"  # the version that the project is tested with
WORKERS = 2
COMMANDS = {
    "demo": ["surgery", "apply", "specs/sora.surg", "demo:llama", "-o", "out/sora-llama", "--force"],
    "test": ["python", "-m", "pytest", "-n", str(WORKERS)],
    "gpu": ["python", "-m", "pytest", "-m", "gpu", "-rs", "-n", "auto", "tests/runtime/test_gpu.py",
            "tests/codegen/test_gpu_kernels.py"],
    "mutate": ["python", "tests/mutate.py"],
    "house": ["python", "tests/house.py"],
    "docs": ["mkdocs", "build"],
    "matrix": ["python", "tests/matrix.py"],
}
LINT = (["ruff", "check", "."], ["pyright"], ["pytest", "-m", "types", "tests/test_typed.py"])


def set_up() -> None:
    """Make the environment, unless it was made for this very pyproject.toml."""
    stamp = VENV / "surgery-stamp"
    wanted = hashlib.sha256((TORCH + (ROOT / "pyproject.toml").read_text()).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not BIN.exists():
        venv.create(VENV, with_pip=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for what in ([TORCH], ["-e", ".[test,lint,docs]"]):
        print(f"installing {what[-1]} into {VENV.name} ...", file=sys.stderr, flush=True)
        subprocess.run([*pip, *what], cwd=ROOT, check=True)
    stamp.write_text(wanted)


def environment() -> dict[str, str]:
    """Each worker of the tests gets its share of the cores, nothing is looked up on the network, and what Python has
    compiled is kept: the tests start it many times."""
    share = str(max(1, (os.cpu_count() or 1) // WORKERS))
    return {"OMP_NUM_THREADS": share, "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": ""}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in (*COMMANDS, "lint"):
        print(f"{__doc__}\nsay one of: {', '.join(COMMANDS)}, lint", file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):
        print(f"Surgery needs Python 3.11 or newer, and this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    try:
        set_up()
    except subprocess.CalledProcessError as error:
        print(f"the installation failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 2
    if arguments[0] == "lint":  # both are run, whatever the first says
        codes = [subprocess.run([BIN / program, *fixed], cwd=ROOT).returncode for program, *fixed in LINT]
        return max(map(abs, codes))
    program, *fixed = COMMANDS[arguments[0]]
    return subprocess.run([BIN / program, *fixed, *arguments[1:]], cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
