"""What `save_pretrained` of an operated model writes, and with it the Trainer's checkpoints: the adapter alone.

Mixed into the class of an operated model that has `save_pretrained`. Promises: the folder is one that `attach` reads;
its tensors lie in `model.safetensors`, under their names in the model, which the Trainer looks for and gives to
`load_state_dict`; merged or switched off, the model is saved as the plain one that it then is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from surgery import __version__
from surgery.diagnostics import fail, tell
from surgery.language.library import inlined
from surgery.language.tree import Spec
from surgery.runtime.adapter import Adapter
from surgery.runtime.atomic_folders import replacing_file
from surgery.runtime.operated import Operated, operated_class
from surgery.runtime.outside_adapter import changes_outside
from surgery.runtime.remade import departure_from_summary, digest_of, is_rounding, summary_of
from surgery.runtime.saved_format import CHECKPOINT, FORMAT, META, REMADE, SPEC, TENSORS, WITH_RULES, not_finite
from surgery.runtime.sharding import gather_up, is_part, on_first, whole
from surgery.runtime.step_tensors import SharedTensors, refuse_unused
from surgery.text import dtype_text, listed


@dataclass(frozen=True)
class Surgery:
    """What a model knows of the surgery that it carries: enough to save it, also from a copy of the model. `names`: its
    tensors in the model; `saves_as`: how to save it where the model alone cannot; `base`: the fingerprints of the
    operated weights when they were operated on, `outside` those of all other tensors that the model saves; `made`: the
    digests of the frozen tensors that the spec, the seed and W determine, in an adapter of the dtype `made_in`."""

    spec: Spec
    seed: int
    dtype: torch.dtype
    names: tuple[str, ...]
    untied: tuple[str, ...]
    mode: str = "operated"
    saves_as: str = ""
    base: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    made_in: torch.dtype = torch.float32

    def left_out(self, tensors: Mapping[str, torch.Tensor], self_contained: bool) -> dict[str, dict[str, Any]]:
        """The tensors that need not be saved, since they still are what is made again, and what is said of each."""
        # They are made again in the dtype that `meta.json` says, and what is rounded on the way would be another one.
        made = {} if self_contained or self.dtype != self.made_in else self.made
        return {name: summary_of(tensors[name]) for name, digest in made.items() if digest == digest_of(tensors[name])}

    def meta(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], remade: Mapping[str, Any],
             **more: Any) -> dict[str, Any]:
        """The contents of `meta.json`. What is whole is readable by every version."""
        forms = {n: {"shape": list(t.shape), "dtype": dtype_text(t.dtype)} for n, t in tensors.items()
                 if n not in remade}
        of_rules = {"torch_version": torch.__version__, "remade": dict(remade)} if remade else {}
        return {"format_version": WITH_RULES if remade else FORMAT, "surgery_version": __version__,
                "base_model": None, "revision": None,
                "model_class": type(model).__name__.removeprefix("FSDP"), "seed": self.seed,
                "dtype": dtype_text(self.dtype), "base_weights": dict(self.base),
                "quantization": _quantisation(model),
                "tensors": forms, **of_rules, **more}

    def text(self) -> str:
        """The spec on its own."""
        return inlined(self.spec).to_surg()


def _quantisation(model: nn.Module) -> dict[str, Any] | None:
    """How the base model is quantised, as its configuration says it; None for plain weights."""
    said = getattr(getattr(model, "config", None), "quantization_config", None)
    if said is None:
        return None
    return json.loads(json.dumps(said.to_dict() if hasattr(said, "to_dict") else dict(said), default=str))


def on_cpu(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU. A shard, or a tensor without data, would be saved as a part that looks like a whole."""
    if tensor.is_meta or hasattr(tensor, "placements") or not tensor.numel():  # of other classes than DTensor too
        raise fail("bad-output", f"{name} is not here as a whole (it is sharded or on the meta device)",
                   helps=("gather the model's parameters before saving",))
    return tensor.detach().cpu().contiguous()


def of_adapters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which names of a model's tensors are those of adapters."""
    ours = tuple(f"{name}." for name, m in model.named_modules(remove_duplicate=False)
                 if isinstance(m, (Adapter, SharedTensors)))
    return [name for name in names if name.startswith(ours)]


class SavesAdapter(Operated):
    """Mixed into the class of an operated model of transformers."""

    _surgery: Surgery

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers asks a quantised model before it trains it: whether adapters stand on it, which PEFT's says
        by this attribute."""
        adapted = getattr(self, "is_quantized", False) and self._surgery.mode == "operated"
        return bool(adapted) or vars(self).get("_hf_peft_config_loaded", False)

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, loaded: bool) -> None:
        vars(self)["_hf_peft_config_loaded"] = loaded

    def save_pretrained(self, save_directory: str | PathLike, is_main_process: bool = True,
                        state_dict: Mapping[str, torch.Tensor] | None = None, **options: Any) -> None:
        """Write the adapter into a folder, beside what lies there, as `surgery.attach` reads it; a model that is merged
        or switched off, as the plain model that it then is. Of a sharded model every process calls this.

        Raises: SurgeryError (bad-output)."""
        gather_up(self)
        state = self.state_dict() if state_dict is None else state_dict
        if self._surgery.mode != "operated":
            refuse_unused(of_adapters(self, state))  # which was given, and taken in another mode
            with recorded_as_untied(self.config, self._surgery.untied):
                cast(Any, super()).save_pretrained(  # that of the model of transformers that this is mixed into
                    save_directory, is_main_process=is_main_process, state_dict=state, **options)
        elif is_main_process or any(map(is_part, state.values())):
            _write(self, Path(save_directory), state, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ever; a state that holds the adapter alone, as a checkpoint does, does not lack the base model."""
        remade = said_in(state_dict)
        if self._surgery.mode != "operated":
            refuse_unused(remade)
        refuse_others(self, remade)  # whatever else the state holds
        if remade:
            state_dict = {name: value for name, value in state_dict.items() if name != REMADE}
        if not (state_dict or remade) or not set(state_dict) <= {*self._surgery.names}:
            if remade:  # which the model has, or they were refused
                own = self.state_dict()
                state_dict = {**state_dict, **{name: own[name] for name in remade}}
            return super().load_state_dict(state_dict, strict, assign)
        loaded = super().load_state_dict(state_dict, False, assign)  # not strict: it has none of the base model's
        missing = [name for name in self._surgery.names if name not in state_dict and name not in remade]
        if missing and strict:
            raise RuntimeError(f"the state lacks {listed(missing)}")
        return type(loaded)(missing, loaded.unexpected_keys)


def have_save_adapters(model: nn.Module) -> list[Any]:
    """Have the models of transformers that adapters are in, `model` and those within it, save as `SavesAdapter`
    does; gives these."""
    # models within the model are saved by themselves too; the root may be an operated layer, which nothing saves so
    savers = [m for m in model.modules() if hasattr(type(m), "save_pretrained") and not isinstance(m, Operated)]
    savers = [m for m in savers if any(isinstance(inner, Adapter) for inner in m.modules())]
    for saver in savers:
        saver.__class__ = operated_class(type(saver), (), SavesAdapter)
    return savers


def note(savers: Iterable[Any], model: nn.Module, surgery: Surgery) -> None:
    """Record the surgery of `model` on it and on the models within it."""
    inner = replace(surgery, names=(), saves_as=f"it is a part of a {type(model).__name__} that was operated on, and "
                    "attach() takes what was saved of the whole: save that")
    for saver in savers:
        saver._surgery = surgery if saver is model else inner


def save_adapters_no_more(savers: Iterable[Any]) -> None:
    """Give models that `have_save_adapters` gave back their own classes."""
    for saver in savers:
        saver.__class__ = type(saver).surgery_base
        del saver._surgery


def said_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the tensors that it does not hold."""
    said = json.loads(bytes(state[REMADE].cpu().tolist())) if REMADE in state else {}
    return {name: {**form, "seed": said["seed"]} for name, form in said.get("remade", {}).items()}


def refuse_others(model: nn.Module, remade: Mapping[str, Any]) -> None:
    """Raises: SurgeryError (not-remade), unless a model has what a checkpoint has had made again."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in remade} if remade else {}
    for name, said in remade.items():
        held = whole(tensors[name].detach()) if name in tensors else torch.empty(0)
        change = departure_from_summary(said, held)
        if change and not (held.is_floating_point() and is_rounding(change, held.dtype)):
            raise fail("not-remade", f"{name}, which this checkpoint does not hold, is another one in this model",
                       notes=(f"the checkpoint was made with the seed {said['seed']}",),
                       helps=(f"apply the spec to the same base model with seed={said['seed']}, and go on from there",
                              "or surgery.attach(model, \"the checkpoint's folder\")"))
        if change:
            warnings.warn(f"{name} differs by rounding, {change:.1e}, from what the checkpoint was made with",
                          stacklevel=3)


def _write(model: SavesAdapter, folder: Path, state: Mapping[str, torch.Tensor], push_to_hub: bool = False,
           self_contained: bool = False, **options: Any) -> None:
    surgery = model._surgery
    missing = [name for name in surgery.names if name not in state]
    if surgery.saves_as or push_to_hub or missing:
        what = f"the state_dict that was given lacks {listed(missing)}" if missing else (
            surgery.saves_as or "an adapter is not pushed to the hub from here: surgeon.push_to_hub(\"OWNER/NAME\")")
        raise fail("bad-output", f"this operated model cannot be saved so: {what}")
    like = next(filter(is_part, state.values()), None)
    tensors = {name: on_cpu(name, whole(state[name].detach())) for name in surgery.names}
    if broken := not_finite(tensors):  # no error: the training that goes on has more to tell
        warnings.warn(f"the checkpoint {folder} holds what is not finite, and attach() will refuse it: {broken}",
                      stacklevel=2)
    tell(changes_outside(model, surgery.outside))
    remade = surgery.left_out(tensors, self_contained)
    held = {name: tensor for name, tensor in tensors.items() if name not in remade}
    if remade:  # which `load_state_dict` is to know, and it gets the tensors alone
        said = json.dumps({"seed": surgery.seed, "remade": remade}).encode()
        held[REMADE] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    about = surgery.meta(model, tensors, remade, base_model=getattr(model.config, "_name_or_path", None) or None,
                         revision=getattr(model.config, "_commit_hash", None))

    def write() -> None:
        if (folder / TENSORS).exists():
            raise fail("bad-output", f"{folder} holds an adapter that save() wrote", helps=("name another folder",))
        if (folder / "config.json").exists():
            warnings.warn(f"{folder} holds the config.json of another save: from_pretrained would take the adapter "
                          "that is written there for a whole model, and start its weights at random; "
                          "surgery.attach(model, folder) reads it", stacklevel=2)
        # The list comes last: of an interrupted save, it does not agree with the rest.
        for name, content in ((CHECKPOINT, to_bytes(held)), (SPEC, surgery.text().encode()),
                              (META, (json.dumps(about, indent=2) + "\n").encode())):
            with replacing_file(folder / name) as new:
                new.write_bytes(content)

    on_first(like, write)


@contextmanager
def recorded_as_untied(config: Any, untied: tuple[str, ...]) -> Iterator[None]:
    """Inside, the configuration says that embeddings which `untie` parted are not tied, so that a reload keeps both."""
    before = getattr(config, "tie_word_embeddings", False)
    config.tie_word_embeddings = before and not untied
    try:
        yield
    finally:
        config.tie_word_embeddings = before
