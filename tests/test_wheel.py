"""A wheel holds all that runs: its modules, its grammar and its specs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
# `-I`: neither the working directory nor the environment adds to the path.
RUN = [sys.executable, "-I", "-c",
       "import sys; sys.path.insert(0, sys.argv.pop(1)); from surgery.cli.main import main; main()"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel of a copy of the sources holds."""
    copy, built, folder = (tmp_path_factory.mktemp(name) for name in ("copy", "built", "installed"))
    for name in ("surgery", "grammar", "specs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(built.glob("surgery-*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def names(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_what_a_wheel_holds(installed: Path) -> None:
    assert names(installed / "surgery", "*.py") == names(ROOT / "surgery", "*.py")
    assert names(installed / "surgery/specs", "*") == names(ROOT / "specs", "*.surg")
    assert names(installed / "surgery/grammar", "*") == {"surg.lark"}
    assert names(installed / "surgery/diagnostics_pages", "*") == names(ROOT / "surgery/diagnostics_pages", "*.md")
    (about,) = installed.glob("*.dist-info")
    assert about.name == f"surgery-{surgery.__version__}.dist-info"
    assert "surgery = surgery.cli.main:main" in (about / "entry_points.txt").read_text()
    assert {path.name for path in installed.iterdir()} == {"surgery", about.name}


@pytest.mark.parametrize("command, said", [(["specs"], "sora_reference  "), (["show", "sora"], "cayley"),
                                           (["help", "syntax"], "# The text is not a spec")])
def test_it_finds_its_grammar_and_specs(installed: Path, tmp_path: Path, command: list[str], said: str) -> None:
    result = subprocess.run([*RUN, str(installed), *command], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and said in result.stdout


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path) -> None:
    result = subprocess.run([*RUN, str(installed), "check", "sora", "--set", "rank=0"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert f"--> {installed / 'surgery/specs/sora.surg'}:" in result.stderr
