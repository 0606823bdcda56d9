"""The pages of tests/diagnostics: each holds files, commands and what they say, and is a test of it.

A page is Markdown. A line `file: NAME` names the ```surg block after it; a ```console block holds commands (`$ surgery ...`),
each followed by what it writes to stderr. `python tests/test_diagnostics_docs.py` writes those outputs anew, to be read
before they are committed.
"""

import os
import re
import shlex
import tempfile
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.diagnostics import CODES

PAGES = sorted(Path(__file__).with_name("diagnostics").glob("*.md"))
FILE = re.compile(r"^file: (\S+)\n+```surg\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ surgery (.*)$", re.MULTILINE)


def transcript(page: str) -> str:
    """The page's commands, each with what it says now, run in a new folder that holds the page's files."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, text in FILE.findall(page):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="utf-8")
        return "".join(f"$ surgery {command}\n{run(command)}" for command in COMMAND.findall(page))


def run(command: str) -> str:
    """What a command writes to stderr; its status must tell whether that holds an error."""
    result = CliRunner(env={**os.environ, "NO_COLOR": "1"}).invoke(main, shlex.split(command))
    assert bool(result.exit_code) is ("error[" in result.stderr), result.output
    return "".join(f"{line.rstrip()}\n" for line in result.stderr.splitlines())


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


def test_pages_show_only_codes_that_exist():
    shown = {code for path in PAGES for code in re.findall(r"^(?:error|warning)\[([\w-]+)\]", path.read_text("utf-8"), re.MULTILINE)}
    assert shown
    assert shown <= set(CODES)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
