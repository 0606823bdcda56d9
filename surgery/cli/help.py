"""`surgery help`: what a diagnostic's code means, with an example and what to do."""

from __future__ import annotations

import re

import click

from surgery.cli.diagnostic_pages import pages
from surgery.cli.options import command
from surgery.cli.output import Output
from surgery.diagnostics import CODES, did_you_mean


def explain_code(output: Output, code: str) -> None:
    """Say what a code means and show its page. Raises: UsageError, for a word that is neither code nor page."""
    by_name = pages()
    page = by_name.get(code)
    if page is None:
        suggestion = did_you_mean(code, by_name).capitalize() or "`surgery help --list` lists them."
        raise click.UsageError(f"No diagnostic has the code '{code}'. {suggestion}")
    # A code that covers many mistakes has a page for each kind; they are told by what their examples print.
    others = [name for name, text in by_name.items() if name != code and re.search(rf"(error|warning)\[{code}\]", text)]
    if code in CODES:
        output.say(f"{code}: {CODES[code]}\n")
    output.raw(page)
    if others:
        output.say(f"\nMore of it: {', '.join(f'surgery help {name}' for name in others)}")
    output.data(code=code, meaning=CODES.get(code), page=page, more=others)


@command(click.argument("code", required=False, metavar="[CODE]"),
         click.option("--list", "as_list", is_flag=True, help="List every code with what it means."),
         example="surgery help shape-mismatch", as_project=False)
def help(output: Output, code: str | None, as_list: bool) -> None:
    """Explain a diagnostic.

    CODE stands in brackets after `error` or `warning`. Its page shows a spec that is wrong so, what is said of it, and
    what to do.
    """
    if code and not as_list:
        return explain_code(output, code)
    if not as_list:
        raise click.UsageError("Missing argument 'CODE'; `surgery help --list` lists the codes.")
    output.say("\n".join(f"{name:{max(map(len, CODES))}}  {meaning}" for name, meaning in CODES.items()))
    output.data(codes=[{"code": name, "meaning": meaning} for name, meaning in CODES.items()])
