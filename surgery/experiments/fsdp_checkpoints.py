"""Checkpoints of the Trainer under FSDP that hold the adapter alone.

Takes what accelerate has written into a checkpoint's folder; leaves the adapter's tensors of it, or puts the adapter
beside it. Promises: to resume from the checkpoint stays exact; a file that does not hold all of the adapter is left as
it is, and that is told.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgery.diagnostics import Diagnostic, tell
from surgery.layers.wrappers import bare
from surgery.runtime.atomic_folders import replacing_file
from surgery.text import listed

WHOLE = "pytorch_model_fsdp.bin"  # what accelerate writes under FULL_STATE_DICT


class AdapterCheckpoints(TrainerCallback):
    """`Trainer(..., callbacks=[surgery.AdapterCheckpoints()])` under FSDP. With FULL_STATE_DICT it takes the base model
    out of the `pytorch_model_fsdp.bin` of each checkpoint, which accelerate writes whole for every class but PEFT's:
    while a checkpoint is written, the whole file is on the disk. With SHARDED_STATE_DICT, of which the shards stay as
    they are, it writes the adapter beside them, for `attach`. What is resumed from is the same."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                model: nn.Module | None = None, **more: Any) -> None:
        """Raises: SurgeryError (bad-output)."""
        inner: Any = bare(model) if model is not None else None
        if not hasattr(inner, "_surgery"):
            return
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and "FULL" not in str(plugin.state_dict_type):
            inner.save_pretrained(folder)  # of which every process has a part, and calls this
        elif state.is_world_process_zero and (folder / WHOLE).is_file():
            keep_alone(folder / WHOLE, inner._surgery.names)


def keep_alone(file: Path, names: Collection[str]) -> None:
    """Leave those tensors of a saved state alone; the others are not read. Raises: SurgeryError (bad-output)."""
    held = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    if lacking := [name for name in names if name not in held]:
        tell((Diagnostic("bad-output", f"{file} keeps the base model: it does not hold {listed(lacking)}",
                         severity="warning"),))
        return
    kept = {name: held[name].clone() for name in names}
    del held  # a file that is mapped cannot be replaced everywhere
    with replacing_file(file) as new:
        torch.save(kept, new)
