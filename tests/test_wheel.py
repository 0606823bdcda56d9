"""A source distribution holds all that a wheel, the tests and the site are made of; a wheel all that runs."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("surgery", "grammar", "specs", "tests", "docs", "examples", "editors")
FILES = ("pyproject.toml", "MANIFEST.in", "dev.py", "mkdocs.yml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
         "CONTRIBUTING.md")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# `-I`: neither the working directory nor the environment adds to the path.
RUN = [sys.executable, "-I", "-c",
       "import sys; sys.path.insert(0, sys.argv.pop(1)); from surgery.cli.main import main; main()"]


def build(what: str, sources: Path, into: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD, what, str(into)], cwd=sources, check=True, capture_output=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the source distribution of a copy of the sources holds."""
    copy, built = (tmp_path_factory.mktemp(name) for name in ("copy", "built"))
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    build("build_sdist", copy, built)
    with tarfile.open(next(built.glob("surgery-*.tar.gz"))) as distribution:
        distribution.extractall(built, filter="data")
    return next(built.glob("surgery-*/"))


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel that is made of them holds."""
    built, folder = (tmp_path_factory.mktemp(name) for name in ("wheel", "installed"))
    build("build_wheel", sources, built)
    with zipfile.ZipFile(next(built.glob("surgery-*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def names(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_what_a_source_distribution_holds(sources: Path) -> None:
    wanted = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}
    assert wanted | set(FILES) <= names(sources, "*")


def test_what_a_wheel_holds(installed: Path) -> None:
    assert names(installed / "surgery", "*.py") == names(ROOT / "surgery", "*.py")
    assert names(installed / "surgery/specs", "*") == names(ROOT / "specs", "*.surg")
    assert names(installed / "surgery/grammar", "*") == {"surg.lark"}
    assert names(installed / "surgery/diagnostics_pages", "*") == names(ROOT / "surgery/diagnostics_pages", "*.md")
    assert names(installed / "surgery", "*.json") == names(ROOT / "surgery", "*.json")
    (about,) = installed.glob("*.dist-info")
    assert about.name == f"surgery-{surgery.__version__}.dist-info"
    assert "surgery = surgery.cli.main:program" in (about / "entry_points.txt").read_text()
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
