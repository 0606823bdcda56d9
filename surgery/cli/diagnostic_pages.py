"""The pages about diagnostics, which `surgery help` shows and SARIF carries as the help of a rule.

They have a module of their own so that the formats of diagnostics need no command, and the commands no circle.
"""

from __future__ import annotations


def pages() -> dict[str, str]:
    """Every page in Markdown, by its name: one for each code, and more where a code covers many mistakes."""
    from surgery.language.resources import folder

    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder("diagnostics_pages").glob("*.md"))}
