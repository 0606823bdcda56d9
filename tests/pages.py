"""A page of documentation as a session: its blocks run from top to bottom, in a folder and a namespace of their own.

A line `file: NAME` names the block after it, which is written to that file. In a ```console block each `$ surgery ...` is
followed by all that it prints; a ```python block runs, and a ```pycon block prints what it says (with `...` for what may
differ); a ```surg block without a name is read; of a ```sh block each `surgery` command has options that exist. (A ```py block
needs several processes, and is shown alone.)
`python tests/pages.py` writes what commands print anew, to be read before it is committed.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import tempfile
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from surgery.cli.main import main
from surgery.language.parser import parse_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:^file: (?P<file>\S+)\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


KINDS = ("console", "python", "pycon", "surg", "sh")


def run(page: str, kinds: tuple[str, ...] = KINDS) -> str:
    """The page with what its commands print now. Raises: AssertionError, for any block that does not run."""
    names: dict[str, Any] = {"__name__": "__page__"}

    def block(found: re.Match) -> str:
        file, kind, text = found["file"], found["kind"], found["text"]
        if kind not in kinds:
            return found[0]
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif kind == "console":
            now = "".join(map(_told, re.findall(r"^\$ surgery (.*)$", text, re.MULTILINE)))
            return found[0].replace(text, now)
        elif kind == "python":
            with redirect_stdout(StringIO()):
                exec(compile(text, "page", "exec"), names)
        elif kind == "pycon":
            _answers(text, names)
        elif kind == "surg":
            parse_text(text)
        elif kind == "sh":
            _assert_commands_exist(text)
        return found[0]

    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        return BLOCK.sub(block, page)


def _told(words: str) -> str:
    result = CliRunner(env={**os.environ, "NO_COLOR": "1"}).invoke(main, shlex.split(words))
    assert "a bug in surgery" not in result.output, result.output
    lines = "".join(f"{line.rstrip()}\n" for line in result.output.replace(f"{ROOT}/", "").splitlines())
    return f"$ surgery {words}\n{lines}"


def _answers(text: str, names: dict[str, Any]) -> None:
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, names, "page", None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=said.append, clear_globs=False)
    names.update(test.globs)
    assert runner.tries and not runner.failures, "".join(said)


def _assert_commands_exist(text: str) -> None:
    """Each command and each of its options; files that it names need not be there."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["surgery"]:
            command = main.commands[words[1]]  # KeyError: there is no such command
            taken = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            unknown = [word for word in words[2:] if word.startswith("-") and word.partition("=")[0] not in taken]
            assert not unknown, f"surgery {words[1]} has no {', '.join(unknown)}"


if __name__ == "__main__":
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if "\n```console\n" in page:
            path.write_text(run(page), encoding="utf-8")
