"""`apply` and `merge`: from a spec to a merged model, and what happens to folders."""

import errno
import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from command import run
from models import LLAMA, SMALLER
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import surgery
from surgery.experiments.training import with_head
from surgery.models.demo import demo_inputs, load_demo
from surgery.models.loading import load, load_with_head

pytestmark = pytest.mark.usefixtures("folder")


def apply(*more: str, out: str = "adapter") -> Result:
    return run("apply", "lora", f"demo:{LLAMA}", "-o", out, *more)


def contents(path: str = ".") -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def numbers(model: torch.nn.Module) -> torch.Tensor:
    """All the numbers that a model gives for its batch."""
    with torch.no_grad():
        found = model(**demo_inputs(model), return_dict=True).values()
    return torch.cat([v.flatten() for v in found if isinstance(v, torch.Tensor)]).double()


def trained(name: str) -> torch.Tensor:
    """Moves the parameters of the saved adapter away from their start; what the operated model then gives."""
    model = load_demo(name)
    surgeon = surgery.attach(model, "adapter")
    draw = torch.Generator().manual_seed(7)
    surgeon.load({key: value + 0.05 * torch.randn(value.shape, generator=draw)
                  for key, value in surgeon.state().items()})
    surgeon.save("adapter", base_model=f"demo:{name}")
    return numbers(model)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5", "mixtral", "vit"])
def test_a_merged_model_is_the_operated_model(family: str) -> None:
    name = SMALLER[family]
    assert run("apply", "sora", f"demo:{name}", "-o", "adapter").exit_code == 0
    operated = trained(name)
    result = run("merge", "adapter", "-o", "merged", "--json")
    errors = json.loads(result.stdout)["relative_errors"]
    assert result.exit_code == 0 and len(errors) == len(surgery.attach(load_demo(name), "adapter").plan.placed)
    assert max(errors.values()) < 1e-6
    merged, base = numbers(load("merged")), numbers(load_demo(name))
    assert (merged - operated).norm() < 1e-5 * operated.norm() < (operated - base).norm()


def test_apply_says_what_it_did_and_what_comes_next() -> None:
    lines = apply().stdout.splitlines()
    assert lines[0] == f"lora on demo:{LLAMA}: 7 weights"
    assert lines[-3].startswith("start     the logits are unchanged")
    assert lines[-2:] == ["saved     adapter", "next      surgery merge adapter -o adapter-merged"]
    following = run(*lines[-1].split()[2:])
    assert following.exit_code == 0 and "largest relative error" in following.stdout


def test_apply_that_merges() -> None:
    assert apply("--merge", out="merged").exit_code == 0
    assert torch.equal(numbers(load("merged")), numbers(load_demo(LLAMA)))


def test_a_folder_of_a_model_is_loaded_without_a_word() -> None:
    apply("--merge", out="merged")
    result = run("apply", "lora", "merged", "-o", "adapter")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(Path("adapter/meta.json").read_text())["base_model"] == "merged"


def test_apply_without_a_folder_saves_nothing() -> None:
    assert run("apply", "lora", "demo:llama").exit_code == 0 and contents() == {}


def test_seed_and_dtype() -> None:
    apply("--seed", "3")
    meta = json.loads(Path("adapter/meta.json").read_text())
    assert (meta["seed"], meta["base_model"]) == (3, f"demo:{LLAMA}")
    apply("--seed", "4", out="other")
    assert contents("adapter")["adapter/adapter.safetensors"] != contents("other")["other/adapter.safetensors"]
    trained(LLAMA)
    errors = json.loads(run("merge", "adapter", "-o", "merged", "--dtype", "bfloat16",
                            "--json").stdout)["relative_errors"]
    assert 1e-4 < max(errors.values()) < 2**-8 and load("merged").dtype == torch.bfloat16


def test_a_spec_that_does_not_start_as_the_base_model_is_not_saved() -> None:
    Path("eager.surg").write_text(
        "update eager() {\n  param A[out, in] ~ normal()\n  return A\n}\n\ntarget linear {\n  add eager()\n}\n")
    result = run("apply", "eager.surg", "demo:llama", "-o", "adapter")
    assert (result.exit_code,
            Path("adapter").exists()) == (1, False) and result.stderr.startswith("error[not-identity]")


# --------------------------------------------------------------------------------------------------- a trained head


def save_base(name: str) -> None:
    """A demo's base model, or its model for language, as `base`."""
    model = load_demo(SMALLER[name])
    (model.base_model if name == "bert" else model).save_pretrained("base")


def headed(name: str, head: bool = True) -> torch.Tensor:
    """Saves a moved adapter of the base with a head of 3 numbers; what the operated model gives."""
    save_base(name)
    model = load_with_head("base", 3, pad_token_id=0)
    lora = surgery.load("lora")
    surgeon = surgery.apply(model, with_head(lora, model) if head else lora)
    draw = torch.Generator().manual_seed(7)
    surgeon.load({key: value + 0.05 * torch.randn(value.shape, generator=draw)
                  for key, value in surgeon.state().items()})
    surgeon.save("adapter", base_model="base")
    return said_of(model)


def said_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**demo_inputs(load_demo("bert"))).logits


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_head_that_was_trained_is_merged_with_the_rest(name: str) -> None:
    """Whether the base model was saved bare, or with another head."""
    operated = headed(name)
    result = run("merge", "adapter", "-o", "merged")
    assert result.exit_code == 0, result.output
    merged = load("merged")
    assert type(merged).__name__.endswith("ForSequenceClassification") and merged.config.num_labels == 3
    merged.config.pad_token_id = 0
    assert (said_of(merged) - operated).norm() < 1e-5 * operated.norm()


def test_an_adapter_that_does_not_say_its_class() -> None:
    """Earlier versions did not write it."""
    operated, meta = headed("bert"), Path("adapter/meta.json")
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "model_class"}))
    assert run("merge", "adapter", "-o", "merged").exit_code == 0
    assert (said_of(load("merged")) - operated).norm() < 1e-5 * operated.norm()


def test_a_head_that_was_not_saved_is_not_made_up() -> None:
    headed("bert", head=False)
    result = run("merge", "adapter", "-o", "merged")
    assert (result.exit_code, Path("merged").exists()) == (1, False)
    assert result.stderr.startswith("error[bad-adapter]") and "classifier.weight [2, 64]" in result.stderr


# --------------------------------------------------------------------------------------------- models with faults


def without(folder: str, change) -> None:
    """A saved demo whose tensors were changed."""
    load_demo(LLAMA).save_pretrained(folder)
    tensors = load_file(Path(folder, "model.safetensors"))
    change(tensors)
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize("change", ids=["lost", "other shape"], argvalues=[
    lambda tensors, name: tensors.pop(name), lambda tensors, name: tensors.update({name: torch.zeros(64, 32)})])
@pytest.mark.parametrize("command", [("apply", "lora", "base", "-o", "adapter"), ("spectrum", "base", "base")],
                         ids=lambda c: c[0])
def test_a_weight_that_is_not_in_the_files_is_not_made_up(change, command: tuple[str, ...]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    without("base", lambda tensors: change(tensors, name))
    result = run(*command)
    assert result.exit_code == 2 and "error[unknown-model]" in result.stderr and f"{name} [64, 64]" in result.stderr
    assert not Path("adapter").exists()


def test_a_demo_of_sizes_that_do_not_fit_together() -> None:
    for command in (("apply", "lora"), ("plan", "lora"), ("modules",)):
        result = run(*command, "demo:llama:hidden_size=7")
        assert result.exit_code == 2 and "error[unknown-model]" in result.stderr and "attention heads" in result.stderr


def test_logits_that_are_not_finite_are_told_as_such() -> None:
    without("base", lambda tensors: tensors["lm_head.weight"].fill_(float("inf")))
    result = run("apply", "lora", "base", "-o", "adapter")
    assert result.exit_code == 1 and "the logits of the base model are not finite" in result.stderr
    assert not Path("adapter").exists()


# ------------------------------------------------------------------------------------------------------------ folders


def test_force_replaces_an_adapter_and_nothing_else() -> None:
    assert apply().exit_code == 0
    before = contents()
    refused = apply("--seed", "1")
    assert (refused.exit_code, contents()) == (2, before) and "--force replaces it" in refused.stderr
    assert apply("--seed", "1", "--force").exit_code == 0
    assert contents().keys() == before.keys() and contents() != before


@pytest.mark.parametrize("name, merged",
                         [("notes.txt", False), ("README.md", True), ("config.json", False), ("adapter.surg", True)])
def test_a_folder_of_another_kind_is_never_replaced(name: str, merged: bool) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("{}")
    result = apply("--force", *["--merge"] * merged, out="mine")
    assert result.exit_code == 2 and result.stderr.startswith("error[bad-output]: mine is not a saved ")
    assert contents() == {f"mine/{name}": b"{}"}


def test_what_can_be_no_folder() -> None:
    Path("file").write_text("")
    assert "file is a file" in apply(out="file").stderr and "file is a file" in apply(out="file/adapter").stderr
    assert contents() == {"file": b""}


def test_a_new_folder_may_lie_deep_and_an_empty_one_is_taken() -> None:
    Path("empty").mkdir()
    assert apply(out="a/b/c").exit_code == apply(out="empty").exit_code == 0
    assert contents("a/b/c").keys() == {f"a/b/c/{name}"
                                        for name in ("adapter.safetensors", "adapter.surg", "meta.json",
                                                     "surgery-manifest.json")}


@pytest.mark.parametrize("error, status",
                         [(OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("merged", [False, True])
def test_never_half_a_folder(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, merged: bool) -> None:
    options = ["--merge"] * merged
    assert apply(*options).exit_code == 0
    before = contents()

    def stopped(path: Path) -> None:
        raise error

    monkeypatch.setattr("surgery.runtime.atomic_folders.flush", stopped)
    assert apply(*options, "--force").exit_code == apply(*options, out="other").exit_code == status
    assert contents() == before and not Path("other").exists()


def test_a_result_that_cannot_be_shown_is_saved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: object, what: str = "") -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("surgery.cli.output.Output.say", closed)
    assert apply().exit_code == 1 and Path("adapter/adapter.safetensors").exists()


def test_a_link_to_a_folder_stays_a_link() -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    assert apply(out="link").exit_code == apply("--force", out="link").exit_code == 0
    assert Path("link").is_symlink() and Path("real/adapter.surg").is_file()


def test_a_full_disk_is_told_when_a_model_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    apply()

    def full(*arguments: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    result = run("merge", "adapter", "-o", "merged")
    assert result.exit_code == 2 and "error[bad-output]: cannot write merged: " in result.stderr
    assert not Path("merged").exists()


def test_merge_refuses_what_does_not_fit() -> None:
    apply()
    other, elsewhere = run("merge", "adapter", "demo:gpt2", "-o", "merged"), run("merge", "adapter", "-o", "adapter",
                                                                                 "--force")
    assert other.exit_code == 1 and "it was saved for demo:llama" in other.stderr
    assert elsewhere.exit_code == 2 and "error[bad-output]" in elsewhere.stderr and not Path("merged").exists()


# ------------------------------------------------------------------------------------------------- a model's files


def test_merge_rewrites_the_files_of_a_model() -> None:
    save_base("llama")
    assert run("apply", "sora", "base", "-o", "adapter").exit_code == 0
    Path("base/pytorch_model.bin").write_bytes(b"old")
    result = run("merge", "adapter", "-o", "merged", "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == ["saved     merged", "next      surgery modules merged"]
    assert result.stderr.strip() == "not copied, since they hold the weights as they were: pytorch_model.bin"
    assert torch.equal(numbers(load("merged")), numbers(load("base")))  # sora starts as the base model
    told = json.loads(run("merge", "adapter", "-o", "merged", "--force", "--json").stdout)
    assert (told["in_memory"], told["left_out"], told["kept"]) == (None, ["pytorch_model.bin"], 0)


def test_merge_says_when_it_loads_the_model() -> None:
    assert apply().exit_code == 0
    assert run("merge", "adapter", "-o", "merged").stderr.strip() == "merged in memory: a demo has no files"
