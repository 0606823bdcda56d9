"""`surgery help`: what a diagnostic's code means, with an example and what to do."""

from __future__ import annotations

import re

import click

from surgery.cli.options import command
from surgery.cli.output import Output
from surgery.diagnostics import CODES, did_you_mean


def page_of(name: str) -> str | None:
    """The page of a code, or another page, by its name; in Markdown."""
    return pages().get(name)


def pages() -> dict[str, str]:
    """Every page by its name: one for each code, and some for a kind of mistake of a code that has many."""
    from surgery.language.resources import folder

    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder("diagnostics_pages").glob("*.md"))}


def told_of_code(output: Output, code: str) -> None:
    """Say what a code means and show its page. Raises: UsageError, for a word that is neither code nor page."""
    page = page_of(code)
    if page is None:
        near = did_you_mean(code, pages()).capitalize()
        raise click.UsageError(f"No diagnostic has the code '{code}'. {near}".rstrip())
    others = [name for name, text in pages().items() if name != code and re.search(rf"(error|warning)\[{code}\]", text)]
    if code in CODES:
        output.say(f"{code}: {CODES[code]}\n")
    output.raw(page)
    if others:
        output.say(f"\nMore of it: {', '.join(f'surgery help {name}' for name in others)}")
    output.data(code=code, meaning=CODES.get(code), page=page, more=others)


@command(click.argument("code", required=False, metavar="[CODE]"),
         click.option("--list", "as_list", is_flag=True, help="List every code with what it means."),
         example="surgery help shape-mismatch")
def help(output: Output, code: str | None, as_list: bool) -> None:
    """Explain a diagnostic.

    CODE stands in brackets after `error` or `warning`. Its page shows a spec that is wrong so, what is said of it, and
    what to do.
    """
    if code and not as_list:
        return told_of_code(output, code)
    if not as_list:
        raise click.UsageError("Missing argument 'CODE'; `surgery help --list` lists the codes.")
    output.say("\n".join(f"{name:{max(map(len, CODES))}}  {meaning}" for name, meaning in CODES.items()))
    output.data(codes=[{"code": name, "meaning": meaning} for name, meaning in CODES.items()])
