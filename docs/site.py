"""What mkdocs is told beside mkdocs.yml: pages that are made from files elsewhere, and links that leave the site."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
    """A page for each diagnostic, with their list, for each notebook, and the two that lie beside the README."""
    texts = {f"errors/{name}.md": text for name, text in pages().items()}
    rows = [f"| [`{code}`]({code}.md) | {meaning} |" for code, meaning in CODES.items()]
    more = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name}.md)" for name, text in pages().items()
            if name not in CODES]
    texts["errors/index.md"] = "\n".join([
        "# Diagnostics", "", "What `surgery help CODE` shows. Every mistake has a code, a place and what to do.", "",
        "| code | meaning |", "|---|---|", *rows, "", "More mistakes, and what is said of them:", "", *more, ""])
    texts |= {name.lower(): (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
              for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    texts |= {f"notebooks/{path.stem}.md": "\n".join(_cells(json.loads(path.read_text(encoding="utf-8"))))
              for path in (ROOT / "examples/notebooks").glob("*.ipynb")}
    for path, text in texts.items():
        files.append(File.generated(config, path, content=text))
    return files


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    """A notebook as Markdown: its texts, its code, and what the cells showed when they ran last."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if picture := data.get("image/png"):
                yield f'\n<img alt="what this cell draws" src="data:image/png;base64,{picture.strip()}">'
            elif table := data.get("text/html"):
                yield "\n" + "".join(table)
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip()
                yield f"\n```text\n{text}\n```"
        yield ""


def on_post_build(config: MkDocsConfig) -> None:
    """The theme's page for what is not found links to the root of a host, and the site may lie in any folder."""
    (Path(config.site_dir) / "404.html").unlink(missing_ok=True)


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Links to files that the site does not have become their names; a named block gets its name as a title."""
    markdown = _NAMED.sub(lambda found: f'```{found[2]} title="{found[1]}"', markdown)
    return _OUTSIDE.sub(lambda found: found[1], markdown)


class Examples(griffe.Extension):
    """Examples in docstrings are code, as `help()` and doctest take them."""

    def on_object(self, *, obj: griffe.Object, **about: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
