"""Surgery: weight conditioning for fine-tuning, written as short `.surg` specs.

The public names, each imported when it is first asked for, so that `import surgery` stays free of torch.

    surgeon = surgery.apply(model, "sora")      # operate on a model in place, by a shipped spec, a file or a `Spec`
    surgeon.save("out")                         # the adapter alone; surgery.attach(model, "out") puts it on again
    surgeon.merge()                             # W' in the place of W
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what a type checker and an editor read: `_HOMES` says the same to Python
    from surgery.analysis.page import report_page
    from surgery.analysis.spectra import Spectra, Spectrum, spectrum
    from surgery.diagnostics import Diagnostic, SurgeryError, SurgeryWarning
    from surgery.experiments.bench import bench
    from surgery.experiments.comparison import compare
    from surgery.experiments.evaluation import evaluate
    from surgery.experiments.fine_tuning import Training, train
    from surgery.experiments.fsdp_checkpoints import AdapterCheckpoints
    from surgery.language.library import load, parse, shipped
    from surgery.language.tree import Parameter, Spec, Target, add, post, pre
    from surgery.matching.module_tree import modules
    from surgery.matching.selection import explain
    from surgery.models.loading import load as load_model
    from surgery.peft.diff import diff
    from surgery.peft.export_adapter import Exported, export_peft
    from surgery.peft.import_adapter import import_peft
    from surgery.planning.check import check
    from surgery.planning.compile import Plan
    from surgery.planning.compile import compile as plan
    from surgery.planning.figures import Report
    from surgery.runtime.apply import apply
    from surgery.runtime.apply_files import AppliedFiles, apply_files
    from surgery.runtime.attach import attach, from_pretrained
    from surgery.runtime.difference import Difference
    from surgery.runtime.merge_files import MergedFiles, merge_files
    from surgery.runtime.save import save_merged
    from surgery.runtime.stack import Surgeries
    from surgery.runtime.surgeon import Surgeon

_HOMES = {
    "Diagnostic": "diagnostics", "SurgeryError": "diagnostics", "SurgeryWarning": "diagnostics",
    "Spec": "language.tree", "Target": "language.tree", "Parameter": "language.tree",
    "pre": "language.tree", "add": "language.tree", "post": "language.tree",
    "parse": "language.library", "load": "language.library", "shipped": "language.library",
    "check": "planning.check", "Plan": "planning.compile", "plan": "planning.compile", "Report": "planning.figures",
    "load_model": "models.loading", "modules": "matching.module_tree", "explain": "matching.selection",
    "AdapterCheckpoints": "experiments.fsdp_checkpoints",
    "apply_files": "runtime.apply_files", "AppliedFiles": "runtime.apply_files",
    "Surgeon": "runtime.surgeon", "apply": "runtime.apply", "attach": "runtime.attach",
    "from_pretrained": "runtime.attach",
    "save_merged": "runtime.save", "merge_files": "runtime.merge_files", "MergedFiles": "runtime.merge_files",
    "Surgeries": "runtime.stack", "diff": "peft.diff", "Difference": "runtime.difference",
    "import_peft": "peft.import_adapter", "export_peft": "peft.export_adapter", "Exported": "peft.export_adapter",
    "spectrum": "analysis.spectra", "Spectra": "analysis.spectra", "Spectrum": "analysis.spectra",
    "report_page": "analysis.page", "bench": "experiments.bench", "compare": "experiments.comparison",
    "train": "experiments.fine_tuning", "Training": "experiments.fine_tuning", "evaluate": "experiments.evaluation",
}
_SPELT = {"plan": "compile", "load_model": "load"}

__all__ = [
    "__version__", "AdapterCheckpoints", "add", "AppliedFiles", "apply", "apply_files", "attach", "bench", "check",
    "compare", "Diagnostic", "diff", "Difference", "evaluate", "explain", "export_peft", "Exported",
    "from_pretrained", "import_peft", "load", "load_model", "merge_files", "MergedFiles", "modules", "Parameter",
    "parse", "Plan", "plan", "post", "pre", "Report", "report_page", "save_merged", "shipped", "Spec", "Spectra",
    "Spectrum", "spectrum", "Surgeon", "Surgeries", "SurgeryError", "SurgeryWarning", "Target", "train", "Training",
]

if not TYPE_CHECKING:  # a type checker takes a misspelt name for a mistake, and not for `Any`
    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'surgery' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"surgery.{_HOMES[name]}"), _SPELT.get(name, name))
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
