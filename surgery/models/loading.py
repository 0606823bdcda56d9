"""Models by their names (`names` says what those mean), as transformers makes them.

Takes a name; gives a skeleton on the meta device (from the configuration alone), the model with its weights, or the
pretrained model with a new head for a text task. Promises: the class is the one that the model was saved as, unless a
head is asked for or an adapter was trained on another; what cannot be loaded is an `unknown-model` in words; Python
code that lies in a model's folder runs only where the caller says `trust`, and nobody is asked meanwhile.
"""

from __future__ import annotations

import atexit
import gc
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from surgery.diagnostics import SurgeryError, fail
from surgery.extras import need
from surgery.given import takes
from surgery.models.draws import same_draws
from surgery.models.names import DEMO, HUB_ID, parted, place
from surgery.models.packages import GGUF, PACKAGE
from surgery.text import said_by, some

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Where a model's folder holds its weights in other formats than the one that transformers reads first.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite")
OTHER_FOLDERS = ("original", "metal", "onnx", "openvino", "coreml")


class Trained(Protocol):
    """An adapter: its tensors by the names of the model's parameters, the class of the model it was trained on, the
    classes that its head tells apart, and the token that texts were padded with."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def model_class(self) -> str | None: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def pads_with(self) -> int | None: ...


_TRUST = "read the Python files in its folder, and say --trust-remote-code if they may run"
_MODELS = "a model is a hub id, a local folder or GGUF file, package:NAME, or a demo such as demo:llama"


def quiet_libraries(bars: bool) -> None:
    """Import torch and transformers, for good, and keep their warnings, and bars where none are wanted, off the
    screen. A command begins with it: what it imports itself would else be looked through for garbage with all that."""
    _import_for_good()
    from transformers.utils import logging as talk

    talk.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    (talk.enable_progress_bar if bars else talk.disable_progress_bar)()


def _import_for_good() -> None:
    """Import what makes a million objects, all of which stay: Python looks for garbage among them neither meanwhile
    nor later. Only when the process ends it does: some libraries count then what of theirs has stayed, and complain."""
    if "transformers.modeling_utils" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)


def skeleton(name: str, trust: bool = False) -> PreTrainedModel:
    """The model on the meta device: no weight is read or made. Raises: SurgeryError (unknown-model)."""
    config = _config(name, trust)
    model = _bare(name, _class(name, config, trust), config)
    _note_commit(model, name)
    return model


def _bare(name: str, kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    import torch

    said, own = config.dtype, deepcopy(config)
    dtype = said or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        model = _asked(name, lambda: kind._from_config(own, dtype=dtype))
    # transformers writes down the dtype that it is asked for: one that no file says would be taken for the model's
    model.config.dtype = said
    model.tie_weights()
    return model.eval()


@takes(name="name")
def load(name: str, dtype: str | None = None, trust: bool = False) -> PreTrainedModel:
    """The model with its weights, in its own dtype or another. Raises: SurgeryError (unknown-model)."""
    wanted = _torch_dtype(dtype)
    if name.startswith(DEMO):
        from surgery.models.demo import load_demo

        model = _asked(name, lambda: load_demo(name.removeprefix(DEMO)))
        return model.to(wanted) if wanted else model
    config = _config(name, trust)
    model, lacking = _pretrained(name, _class(name, config, trust), config, wanted)
    if lacking:
        raise fail("unknown-model",
                   f"{name} is no whole {type(model).__name__}: its files do not hold {_shaped(lacking)}",
                   notes=("what is not there would be made up at random",))
    return model


def load_with_head(name: str, outputs: int, seed: int = 0, trust: bool = False, **config: Any) -> PreTrainedModel:
    """The pretrained model with a new head of `outputs` numbers per text, drawn from `seed`; `config` goes to the
    model's configuration. A demo has random weights. Raises: SurgeryError (unknown-model)."""
    return load_with_drawn(name, outputs, seed, trust, **config)[0]


def load_with_drawn(name: str, outputs: int, seed: int = 0, trust: bool = False,
                    **config: Any) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The same, and the shapes of all that is drawn since the model's files do not hold it: the head, and a pooler
    where there is none. Raises: SurgeryError (unknown-model)."""
    import torch
    from transformers import AutoModelForSequenceClassification as Headed

    shape = _config(name, trust)
    shape.update({"num_labels": outputs, **config})
    with same_draws(seed):
        if name.startswith(DEMO):
            return _asked(name, lambda: Headed.from_config(shape, trust_remote_code=trust)).eval(), {}
        model, info = _from_files(name, Headed, config=shape, dtype=torch.float32, trust_remote_code=trust,
                                  output_loading_info=True)
    return model.eval(), {key: list(p.shape) for key, p in model.named_parameters() if key in info["missing_keys"]}


def with_saved_head(name: str, model: PreTrainedModel, saved: Trained, trust: bool = False) -> PreTrainedModel:
    """The model, or a skeleton of the class that an adapter was trained on, where that is another: one with a head, or
    with other classes."""
    if name.startswith(DEMO):
        return model
    kind, config = _form_of(name, saved, trust)
    is_its_own = kind is type(model) and config.id2label == model.config.id2label  # which says how many there are, too
    return model if is_its_own else _bare(name, kind, config)


def load_with_saved_head(name: str, saved: Trained, dtype: str | None = None, trust: bool = False,
                         quantisation: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The model with its weights, of the class that an adapter was trained on: what that has and MODEL has not, a head,
    is for the adapter's tensors to fill. `quantisation`: quantised so when it is loaded, where its files are not.

    Raises: SurgeryError (unknown-model; bad-adapter where MODEL and the adapter together lack a tensor)."""
    from surgery.layers.wrappers import unwrapped

    if name.startswith(DEMO):
        return load(name, dtype)
    trained, config = _form_of(name, saved, trust)
    model, new = _pretrained(name, trained, config, _torch_dtype(dtype), quantisation)
    held = {unwrapped(model, tensor) for tensor in saved.tensors}
    lacking = {tensor: shape for tensor, shape in new.items() if tensor not in held}
    if lacking:
        raise fail("bad-adapter", f"the adapter was trained on a {trained.__name__}, and neither it nor {name} holds "
                   f"{_shaped(lacking)}",
                   helps=("a new head must be trained to be saved: `train \"HEAD.**\"` in the spec",))
    if saved.pads_with is not None:  # by which many find the end of a text
        model.config.pad_token_id = saved.pads_with
    return model


def _pretrained(name: str, kind: type[PreTrainedModel], config: PreTrainedConfig,
                dtype: torch.dtype | None, quantisation: Mapping[str, Any] | None = None,
                ) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The model with its weights as a class, and the parameters that its files do not hold in this shape."""
    options: dict[str, Any] = {}
    if quantisation and getattr(config, "quantization_config", None) is None:
        from transformers.quantizers.auto import AutoQuantizationConfig

        options["quantization_config"] = _asked(name, lambda: AutoQuantizationConfig.from_dict({**quantisation}))
    model, info = _from_files(name, kind, config=config, dtype=dtype or "auto", ignore_mismatched_sizes=True,
                              output_loading_info=True, **options)
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors': its first forward pass unpacks all weights
        model.hf_quantizer.compressor.decompress_model(model)
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return model.eval(), {key: list(p.shape) for key, p in model.named_parameters() if key in new}


def _shaped(tensors: Mapping[str, list[int]]) -> str:
    return some(f"{tensor} {shape}" for tensor, shape in tensors.items())


def folder_of(name: str, all_files: bool = False) -> Path:
    """The folder of a model's files; a hub id's is fetched first: its weights, or `all_files` but for its weights in
    other formats. Raises: SurgeryError (unknown-model)."""
    from huggingface_hub import snapshot_download

    known = Path(place(name))
    wanted = None if all_files else ["config.json", "*.safetensors", "*.safetensors.index.json"]
    others = [*(f"*{ending}" for ending in OTHER_FORMATS), *(f"{folder}/*" for folder in OTHER_FOLDERS)]
    return known if known.is_dir() else Path(_asked(name, lambda: snapshot_download(
        parted(name)[0], revision=parted(name)[1], allow_patterns=wanted, ignore_patterns=others)))


def tokenizer(name: str, trust: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, able to pad. Raises: SurgeryError (unknown-model)."""
    from transformers import AutoTokenizer

    if name.startswith(DEMO):
        raise fail("unknown-model", f"{name} has no tokenizer, so it cannot read text",
                   helps=("a pretrained model can: a hub id, a local folder or package:NAME",))
    found = _asked(name, lambda: AutoTokenizer.from_pretrained(**_source(name), trust_remote_code=trust))
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def preprocessors(name: str, trust: bool = False) -> list[Any]:
    """The tokenizer (or image processor) that lies beside the weights; none if there is none."""
    from transformers import AutoProcessor, AutoTokenizer

    for kind in (AutoProcessor, AutoTokenizer) if not name.startswith(DEMO) else ():
        try:
            return [kind.from_pretrained(**_source(name), trust_remote_code=trust)]
        except Exception:  # whatever a third party's tokenizer raises, the weights are what was asked for
            continue
    return []


def _source(name: str) -> dict[str, Any]:
    """What every `from_pretrained` is told of where a model lies: the folder and, in it, the GGUF file.
    Raises: SurgeryError (unknown-model; missing-extra)."""
    where = Path(place(name))
    if where.suffix != GGUF or not where.is_file():
        revision = parted(name)[1]
        return {"pretrained_model_name_or_path": place(name), **({"revision": revision} if revision else {})}
    need("gguf", "gguf", "reading a GGUF file")
    return {"pretrained_model_name_or_path": str(where.parent), "gguf_file": where.name}


def _from_files(name: str, kind: Any, **options: Any) -> Any:
    """What a class of transformers makes of a model's files; GGUF weights become plain numbers.
    Raises: SurgeryError (unknown-model; missing-extra)."""
    import transformers
    from transformers.utils.logging import is_progress_bar_enabled

    source = _source(name)
    if "gguf_file" not in source:
        found = _asked(name, lambda: kind.from_pretrained(**source, **options))
        _note_commit(found[0] if isinstance(found, tuple) else found, name)
        return found
    if packs := getattr(transformers, "GgufConfig", None):  # else later versions may keep the weights packed
        options["quantization_config"] = packs(dequantize=True)
    # Its bar for these files is one that nothing turns off.
    with nullcontext() if is_progress_bar_enabled() else redirect_stderr(StringIO()):
        found = _asked(name, lambda: kind.from_pretrained(**source, **options))
    model = found[0] if isinstance(found, tuple) else found
    if hasattr(model.config, "quantization_config"):  # it would not be saved, though nothing is packed any more
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False
    return found


def _note_commit(model: PreTrainedModel, name: str) -> None:
    if commit := _commit(name):
        model.config._commit_hash = commit  # which transformers set once, and which no config.json is saved with


def _commit(name: str) -> str | None:
    """The commit of a hub's model that has just been fetched, by the folder of the cache that its files lie in."""
    from huggingface_hub import try_to_load_from_cache

    known, revision = parted(name)
    if name.startswith(DEMO) or Path(place(name)).exists():
        return None
    found = try_to_load_from_cache(known, "config.json", revision=revision)
    commit = Path(found).parent.name if isinstance(found, str) else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def _config(name: str, trust: bool = False) -> PreTrainedConfig:
    if name.startswith(DEMO):
        from surgery.models.demo import demo_config

        return _asked(name, lambda: demo_config(name.removeprefix(DEMO)))
    from transformers import AutoConfig

    exists = bool(name) and Path(name).exists()
    if exists and Path(name).suffix != GGUF and not (Path(name) / "config.json").is_file():
        what = "has no config.json" if Path(name).is_dir() else "is a file"
        is_adapter = (Path(name) / "adapter.surg").is_file()
        near = (f"it is a saved adapter: `surgery merge {name} -o OUT` puts it into its model",) if is_adapter else ()
        raise fail("unknown-model", f"{name} {what}, so it is not a model's folder", helps=near)
    if not (exists or name.startswith(PACKAGE) or HUB_ID.fullmatch(name)):
        raise fail("unknown-model", f"there is no folder `{name}`, and it is no id of the hub (OWNER/NAME)",
                   helps=(_MODELS,))
    source = _source(name)
    found = _asked(name, lambda: AutoConfig.from_pretrained(**source, trust_remote_code=trust))
    if "gguf_file" in source:  # which does not say its class
        found.architectures = _generator(found)
    # OWNER/NAME is code too: a kernel that transformers would fetch from the hub and run.
    parts = [found, *(getattr(found, part, None) for part in getattr(found, "sub_configs", None) or ())]
    kernels = [k for part in parts if isinstance(k := getattr(part, "_attn_implementation", None), str) and "/" in k]
    if kernels and not trust:
        raise fail("unknown-model", f"{name} asks for attention by code from elsewhere: {some(kernels)}",
                   helps=("say --trust-remote-code if it may run",))
    return found


def _generator(config: PreTrainedConfig) -> list[str]:
    """The class of a configuration's models that give the next token, which is what GGUF files hold."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    tables = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    return [kind.__name__ for table in tables if (kind := _mapped(table, config))][:1]


def _class(name: str, config: PreTrainedConfig, trust: bool) -> type[PreTrainedModel]:
    """The class that the model was saved as; its base model where the configuration does not say. One that lies in the
    model's folder is read only if we `trust` it."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module as of_folder

    saved_as = config.architectures or ()
    for reference in (getattr(config, "auto_map", None) or {}).values() if trust else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] in saved_as:
            return _asked(name, lambda: of_folder(reference, **_source(name)))
    named = [getattr(transformers, each, None) for each in saved_as]
    found = next(filter(None, named), None) or _mapped(transformers.MODEL_MAPPING, config)
    if found is None:
        raise fail("unknown-model", f"{name} is of a class that transformers does not have: {some(saved_as) or 'none'}")
    return found


def _form_of(name: str, saved: Trained, trust: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that an adapter was trained on, and MODEL's configuration with as many labels as the adapter's head
    has."""
    from surgery.layers.wrappers import unwrapped

    config = _config(name, trust)
    kind = _class_of(config, saved, _class(name, config, trust))
    made = _bare(name, kind, config)
    forms = {tensor: tuple(p.shape) for tensor, p in made.named_parameters()}
    for tensor, value in saved.tensors.items():
        (rows, *rest), (wanted, *others) = forms.get(unwrapped(made, tensor)) or (0,), tuple(value.shape) or (0,)
        if rows == config.num_labels != wanted and rest == others:
            config.num_labels = wanted
    if len(saved.classes) == config.num_labels:
        config.update({"id2label": dict(enumerate(saved.classes)),
                       "label2id": {name: i for i, name in enumerate(saved.classes)}})
    return kind, config


def _class_of(config: PreTrainedConfig, saved: Trained, own: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that an adapter says it was trained on, if it is one for this configuration; else the model's `own`.
    One that does not say has a head for text tasks if its tensors do not fit the class that the model was saved as."""
    import transformers

    said = saved.model_class
    if said is not None:
        named = getattr(transformers, said, None)
        choices = getattr(named, "_model_mapping", None)  # of a class that stands for one of each family
        found = _mapped(choices, config) if choices else named
        is_one = isinstance(config, getattr(found, "config_class", None) or ())
        return found if is_one and found is not None else own
    modules = {tensor.partition(".")[0] for tensor in saved.tensors}
    is_base = own is _mapped(transformers.MODEL_MAPPING, config)
    headed = _mapped(transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, config)
    return headed if headed and is_base and own.base_model_prefix in modules else own


def _mapped(table: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that one of transformers' tables has for a configuration."""
    return table.get(type(config), None)


def _torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return getattr(torch, name) if name else None


def _asked(name: str, ask: Callable[[], Any]) -> Any:
    """What transformers answers, with its errors in words."""
    try:
        return ask()
    except (SurgeryError, KeyboardInterrupt):
        raise
    except Exception as error:  # transformers and the hub raise whatever they like for a model that they cannot load
        helps = (_TRUST,) if "trust_remote_code" in str(error) else (_MODELS,)
        # their messages are long: the first line, and the next where that only announces it
        lines = said_by(error)
        why = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise fail("unknown-model", f"cannot load `{name}`: {why}", helps=helps) from error
