"""MODEL on the command line: a hub id, a local folder, or `demo:NAME`.

Takes that text; gives a skeleton on the meta device (from the configuration alone) or the model with its weights. Promises:
the class is the one that the model was saved as; what cannot be loaded is an `unknown-model` in words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.diagnostics import SurgeryError, fail

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

DEMO = "demo:"
DTYPES = ("float32", "bfloat16", "float16")


def quiet_libraries(bars: bool) -> None:
    """Keep transformers' warnings, and its bars where none are wanted, off the screen."""
    from transformers.utils import logging as talk

    talk.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    (talk.enable_progress_bar if bars else talk.disable_progress_bar)()


def skeleton(name: str) -> PreTrainedModel:
    """The model on the meta device: no weight is read or made. Raises: SurgeryError (unknown-model)."""
    import torch

    config = _config(name)
    with torch.device("meta"):
        model = _asked(name, lambda: _class(config)._from_config(config, dtype=_dtype(config)))
    model.tie_weights()
    return model.eval()


def load(name: str, dtype: str | None = None) -> PreTrainedModel:
    """The model with its weights, in its own dtype or another. Raises: SurgeryError (unknown-model)."""
    import torch

    wanted = getattr(torch, dtype) if dtype else None
    if name.startswith(DEMO):
        from surgery.demo import load_demo

        model = load_demo(name.removeprefix(DEMO))
        return model.to(wanted) if wanted else model
    config = _config(name)
    return _asked(name, lambda: _class(config).from_pretrained(name, dtype=wanted or "auto")).eval()


def preprocessors(name: str) -> list[Any]:
    """The tokenizer (or image processor) that lies beside the weights; none if there is none."""
    from transformers import AutoProcessor, AutoTokenizer

    for kind in (AutoProcessor, AutoTokenizer) if not name.startswith(DEMO) else ():
        try:
            return [kind.from_pretrained(name)]
        except Exception:  # whatever a third party's tokenizer raises, the weights are what was asked for
            continue
    return []


def _config(name: str) -> PreTrainedConfig:
    if name.startswith(DEMO):
        from surgery.demo import demo_config

        return demo_config(name.removeprefix(DEMO))
    from transformers import AutoConfig

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        what = "has no config.json" if Path(name).is_dir() else "is a file"
        raise fail("unknown-model", f"{name} {what}, so it is not a model's folder", helps=_near(name))
    return _asked(name, lambda: AutoConfig.from_pretrained(name))


def _near(name: str) -> tuple[str, ...]:
    is_adapter = (Path(name) / "adapter.surg").is_file()
    return (f"it is a saved adapter: `surgery merge {name} -o OUT` puts it into its model",) if is_adapter else ()


def _class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the model was saved as; its base model where the configuration does not say."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    return next(filter(None, named), None) or transformers.MODEL_MAPPING[type(config)]


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    import torch

    return config.dtype or torch.float32


def _asked(name: str, ask: Callable[[], Any]) -> Any:
    """What transformers answers, with its errors in words."""
    try:
        return ask()
    except (SurgeryError, KeyboardInterrupt):
        raise
    except Exception as error:  # transformers and the hub raise whatever they like for a model that they cannot load
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise fail("unknown-model", f"cannot load `{name}`: {reason}",
                   helps=("a model is a hub id, a local folder, or a demo such as demo:llama",)) from error
