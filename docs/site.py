"""What mkdocs is told beside mkdocs.yml: pages that are made from files elsewhere, and links that leave the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from surgery.cli.diagnostic_pages import pages
from surgery.diagnostics import CODES

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!\w+\.md)[^)]*\)")  # of files that are no pages
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_NAMED = re.compile(r"^file: (\S+)\n+```(\w+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for each diagnostic, with their list, and the two that lie beside the README."""
    texts = {f"errors/{name}.md": text for name, text in pages().items()}
    rows = [f"| [`{code}`]({code}.md) | {meaning} |" for code, meaning in CODES.items()]
    more = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name}.md)" for name, text in pages().items()
            if name not in CODES]
    texts["errors/index.md"] = "\n".join([
        "# Diagnostics", "", "What `surgery help CODE` shows. Every mistake has a code, a place and what to do.", "",
        "| code | meaning |", "|---|---|", *rows, "", "More mistakes, and what is said of them:", "", *more, ""])
    texts |= {name.lower(): (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
              for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for path, text in texts.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Links to files that the site does not have become their names; a named block gets its name as a title."""
    markdown = _NAMED.sub(lambda found: f'```{found[2]} title="{found[1]}"', markdown)
    return _OUTSIDE.sub(lambda found: found[1], markdown)


class Examples(griffe.Extension):
    """Examples in docstrings are code, as `help()` and doctest take them."""

    def on_object(self, *, obj: griffe.Object, **about: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
