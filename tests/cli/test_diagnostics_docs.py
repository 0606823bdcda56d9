"""The pages of surgery/diagnostics_pages, which `surgery help` shows: each holds files, commands and what they say, and is a test of it.

A page is Markdown. A line `file: NAME` names the block after it; a ```console block holds commands, each followed by
what it writes to stderr: `$ surgery ...`, or `$ python FILE`, of whose traceback the last part is shown. `python
tests/cli/test_diagnostics_docs.py` writes those outputs anew, to be read before they are committed.
"""

import json
import os
import re
import shlex
import tempfile
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.diagnostics import CODES, SurgeryError
from surgery.language.resources import folder

PAGES = sorted(folder("diagnostics_pages").glob("*.md"))
FILE = re.compile(r"^file: (\S+)\n+```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:surgery|python) .*)$", re.MULTILINE)
SHOWN = re.compile(r"(?:^|SurgeryError: )(?:error|warning)\[([\w-]+)\]", re.MULTILINE)


def transcript(page: str) -> str:
    """The page's commands, each with what it says now, run in a new folder that holds the page's files."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, text in FILE.findall(page):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="utf-8")
        return "".join(f"$ {command}\n{run(*shlex.split(command))}" for command in COMMAND.findall(page))


def run(program: str, *arguments: str) -> str:
    """What a command writes to stderr."""
    text = told_by_surgery(arguments) if program == "surgery" else told_by_python(*arguments)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def told_by_surgery(arguments: tuple[str, ...]) -> str:
    """The status must tell whether there is an error, which must be a user's."""
    result = CliRunner(env={**os.environ, "NO_COLOR": "1"}).invoke(main, arguments)
    assert "a bug in surgery" not in result.stderr, result.stderr
    assert bool(result.exit_code) is ("error[" in result.stderr), result.output
    return result.stderr


def told_by_python(file: str) -> str:
    """The error that ends the program."""
    with pytest.raises(SurgeryError) as caught:
        exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), {})
    return f"surgery.diagnostics.SurgeryError: {caught.value}"


def rewritten(page: str) -> str:
    """The page with what its commands say now."""
    now = transcript(page)
    return CONSOLE.sub(lambda _: now, page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page(path):
    page = path.read_text(encoding="utf-8")
    assert page.startswith("# ")
    assert len(CONSOLE.findall(page)) == 1
    assert CONSOLE.search(page)[0] == transcript(page)


def codes_on_pages() -> set[str]:
    return {code for path in PAGES for code in SHOWN.findall(path.read_text("utf-8"))}


def test_pages_show_only_codes_that_exist():
    assert codes_on_pages() <= set(CODES)


def test_every_code_has_a_page_that_shows_it():
    assert codes_on_pages() == set(CODES)
    assert set(CODES) <= {path.stem for path in PAGES}
    assert [code for code in CODES if code not in SHOWN.findall((folder("diagnostics_pages") / f"{code}.md").read_text())
            ] == []


@pytest.mark.parametrize("command", [["help"], ["check", "--explain"]], ids=" ".join)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_page_is_shown(path, command):
    result = CliRunner().invoke(main, [*command, path.stem])
    page = path.read_text(encoding="utf-8")
    assert (result.exit_code, result.stderr) == (0, "") and page in result.stdout
    assert path.stem not in CODES or result.stdout.startswith(f"{path.stem}: {CODES[path.stem]}\n")


def test_the_page_of_a_code_names_the_others_that_show_it():
    told = json.loads(CliRunner().invoke(main, ["help", "syntax", "--json"]).stdout)
    assert {"unclosed-bracket", "other-languages"} <= set(told["more"]) and told["meaning"] == CODES["syntax"]


def test_the_codes_are_listed():
    listed = CliRunner().invoke(main, ["help", "--list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(CODES)
    assert len(json.loads(CliRunner().invoke(main, ["help", "--list", "--json"]).stdout)["codes"]) == len(CODES)


@pytest.mark.parametrize(("arguments", "words"), [(["help", "sintax"], "Did you mean `syntax`?"),
                                                  (["help"], "surgery help --list"),
                                                  (["check", "--explain", "nope"], "No diagnostic")])
def test_a_code_that_there_is_not(arguments, words):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and words in result.stderr


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
