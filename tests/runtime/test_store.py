"""Saved adapters and merged models: what is written comes back bit for bit,
and what does not fit is all said at once."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from models import LLAMA, SMALLER, logits, perturbed
from safetensors.torch import load_file, save_file

import surgery
from surgery.models.demo import load_demo
from surgery.planning import initial_values
from surgery.runtime import atomic_folders
from surgery.runtime.atomic_folders import MANIFEST
from surgery.runtime.save import save_merged
from surgery.runtime.saved_format import FILES, META, SPEC, TENSORS

EVERYTHING = """
spec everything(rank: int = 3)
update shared_random(rank: int = 3) {
  shared frozen param A[rank, in] ~ kaiming_uniform()
  frozen param B[out, rank] ~ normal(std = 0.1)
  shared param d[rank] = 0.1
  param b[out] = 0
  return diag(b) @ B @ diag(d) @ A
}
target linear "**.{q,k}_proj" { pre diagonal() add shared_random(rank) post orthogonal(2) }
target linear "**.mlp.*_proj" { add low_rank(rank) post magnitude() }
train "**.*norm.weight"
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter on the demo llama."""
    perturbed(load_demo(LLAMA), "lora").save(tmp_path / "adapter")
    return tmp_path / "adapter"


def faults(folder: Path, model: torch.nn.Module | None = None) -> str:
    """What `attach` says of a folder. The model must not be touched."""
    model = model or load_demo(LLAMA)
    before, classes = dict(model.state_dict()), [type(m) for m in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(model, folder)
    assert classes == [type(m) for m in model.modules()] and required == [p.requires_grad for p in model.parameters()]
    assert before.keys() == model.state_dict().keys()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "vit", "resnet"])
def test_attached_model_is_bit_equal(name: str, tmp_path: Path) -> None:
    spec = surgery.load("sora") if name != "resnet" else surgery.parse("spec s\ntarget conv { add low_rank(2) }")
    model = load_demo(SMALLER[name])
    perturbed(model, spec).save(tmp_path / "a")
    other = load_demo(SMALLER[name])
    surgery.attach(other, tmp_path / "a")
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), logits(load_demo(SMALLER[name])))


def test_frozen_shared_and_trained_tensors_are_saved_once(tmp_path: Path) -> None:
    model = load_demo(LLAMA)
    surgeon = perturbed(model, surgery.parse(EVERYTHING), seed=7)
    surgeon.save(tmp_path / "a", base_model=f"demo:{LLAMA}", revision="main", self_contained=True)
    found, meta = load_file(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / META).read_text())
    assert found.keys() == meta["tensors"].keys() == surgeon.named_tensors().keys()
    # Per target: A has one shape, d one; B and b belong to each of the 2 modules. 3 MLP modules with A, B, m. 3 norms.
    assert len(found) == 1 + 1 + 2 * (1 + 1 + 1 + 2) + 3 * 3 + 3
    assert (meta["seed"], meta["base_model"], meta["revision"], meta["format_version"]) == (7, f"demo:{LLAMA}", "main",
                                                                                            "1.0")
    other = load_demo(LLAMA)
    again = surgery.attach(other, tmp_path / "a")
    assert torch.allclose(logits(model), logits(other), atol=1e-6) and again.seed == 7 and again.spec == surgeon.spec
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    again.save(tmp_path / "b", self_contained=True)
    for name in (TENSORS, SPEC):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_demo(LLAMA)
    perturbed(model, "dora", dtype=dtype).save(tmp_path / "a")
    other = load_demo(LLAMA)
    again = surgery.attach(other, tmp_path / "a")
    assert again.dtype == dtype and torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("spec", ["psoft", "tinylora", "shira", "vera", EVERYTHING], ids=lambda s: s[:8].strip())
def test_attaching_computes_no_start(spec: str, tmp_path: Path, monkeypatch) -> None:
    """Some starts are singular vectors of W; all are replaced by what was saved, so that none is made."""
    if spec is not EVERYTHING:
        spec = surgery.load(spec).retarget("**.q_proj")
    model = load_demo(LLAMA)
    perturbed(model, spec if isinstance(spec, surgery.Spec) else surgery.parse(spec)).save(tmp_path / "a",
                                                                                                self_contained=True)
    other = load_demo(LLAMA)
    monkeypatch.setattr(initial_values, "_Starts", None)
    surgeon = surgery.attach(other, tmp_path / "a")
    assert torch.equal(logits(model), logits(other))
    assert not any(t.isnan().any() for t in surgeon.named_tensors().values())


def test_the_spec_is_saved_on_its_own_with_its_parameters(tmp_path: Path) -> None:
    (tmp_path / "mine.surg").write_text("update twice(rank: int = 2) {\n param A[rank, in] ~ normal()\n"
                                        " param B[out, rank] = 0\n return 2 * (B @ A)\n}\nselect ups = \"**.up_proj\"")
    (tmp_path / "s.surg").write_text('use "mine.surg"\nspec s(rank: int = 2)\ntarget linear ups { add twice(rank) }')
    model = load_demo(LLAMA)
    perturbed(model, surgery.load(tmp_path / "s.surg", rank=5)).save(tmp_path / "a")
    (tmp_path / "mine.surg").unlink()
    other = load_demo(LLAMA)
    assert surgery.attach(other, tmp_path / "a").report().rows[0].parameters == 5 * (64 + 128)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("mode", ["merged", "disabled"])
def test_saving_is_the_same_in_every_mode(mode: str, tmp_path: Path) -> None:
    surgeon = perturbed(load_demo(LLAMA), surgery.parse(EVERYTHING))
    surgeon.save(tmp_path / "a")
    if mode == "merged":
        surgeon.merge()
        surgeon.save(tmp_path / "b")
    else:
        with surgeon.disabled():
            surgeon.save(tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_without_data_is_not_saved(tmp_path: Path) -> None:
    surgeon = surgery.apply(load_demo(LLAMA), "lora")
    surgeon.model.to("meta")
    with pytest.raises(surgery.SurgeryError, match="no numbers here: on the meta device"):
        surgeon.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- what is wrong


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "error[missing-file]" in faults(tmp_path / "nowhere")
    assert "error[bad-adapter]" in faults(tmp_path)


def test_a_checkpoint_in_shards_is_told_of(tmp_path: Path) -> None:
    """As accelerate writes one with SHARDED_STATE_DICT, by torch.distributed.checkpoint."""
    torch.distributed.checkpoint.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0",
                                      no_dist=True)
    assert "resume the training from it" in faults(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert name in faults(saved)


@pytest.mark.parametrize("name, content, words", [
    (META, b"{", "not JSON"), (META, b"\xff", "not JSON"), (META, b"null", "format version"),
    (META, b'{"format_version": "3.0"}', "'3.0'"),
    (META, b'{"format_version": "1.7", "seed": "x"}', "seed, dtype, tensors"),
    (SPEC, b"\xff\xfe", "not UTF-8"), (SPEC, b"spec lora(", "error[syntax]"), (TENSORS, b"not one", TENSORS),
    (TENSORS, b"", TENSORS), (TENSORS, b"\x08\x00\x00\x00\x00\x00\x00\x00{}", TENSORS),
])
def test_a_broken_file(saved: Path, name: str, content: bytes, words: str) -> None:
    (saved / name).write_bytes(content)
    assert words in faults(saved)


def test_truncated_tensors(saved: Path) -> None:
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[: len(whole) // 2])
    assert TENSORS in faults(saved)


def test_all_that_is_wrong_is_said_at_once(saved: Path) -> None:
    (saved / META).write_text("{")
    (saved / SPEC).write_text("target linear { add }")
    (saved / TENSORS).unlink()
    said = faults(saved)
    assert all(words in said for words in ("not JSON", "error[syntax]", f"cannot read {TENSORS}"))


def rewritten(folder: Path, change, meta: bool = True) -> None:
    """Change the saved tensors, and the list of them in the other file too."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    if meta:
        about = json.loads((folder / META).read_text())
        about["tensors"] = {n: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for n, t in tensors.items()}
        (folder / META).write_text(json.dumps(about))


@pytest.mark.parametrize("meta", [True, False])
def test_tensors_that_do_not_fit(saved: Path, meta: bool) -> None:
    first, second, *_ = load_file(saved / TENSORS)

    def change(tensors: dict) -> None:
        del tensors[first]
        tensors[second] = tensors[second][:-1].contiguous()
        tensors["stray"] = torch.zeros(2)

    rewritten(saved, change, meta)
    said = faults(saved)
    assert all(name in said
               for name in (first, second, "stray")) and said.count("error[bad-adapter]") == (4 if meta else 3)
    assert "[32, 7], and" in said or "[7, 64], and" in said or "[31, 8], and" in said or "[63, 8], and" in said


def test_values_that_are_not_finite(saved: Path) -> None:
    name = next(iter(load_file(saved / TENSORS)))
    rewritten(saved, lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    assert name in faults(saved)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_what_attach_would_refuse_is_not_saved(number: float, saved: Path) -> None:
    """The Trainer's checkpoint says so alone: its training goes on."""
    surgeon = surgery.attach(load_demo(LLAMA), saved)
    name, parameter = next(iter(surgeon.named_tensors().items()))
    before = {file: (saved / file).read_bytes() for file in FILES}
    with torch.no_grad():
        parameter.view(-1)[0] = number
    with pytest.raises(surgery.SurgeryError, match=f"(?s)bad-adapter.*not saved: {name}\n.*diverged"):
        surgeon.save(saved)
    assert before == {file: (saved / file).read_bytes() for file in FILES}
    with pytest.warns(UserWarning, match=f"not finite, and attach.. will refuse it: {name}$"):
        surgeon.model.save_pretrained(saved.parent / "checkpoint")


@pytest.mark.parametrize("change", [lambda at: at - at.max() - 1, lambda at: at * 64 * 64, torch.Tensor.float],
                         ids=["below", "beyond", "no numbers of places"])
def test_places_that_do_not_exist(tmp_path: Path, change) -> None:
    model = load_demo(LLAMA)
    surgery.apply(model, surgery.load("fourierft", count=4).retarget("**.q_proj")).save(tmp_path / "a",
                                                                                                 self_contained=True)
    name = next(name for name in load_file(tmp_path / "a" / TENSORS) if name.endswith(".at"))
    rewritten(tmp_path / "a", lambda tensors: tensors.update({name: change(tensors[name])}))
    assert f"{name} must hold whole numbers from 0 to 4095" in faults(tmp_path / "a")


def test_another_dtype_than_listed(saved: Path) -> None:
    rewritten(saved, lambda t: t.update({n: v.half() for n, v in t.items()}), meta=False)
    assert "another dtype" in faults(saved)


def test_a_model_that_the_spec_does_not_fit(tmp_path: Path) -> None:
    spec = surgery.load("lora")
    perturbed(load_demo(LLAMA),
              surgery.parse('spec s\ntarget linear "**.q_proj" { add low_rank(2) }')).save(tmp_path / "a")
    assert "does not fit this GPT2LMHeadModel" in (said := faults(tmp_path / "a",
                                                                  load_demo("gpt2"))) and "no-match" in said
    perturbed(load_demo(LLAMA), spec).save(tmp_path / "b")
    assert "layers" in faults(tmp_path / "b", load_demo("mixtral"))


def test_an_operated_model_takes_no_second_adapter(saved: Path) -> None:
    model = load_demo(LLAMA)
    surgery.apply(model, "lora")
    assert "already-operated" in faults(saved, model)


# -------------------------------------------------------------------------------------------------------- atomicity


STEPS = ("write_bytes", "write_text", "mkdir", "fsync", "_exchange", "rename")


def interrupted(step: str, number: int, monkeypatch: pytest.MonkeyPatch, end) -> None:
    """Have the `number`-th call of one of the steps of writing a folder end the run."""
    owner = {"fsync": os, "_exchange": atomic_folders}.get(step, Path)
    real, calls = getattr(owner, step), []

    def failing(*args, **kwargs):
        calls.append(step)
        if len(calls) == number:
            end()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, step, failing)


def read_all(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def full_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_leaves_the_old_or_the_new(step: str, number: int, saved: Path, monkeypatch) -> None:
    surgeon = perturbed(load_demo(LLAMA), "lora", scale=0.5)
    old = read_all(saved)
    with monkeypatch.context() as patched:
        interrupted(step, number, patched, full_disk)
        try:
            surgeon.save(saved)
            failed = False
        except surgery.SurgeryError as error:
            failed = True
            assert "No space left" in str(error)
    new = read_all(saved)
    assert new.keys() == old.keys() and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    both = (old, {**old, TENSORS: new[TENSORS], MANIFEST: new[MANIFEST]})
    assert (new == old) if failed and step != "fsync" else new in both
    surgery.attach(load_demo(LLAMA), saved)


@pytest.mark.parametrize("step, number", [("write_text", 1), ("write_text", 2), ("fsync", 2), ("_exchange", 1)])
def test_a_killed_process_leaves_the_old(step: str, number: int, saved: Path, monkeypatch) -> None:
    surgeon = perturbed(load_demo(LLAMA), "lora", scale=0.5)
    old = read_all(saved)
    interrupted(step, number, monkeypatch, lambda: os._exit(9))
    child = os.fork()
    if not child:
        surgeon.save(saved)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert read_all(saved) == old


@pytest.mark.parametrize("number", [1, 2])
def test_without_an_exchange_the_old_is_put_back(number: int, saved: Path, monkeypatch) -> None:
    surgeon = perturbed(load_demo(LLAMA), "lora", scale=0.5)
    old = read_all(saved)
    monkeypatch.setattr(atomic_folders, "_exchange", lambda one, other: False)
    with monkeypatch.context() as patched:
        interrupted("rename", number, patched, full_disk)
        with pytest.raises(surgery.SurgeryError):
            surgeon.save(saved)
    assert read_all(saved) == old
    surgeon.save(saved)
    assert read_all(saved) != old and [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_only_our_files_are_replaced(saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(surgery.SurgeryError, match="thesis.tex"):
        perturbed(load_demo(LLAMA), "lora").save(saved)
    assert (saved / "thesis.tex").read_text() == "years of work"
    with pytest.raises(surgery.SurgeryError, match="is a file"):
        perturbed(load_demo(LLAMA), "lora").save(saved / META)


# ----------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_a_merged_model_is_a_plain_one(name: str, tmp_path: Path) -> None:
    import transformers

    model = load_demo(SMALLER[name])
    base = model.state_dict().keys()
    surgeon = perturbed(model, "sora")
    operated, before = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    save_merged(surgeon, tmp_path / "m")
    assert not surgeon.merged and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "m")
    assert again.state_dict().keys() == base and type(again) is type(load_demo(SMALLER[name]))
    surgeon.merge()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again), operated, rtol=1e-4, atol=1e-5)


def test_an_untied_weight_stays_untied_in_a_merged_model(tmp_path: Path) -> None:
    import transformers

    model = load_demo("gpt2")
    surgeon = perturbed(model, surgery.parse('spec s\ntarget embedding "**.wte" untie { add low_rank(2) }'))
    operated = logits(model)
    save_merged(surgeon, tmp_path / "m")
    assert model.config.tie_word_embeddings
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(again), operated, rtol=1e-4, atol=1e-5)


def test_only_a_model_of_transformers_is_saved_merged(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    surgeon = surgery.apply(model, surgery.parse("spec s\ntarget linear { add low_rank(2) }"))
    with pytest.raises(surgery.SurgeryError, match="not a model of transformers"):
        save_merged(surgeon, tmp_path / "m")
