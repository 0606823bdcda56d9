"""A saved adapter knows the weights that it was trained on, and says when it meets others."""

import base64
import json
import pickle
import struct
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import perturbed

import surgery
from surgery.diagnostics import Diagnostic, SurgeryError, SurgeryWarning
from surgery.models.demo import demo_inputs, load_demo
from surgery.models.names import at_revision, parted, revised
from surgery.runtime.fingerprint import differing, fingerprint_of, is_same

pytestmark = pytest.mark.usefixtures("folder")


def told(model: torch.nn.Module, folder: str = "adapter") -> list[str]:
    """What attaching says of the base."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surgeon = surgery.attach(model, folder)
    found = [w.message.diagnostic for w in caught if isinstance(w.message, SurgeryWarning)]
    assert [w for w in surgeon.plan.warnings if w.code == "another-base"] == found
    return [d.message for d in found]


@pytest.mark.parametrize("shape", [(40, 30), (2, 20, 30), (30, 40), (1200,)])
def test_a_fingerprint_is_of_places_spread_over_the_weight_in_the_order_of_its_entries(shape: tuple[int, ...]) -> None:
    """Adapters that are saved hold it: the places stay the same from one version to the next."""
    weight = torch.zeros(1200)
    weight[[(1200 // 16 * i + 37 * i) % 1200 for i in range(16)]] = torch.arange(16.0)
    held = base64.b64decode(fingerprint_of(weight.reshape(shape)).partition(" ")[2])
    assert struct.unpack("<16f", held) == tuple(range(16))


@pytest.mark.parametrize("family, spec", [("llama", "dora"), ("mixtral", "lora"), ("gpt2", "sora"), ("vit", "oft")])
def test_another_base_is_told_and_its_own_is_not(family: str, spec: str) -> None:
    surgeon = perturbed(load_demo(family), spec)
    surgeon.save("adapter")
    count = len(surgeon.plan.placed)
    assert told(load_demo(family)) == []
    (message,) = told(load_demo(family, seed=1))
    assert message.startswith(f"{count} of {count} operated weights are not those that the adapter in adapter")
    with pytest.raises(SurgeryError, match="another-base"):
        surgery.attach(load_demo(family, seed=1), "adapter", strict=True)


def test_one_weight_that_was_changed_is_named() -> None:
    perturbed(load_demo("llama"), "lora").save("adapter")
    model = load_demo("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.01)
        model.model.norm.weight.mul_(2)  # which the adapter does not operate on
    (message,) = told(model)
    assert message.startswith("1 of 28 operated weights") and message.endswith("`model.layers.2.mlp.up_proj.weight`")


@pytest.mark.parametrize("mode", ["operated", "merged", "disabled", "load_state_dict"])
def test_it_is_of_the_base_whatever_stands_in_the_model(mode: str) -> None:
    surgeon = perturbed(load_demo("llama"), "lora")
    if mode == "merged":
        surgeon.merge()
    if mode == "disabled":
        with surgeon.disabled():
            surgeon.save("adapter")
    elif mode == "load_state_dict":
        surgeon.model.save_pretrained("adapter")  # the way of the Trainer's checkpoints
    else:
        surgeon.save("adapter")
    assert told(load_demo("llama")) == []
    assert told(load_demo("llama", seed=1))


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_the_same(then: torch.dtype, now: torch.dtype) -> None:
    """From one checkpoint of float32, or of the dtype that it was trained in."""
    for kept in (torch.float32, then):
        weight = load_demo("llama").lm_head.weight.to(kept)
        assert is_same(fingerprint_of(weight.to(then)), fingerprint_of(weight.to(now)))
        assert not is_same(fingerprint_of(weight.to(then)), fingerprint_of((1.1 * weight).to(now)))


def test_a_weight_is_read_where_it_lies() -> None:
    """Transposed, empty, with fewer numbers than are read."""
    weight = torch.randn(40, 30)
    assert fingerprint_of(weight.mT.contiguous().mT) == fingerprint_of(weight)
    for shape in ((0, 3), (1, 2), (5,), (2, 3, 4)):
        assert differing({"w": fingerprint_of(torch.ones(shape))}, {"w": fingerprint_of(torch.ones(shape))}) == []
    changed = weight.clone()
    changed[:, 7] += 1
    changed[3] += 1
    assert fingerprint_of(weight + 1e-3) != fingerprint_of(weight)


def test_adapters_of_before_attach_as_before() -> None:
    perturbed(load_demo("llama"), "lora").save("adapter")
    meta = Path("adapter/meta.json")
    known = json.loads(meta.read_text())
    meta.write_text(json.dumps({key: value for key, value in known.items() if key != "base_weights"}))
    assert told(load_demo("llama", seed=1)) == []
    meta.write_text(json.dumps({**known, "base_weights": {"x": "int8 AAAA"}}))
    with pytest.raises(SurgeryError, match="lacks, or has wrongly: base_weights"):
        surgery.attach(load_demo("llama"), "adapter")


@pytest.mark.parametrize("shape", ["files", "memory"])
def test_a_merge_tells_it_too(shape: str) -> None:
    perturbed(load_demo("llama"), "lora").save("adapter")
    load_demo("llama", seed=1).save_pretrained("other", safe_serialization=True)
    if shape == "memory":
        torch.save(load_demo("llama", seed=1).state_dict(), "other/pytorch_model.bin")
        Path("other/model.safetensors").unlink()
    with pytest.warns(SurgeryWarning, match="28 of 28 operated weights"):
        done = surgery.merge_files("adapter", "merged", "other")
    assert bool(done.in_memory) is (shape == "memory")


def test_what_is_saved_says_the_base_and_its_commit() -> None:
    model = load_demo("llama")
    model.config._commit_hash = "c0ffee"
    surgeon = perturbed(model, "lora")
    surgeon.save("adapter")
    meta = json.loads(Path("adapter/meta.json").read_text())
    assert (meta["base_model"], meta["revision"]) == ("demo:llama", "c0ffee")
    surgeon.save("adapter", base_model="user/base@v2", revision="v1")
    meta = json.loads(Path("adapter/meta.json").read_text())
    assert (meta["base_model"], meta["revision"]) == ("user/base", "v1")


def test_a_name_with_a_revision() -> None:
    assert parted("user/base@v2/a") == ("user/base", "v2/a") and parted("demo:llama") == ("demo:llama", None)
    assert at_revision("user/base", "abc") == "user/base@abc" and at_revision("user/base", None) == "user/base"
    assert revised("user/base@abc", "def") == "user/base@def" and revised("demo:llama", None) == "demo:llama"
    Path("user/base@v2").mkdir(parents=True)
    assert parted("user/base@v2") == ("user/base@v2", None)  # a folder of that name
    with pytest.raises(SurgeryError, match="demo:llama has no revisions"):
        revised("demo:llama", "v2")


@pytest.mark.parametrize("kind", [SurgeryWarning, lambda diagnostic: SurgeryError([diagnostic])])
def test_a_warning_and_an_error_reach_another_process_whole(kind) -> None:
    said = kind(Diagnostic("another-base", "these are other weights", helps=("look",)))
    for copy in (pickle.loads(pickle.dumps(said)), deepcopy(said)):
        assert type(copy) is type(said) and str(copy) == str(said) and "other weights" in str(copy)


def said_when_saved(save: Callable[..., None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save("adapter")
    return [w.message.diagnostic.message for w in caught if isinstance(w.message, SurgeryWarning)]


def stepped(model: torch.nn.Module) -> None:
    """One step in training mode of all that trains."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**demo_inputs(model)).logits.square().mean().backward()
    optimiser.step()
    model.eval()


@pytest.mark.parametrize("verb", ["save", "save_pretrained"])
def test_what_moved_beside_the_adapter_is_told_when_it_is_saved(verb: str) -> None:
    """Running statistics, which batch norms move in training mode, and a head that was unfrozen by hand: on the base
    model the adapter gives other outputs."""
    model = load_demo("resnet")
    surgeon = surgery.apply(model, surgery.parse("target conv { add low_rank(rank = 2) }"))
    save = surgeon.save if verb == "save" else model.save_pretrained
    assert said_when_saved(save) == []
    stepped(model)
    (message,) = said_when_saved(save)
    assert "normalization.running_mean`" in message and "normalization.running_var`" in message
    assert "weight" not in message

    model = load_demo("bert")
    surgeon = surgery.apply(model, surgery.parse('target linear "**.query" { add low_rank() }\ntrain "**.pooler.**"'))
    model.classifier.requires_grad_(True)
    stepped(model)
    save = surgeon.save if verb == "save" else model.save_pretrained
    (message,) = said_when_saved(lambda folder: save(f"{folder}-bert"))
    assert message.startswith("since the model was operated on, `classifier.weight`, `classifier.bias` changed")


@pytest.mark.parametrize("change", ["merged", "bfloat16", "wide again", "tied", "tied and trained",
                                    "norms in evaluation"])
def test_nothing_is_told_of_what_an_adapter_holds_or_a_dtype_rounds(change: str) -> None:
    text = 'target linear "**.c_attn" { post diagonal() with bias }\ntrain "**.ln_f.*"'
    model = load_demo("resnet" if change == "norms in evaluation" else "gpt2")
    if change == "tied":
        text = 'target linear "lm_head" untie { add low_rank() }\ntrain "transformer.h.0.ln_1.weight"'
    if change == "tied and trained":
        text = 'target linear "**.c_attn" { add low_rank() }\ntrain "transformer.wte.weight"'
    if change == "norms in evaluation":
        text = "target conv { add low_rank() }"
    surgeon = surgery.apply(model, surgery.parse(text))
    if change == "norms in evaluation":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True: module  # as who fine-tunes detectors has them
    stepped(model)
    if change == "merged":
        surgeon.merge()
    if change == "bfloat16":
        model.to(torch.bfloat16)
    if change == "wide again":
        model.double()
    assert said_when_saved(surgeon.save) == []


def test_what_stands_beside_an_adapter_is_of_any_form() -> None:
    """A scale [] as CLIP learns it, buffers without an index (a graph's edges), and what was no number from the first."""
    model = load_demo("bert")
    model.scale = torch.nn.Parameter(torch.tensor(2.65))
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for name, buffer in {"edges": torch.eye(3).to_sparse(), "ragged": ragged,
                         "packed": torch.ones(3, 3).to_mkldnn(), "unknown": torch.full((3,), float("nan"))}.items():
        model.register_buffer(name, buffer)
    surgeon = surgery.apply(model, surgery.parse('target linear "**.query" { add low_rank() }'))
    stepped(model)
    assert said_when_saved(surgeon.save) == []
    with torch.no_grad():
        model.scale += 1
        model.unknown[0] = 1
    (message,) = said_when_saved(lambda folder: surgeon.save(f"{folder}-again"))
    assert message.startswith("since the model was operated on, `scale`, `unknown` changed")


def test_what_another_surgery_of_the_model_trains_is_not_told() -> None:
    model = load_demo("gpt2")  # whose embedding is the head, too
    surgeries = surgery.Surgeries(model)
    for name, trained in {"one": "**.ln_1.*", "two": "transformer.wte.weight"}.items():
        surgeries.add(name, surgery.parse(f'target linear "**.c_attn" {{ add low_rank() }}\ntrain "{trained}"'))
    surgeries.use("one", "two")
    stepped(model)
    for name in surgeries.names:
        assert said_when_saved(lambda folder, name=name: surgeries.save(name, f"{folder}-{name}")) == []
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    (message,) = said_when_saved(lambda folder: surgeries.save("one", f"{folder}-one"))
    assert "`transformer.ln_f.bias` changed" in message
