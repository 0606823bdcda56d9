"""Surgery: weight conditioning for fine-tuning, written as short `.surg` specs.

The public names, each imported when it is first asked for, so that `import surgery` stays free of torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Diagnostic": "diagnostics", "SurgeryError": "diagnostics",
    "Spec": "language.tree", "Target": "language.tree",
    "pre": "language.tree", "add": "language.tree", "post": "language.tree",
    "parse": "language.library", "load": "language.library", "shipped": "language.library",
    "Plan": "planning.compile", "plan": "planning.compile", "Report": "planning.figures",
    "Surgeon": "runtime.surgeon", "apply": "runtime.surgeon", "attach": "runtime.attach", "Surgeries": "runtime.stack",
    "import_peft": "peft.import_adapter", "export_peft": "peft.export_adapter", "Exported": "peft.export_adapter",
    "spectrum": "analysis.spectra", "Spectra": "analysis.spectra", "Spectrum": "analysis.spectra",
}
_SPELT = {"plan": "compile"}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"surgery.{_HOMES[name]}"), _SPELT.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
