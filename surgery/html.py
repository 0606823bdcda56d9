"""Elements of HTML and SVG, built by calls.

Takes texts and elements; gives `Markup`. Promises: what is not `Markup` already is escaped, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """<name attributes>children</name>. A `_` at an attribute's end is dropped, another one is a hyphen; None leaves an
    attribute or a child out."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    # quoted and escaped, whatever an attribute holds: a name from a model may hold quotes
    opening = "".join([f"<{name}", *(f' {key}="{escape(str(value))}"' for key, value in pairs), ">"])
    return Markup(f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Children one after the other."""
    # what is Markup was escaped when it was made: twice, `&` would be `&amp;amp;`
    return Markup("".join(str(c) if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None))


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> Markup:
    """A table that scrolls inside of its own box where it is too wide. The first column holds names,
    the others figures."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    # focusable, so that its own box scrolls by keyboard too
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide", tabindex="0")


def folded(summary: object, *children: object) -> Markup:
    """Children that a click shows."""
    return tag("details", tag("summary", summary), *children)
