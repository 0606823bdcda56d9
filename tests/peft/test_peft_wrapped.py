"""Files that PEFT, or a script of its user's, wrote in another form than `save_pretrained` does today: a pickle of tensors, and
names with what torch.compile, DistributedDataParallel and the like add to them. They say what PEFT's model says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from command import run
from peft_trips import Demo, adapted, apart, config_of, opened, saved, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.diagnostics import SurgeryError, SurgeryWarning
from surgery.layers.wrappers import unwrapped

SAME = 2e-6
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter on every kind of place: weights, an embedding, a norm that is saved whole; and what PEFT says."""
    there = tmp_path_factory.mktemp("peft") / "there"
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["norm"])
    return there, Demo("llama").from_peft(config, there)


def renamed(lora: Path, folder: Path, change: Callable[[str], str]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config_of(lora)), encoding="utf-8")
    save_file({change(name): t.clone() for name, t in tensors_of(lora).items()}, folder / FILE)
    return folder


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):  # the wrapper alone is what is tested
        yield


def eager(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def test_a_pickle_of_tensors(lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    there, wanted = lora
    opened(Demo("llama").model(), there).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled" / FILE).exists()
    surgery.import_peft(model := Demo("llama").model(), tmp_path / "pickled")
    assert apart(Demo("llama").says(model), wanted) <= SAME
    config = {**config_of(there), "r": 3}
    (tmp_path / "pickled/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SurgeryError, match="adapter_model.bin holds"):  # the file that was read
        surgery.import_peft(Demo("llama").model(), tmp_path / "pickled")


NAMES: dict[str, Callable[[str], str]] = {
    "compiled, whole": lambda name: f"_orig_mod.{name}",
    "parallel, whole": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the inner model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "parallel inside": lambda name: name.replace("base_model.model.", "base_model.model.module.", 1),
    "layer by layer": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "a layer, wrapped by PEFT": lambda name: name.replace(".lora_", ".module.lora_"),
    "sharded": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_names_with_what_wrappers_add(change: Callable, lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    there, wanted = lora
    folder = renamed(there, tmp_path / "named", change)
    with pytest.warns(SurgeryWarning, match="what wrappers add") as told:
        surgeon = surgery.import_peft(model := Demo("llama").model(), folder)
    assert len(told) == 1
    assert apart(Demo("llama").says(model), wanted) <= SAME
    assert surgeon.state().keys() == surgery.import_peft(Demo("llama").model(), there).state().keys()


def test_the_command_tells_it(lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = renamed(lora[0], tmp_path / "named", NAMES["both"])
    result = run("import", folder, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "warning[bad-adapter]: names of adapter_model.safetensors hold" in result.stderr
    assert "_orig_mod" in result.stderr and "import" not in result.stderr


@pytest.mark.parametrize("around", [lambda m: m, eager, nn.DataParallel], ids=["plain", "compiled", "parallel"])
@pytest.mark.parametrize("fields", [
    {"target_modules": ["q_proj"]}, {"target_modules": "all-linear", "exclude_modules": ["_orig_mod.lm_head"]},
    {"target_modules": ["_orig_mod.model.layers.0.self_attn.q_proj"], "modules_to_save": ["norm"]}],
    ids=["ends", "all", "whole names"])
def test_what_pefts_model_around_a_compiled_one_saves(fields: dict, around: Callable, tmp_path: Path) -> None:
    demo = Demo("llama")
    model = adapted(eager(demo.model()), peft.LoraConfig(r=2, **fields))
    wanted = demo.says(model)
    assert any("._orig_mod." in name for name in tensors_of(saved(model, tmp_path)))
    with pytest.warns(SurgeryWarning, match="what wrappers add"):
        surgery.import_peft(given := around(demo.model()), tmp_path)
    assert apart(demo.says(given), wanted) <= SAME


def test_a_plain_adapter_on_a_model_in_wrappers(lora: tuple[Path, torch.Tensor]) -> None:
    there, wanted = lora
    whole, inside = eager(Demo("llama").model()), Demo("llama").model()
    inside.model.layers[1] = eager(inside.model.layers[1])
    for model in (whole, inside, nn.DataParallel(inside)):
        with warnings.catch_warnings(action="error", category=SurgeryWarning):
            surgeon = surgery.import_peft(model, there)
        assert apart(Demo("llama").says(model), wanted) <= SAME
        surgeon.remove()


def test_a_head_of_more_classes_of_a_compiled_classifier(tmp_path: Path) -> None:
    base = Demo("bert").model()
    base.save_pretrained(tmp_path / "base")
    config = {**json.loads((tmp_path / "base/config.json").read_text()), "num_labels": 5, "id2label": {i: str(i) for i in range(5)}}
    torch.manual_seed(0)
    model = adapted(eager(type(base)(type(base.config).from_dict(config))), peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS"))
    saved(model, tmp_path / "there")
    result = run("import", tmp_path / "there", tmp_path / "base", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert surgery.load_model(str(tmp_path / "base")).config.num_labels != 5
    found = load_file(tmp_path / "out/adapter.safetensors")
    assert any(tensor.shape[0] == 5 for name, tensor in found.items() if "classifier" in name)


# ---------------------------------------------------------------------------------- what is really called like that


class Holder(nn.Module):
    """A model with children of its own that are called `module`, and one beside them."""

    def __init__(self, beside: bool = True):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.module.add_module("module", nn.Linear(4, 4))
        if beside:
            self.add_module("0", nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.module(x)
        return x + self.get_submodule("0")(x) if "0" in self._modules else x


def made(**more: bool) -> Holder:
    torch.manual_seed(0)
    return Holder(**more)


@pytest.mark.parametrize("change", [str, NAMES["both"], NAMES["the inner model"]],
                         ids=["as it is", "both", "the inner model"])
def test_a_child_that_is_called_module_keeps_its_name(change: Callable, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = adapted(made(), peft.LoraConfig(r=2, target_modules=["module.0", "module.module"]))
    wanted = model(x).detach()
    folder = renamed(saved(model, tmp_path / "there"), tmp_path / "named", change)
    with warnings.catch_warnings(action="ignore" if change is not str else "error", category=SurgeryWarning):
        surgeon = surgery.import_peft(given := made(), folder)
    assert {p.site.name for p in surgeon.plan.placed} == {"module.0", "module.module"}
    assert apart(given(x).detach(), wanted) <= SAME


def test_what_would_be_another_modules_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    there = saved(adapted(made(), config), tmp_path / "there")
    folder = renamed(there, tmp_path / "named", lambda name: name.replace("model.0.", "model.module._orig_mod.0."))
    model = made()
    with pytest.raises(SurgeryError, match=r"holds `module.0.lora_A.weight` twice, once as `module._orig_mod.0.lora_A"):
        surgery.import_peft(model, folder)
    surgery.apply(model, surgery.parse("target linear { add low_rank(2) }"))  # it is as it was
    both = {**tensors_of(there), **{f"_orig_mod.{name}": t.clone() for name, t in tensors_of(there).items()}}
    save_file(both, there / FILE)
    with pytest.raises(SurgeryError, match="is there once more, without what wrappers add"):
        surgery.import_peft(made(), there)


def test_a_wrapper_that_no_name_tells_from_a_module_is_refused(tmp_path: Path) -> None:
    there = saved(adapted(made(), peft.LoraConfig(r=2, target_modules=["module.0", "module.module"])), tmp_path / "there")
    with pytest.raises(SurgeryError, match="lacks 2 tensors(.|\n)*module.0.lora_A.weight"):
        surgery.import_peft(made(), renamed(there, tmp_path / "named", NAMES["parallel inside"]))


def test_an_end_of_names_stays_one(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    there = saved(adapted(Demo("llama").model(), config), tmp_path / "there")
    said = {**config_of(there), "target_modules": ["module.q_proj"]}
    (there / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"\[no-match\]: target_modules names no module"):
        surgery.import_peft(Demo("llama").model(), there)


def test_a_name_without_wrappers() -> None:
    model = made()
    for name, own in {"_orig_mod.module.0.weight": "module.0.weight", "module.module.weight": "module.module.weight",
                      "module.module.module.bias": "module.module.bias", "module._orig_mod.1.lora_A.weight":
                      "module.1.lora_A.weight", "nothing.module.x": "nothing.module.x", "module": "module"}.items():
        assert unwrapped(model, name) == own
        assert unwrapped(eager(model), name) == own
