"""Packages that only some of Surgery needs, which the extras of the installation bring.

Takes a package's name; gives nothing. Promises: what lacks is a diagnostic that says what to install, before any work.
"""

from __future__ import annotations

import importlib.util

from surgery.diagnostics import fail


def need(package: str, extra: str, what: str) -> None:
    """Raises: SurgeryError (missing-extra) unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise fail("missing-extra", f"{what} needs {package}, which is not installed",
                   helps=(f"pip install 'surgery[{extra}]'",))
