"""The documentation runs: each block of each page does what the page says, and the site is built without a warning."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from pages import BLOCK, DOCS, KINDS, ROOT, run
from pygments.lexers import get_lexer_by_name
from pygments.token import Error, Keyword, Number

import surgery
from surgery.language.grammar import KEYWORDS
from surgery.language.library import PRELUDE, locate, shipped

PAGES = sorted(path for path in DOCS.glob("*.md") if any(
    block["kind"] in KINDS for block in BLOCK.finditer(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_does_what_it_says(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert run(page) == page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_and_specs_beside_the_pages_exist(name: str) -> None:
    run((ROOT / name).read_text(encoding="utf-8"), ("sh", "surg"))  # python blocks: test_typed


@pytest.mark.parametrize(("page", "why"), [
    ("```console\n$ surgery check no.surg\nno.surg: ok\n```\n", ""), ("```python\nassert 1 == 2\n```\n", AssertionError),
    ("```pycon\n>>> 1 + 1\n3\n```\n", AssertionError), ("```sh\nsurgery plan --nope\n```\n", AssertionError),
    ("```sh\nsurgery nope\n```\n", KeyError)], ids=["console", "python", "pycon", "option", "command"])
def test_a_page_that_says_something_else_is_seen(page: str, why: type[Exception] | str) -> None:
    if why:
        with pytest.raises(why):
            run(page)
    else:
        assert run(page) != page


def test_the_site_is_built_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    config = load_config("mkdocs.yml", site_dir=str(tmp_path / "site"))
    assert config.strict  # a link or an anchor that is not there raises then
    build(config)
    assert {"start.html", "python.html", "errors/not-identity.html"} <= {
        path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}


def test_the_python_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: surgery\.(\w+)$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(surgery.__all__) - {"__version__"})


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem)
def test_no_code_in_a_table_has_a_bar(path: Path) -> None:
    """A bar in a cell is written \\|, and the site shows that in code as it stands."""
    rows = re.findall(r"^\|.*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [code for row in rows for code in re.findall(r"`([^`]*)`", row) if "|" in code] == []


def test_pygments_knows_every_word_of_a_spec() -> None:
    lexer = get_lexer_by_name("surg")
    for path in (*shipped().values(), locate(PRELUDE)):
        said = list(lexer.get_tokens(path.read_text(encoding="utf-8")))
        assert not [text for kind, text in said if kind is Error], path
        assert all(kind in Keyword for kind, text in said if text in KEYWORDS), path
    for number in ("8", "1_024", "0.05", "1e-4", "2E+10", "5%"):
        assert (Number, number) in lexer.get_tokens(f"let x = {number}")


# The matrix, and the engines whose versions it says, by what it calls them.
MATRIX = (DOCS / "ecosystem.md").read_text(encoding="utf-8").partition("\n## ")[0]
ENGINES = {"DeepSpeed": "deepspeed", "TRL": "trl", "ONNX Runtime": "onnxruntime", "torchao": "torchao",
           "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "optimum": "optimum",
           "gptqmodel": "gptqmodel"}


def test_each_row_of_the_matrix_names_tests_that_there_are() -> None:
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", MATRIX, re.MULTILINE)[1:]  # without the heads of its columns
    assert len(rows) > 40
    for how in rows:
        named = re.findall(r"`((?:tests|examples)/[\w/]+\.py)`", how)
        assert named and all((ROOT / name).is_file() for name in named), how
        assert "-m engines" not in how or any("mark.engines" in (ROOT / name).read_text("utf-8") for name in named), how


@pytest.mark.engines
@pytest.mark.parametrize("name", ENGINES)
def test_the_versions_that_the_matrix_says_are_those_that_are_tried(name: str) -> None:
    said = re.findall(rf"{name}(?:'s)? (\d+\.\d+)", MATRIX)
    try:
        found = version(ENGINES[name])
    except PackageNotFoundError:
        pytest.skip(f"{ENGINES[name]} is of the extra `engines`")
    assert any(found.startswith(f"{each}.") for each in said), (said, found)
