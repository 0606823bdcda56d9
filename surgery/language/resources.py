"""Where the grammar, the shipped specs and the pages of diagnostics lie: inside the package in a wheel; in a checkout
the first two beside it."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def folder(name: str) -> Path:
    """The folder `grammar`, `specs` or `diagnostics_pages`."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
