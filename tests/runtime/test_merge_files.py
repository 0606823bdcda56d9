"""Merging into a model's files: bit for bit what merging in memory gives, shard by shard, whenever it was killed."""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import SMALLER, perturbed
from safetensors.torch import load_file

import surgery
from surgery.diagnostics import SurgeryError, SurgeryWarning
from surgery.language.library import parse
from surgery.models.checkpoint_files import opened_file, weight_files
from surgery.models.demo import load_demo
from surgery.models.loading import load_with_saved_head
from surgery.runtime import atomic_folders, merge_work, merge_writer, remade
from surgery.runtime.merge_files import _Merge, merge_files
from surgery.runtime.save import MODEL
from surgery.runtime.saved_format import Saved

pytestmark = pytest.mark.usefixtures("folder")

LLAMA = SMALLER["llama"]
LOW = "{ add low_rank(rank = 2) }"


def saved_model(model: torch.nn.Module, folder: str = "base", shards: bool = False, **options: object) -> None:
    """A model's folder, with files beside the weights that no transformers writes."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3 if shards else size * 2, **options)
    (Path(folder) / "modeling_own.py").write_text("code = 1\n")
    (Path(folder) / "more").mkdir()
    (Path(folder) / "more/LICENSE").write_bytes(b"\x00\xff")
    (Path(folder) / "pytorch_model.bin").write_bytes(b"the weights as they were")


def saved_adapter(spec: object, folder: str = "adapter", base: str = "base") -> None:
    surgeon = perturbed(surgery.load_model(base), spec)
    surgeon.save(folder, base_model=base)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(Path(folder)) for name, tensor in load_file(file).items()}


def reference(*adapters: str) -> dict[str, torch.Tensor]:
    """What the way through a model in memory gives."""
    folders = [Path(each) for each in adapters]
    _Merge(folders, [*map(Saved, folders)], "base", Path("whole")).in_memory("asked")
    return tensors("whole")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


def qwen_moe() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, architectures=["Qwen2MoeForCausalLM"])).eval()


FAMILIES = {
    "llama": ("dora", None), "gpt2": ("sora", None), "bert": ("lora", None), "vit": ("oft", None),
    "mixtral": ("lora", None), "qwen2-moe": ("dora", None), "t5": ("vera", None), "resnet": ("lora", "conv"),
}


@pytest.mark.parametrize("family, shards", [*((family, True) for family in FAMILIES), ("llama", False), ("qwen2-moe", False)])
def test_it_is_what_merging_in_memory_gives(family: str, shards: bool) -> None:
    """Each family names, joins or transposes its tensors in another way."""
    model = qwen_moe() if family == "qwen2-moe" else load_demo(SMALLER[family])
    spec, kind = FAMILIES[family]
    spec = surgery.load(spec)
    if kind:
        spec = spec.model_copy(update={"targets": tuple(t.model_copy(update={"kind": kind}) for t in spec.targets)})
    saved_model(model.to(torch.bfloat16) if family in ("llama", "qwen2-moe", "t5") else model, shards=shards)
    saved_adapter(spec)
    done = merge_files("adapter", "merged", jobs=2 if shards else 1)
    assert done.in_memory == "" and len(weight_files(Path("merged"))) > 2 * shards
    assert_same(tensors("merged"), reference("adapter"))
    assert any(not torch.equal(new, old) for new, old in zip(tensors("merged").values(), tensors("base").values()))


def test_each_file_but_the_weights_is_copied_and_the_layout_is_kept() -> None:
    saved_model(load_demo(LLAMA), shards=True)
    saved_adapter("lora")
    done = merge_files("adapter", "merged")
    names = {str(p.relative_to("base")) for p in Path("base").rglob("*") if p.is_file()}
    assert done.left_out == ("pytorch_model.bin",)
    found = {str(p.relative_to("merged")) for p in Path("merged").rglob("*") if p.is_file()}
    assert found == names - {"pytorch_model.bin"} | {"surgery-manifest.json"}
    for name in sorted(found & names):
        if name.endswith(".safetensors"):
            assert opened_file(Path("merged", name)).tensors == opened_file(Path("base", name)).tensors
        else:
            assert Path("merged", name).read_bytes() == Path("base", name).read_bytes()
    untouched = [n for n in tensors("base") if "norm" in n or "embed" in n or "lm_head" in n]
    assert_same({n: tensors("merged")[n] for n in untouched}, {n: tensors("base")[n] for n in untouched})
    assert MODEL.foreign(Path("merged")) == []


SPECTRAL = """update spectral() {
  frozen param U[out, min(out, in)] = left_singular(W, min(out, in))
  frozen param V[min(out, in), in] = right_singular(W, min(out, in))
  param m[min(out, in)] = 0
  return U @ diag(m) @ V
}
"""
SHARED = """update tied(rank: int = 2) {
  shared(model) param A[rank, in] ~ kaiming_uniform(a = sqrt(5))
  shared(layer) param B[out, rank] = 0
  shared(model) param g = 1
  return g * (B @ A)
}
"""
SPECS = {
    "biases": ("bert", "target linear { add shift() }"),
    "an embedding": ("llama", f"target embedding {LOW}"),
    "what was trained": ("llama", f'target linear "**.q_proj" {LOW}\ntrain "**.*norm*.weight", "lm_head.**"'),
    "a tied tensor that was trained": ("gpt2", f'target linear "**.c_fc" {LOW}\ntrain "**.wte.weight"'),
    "a bias that was trained, and then turned": (
        "bert", 'target linear "**.query" { pre diagonal() with bias }\ntrain "**.query.bias"'),
    "a bias that was trained, and then moved": ("bert", 'target linear "**.query" { add shift() }\ntrain "**.query.bias"'),
    "a tensor of which the first user is not the largest": (
        "llama", f'{SHARED} target linear "**.{{q,k,v,up,down}}_proj" {{ add tied(rank = 2) }}'),
    "a router": ("mixtral", f'target linear "**.mlp.gate", "**.q_proj" {LOW}'),
    "one that experts share": ("mixtral", f'{SHARED} target any "**.experts.*", "**.q_proj" {{ add tied(rank = 2) }}'),
}


@pytest.mark.parametrize("what", SPECS)
def test_everything_that_a_merge_writes(what: str) -> None:
    family, text = SPECS[what]
    saved_model(load_demo(SMALLER[family]), shards=True)
    saved_adapter(parse(text))
    assert merge_files("adapter", "merged").in_memory == ""
    assert_same(tensors("merged"), reference("adapter"))


TRAINED = f'target linear "**.q_proj" {LOW}\ntrain "**.up_proj.weight"'


@pytest.mark.parametrize(("first", "second"), [
    ("oft", "lora"), (parse(TRAINED), parse('target linear "**.up_proj" { pre diagonal() }'))],
    ids=["of the same weights", "of what the first trained"])
def test_one_adapter_after_another(first: object, second: object) -> None:
    saved_model(load_demo(LLAMA), shards=True)
    saved_adapter(first)
    saved_adapter(second, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error", surgery.SurgeryWarning)  # of another base: what the first trained is not one
        done = merge_files("adapter", "merged", then=["second"])
    assert done.in_memory == ""
    assert_same(tensors("merged"), reference("adapter", "second"))


# --------------------------------------------------------------------------------------------- what it cannot do so


def pickled() -> None:
    model = load_demo(LLAMA)
    torch.save(model.state_dict(), "base/pytorch_model.bin")
    Path("base/model.safetensors").unlink()


def narrowed() -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def doubled() -> None:
    """Two shards with the same tensors, as a folder has that a smaller number of shards was written over."""
    shutil.copyfile("base/model.safetensors", "base/model-00001-of-00002.safetensors")
    Path("base/model.safetensors").rename("base/model-00002-of-00002.safetensors")
    names = [*load_file("base/model-00001-of-00002.safetensors")]
    shards = [f"model-0000{1 + i % 2}-of-00002.safetensors" for i in range(len(names))]
    Path("base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(names, shards))}))


@pytest.mark.parametrize("change, why", [
    (doubled, "two of its files hold a tensor of the same name"),
    (pickled, "the base model has no safetensors files"),
    (narrowed, "is stored as F32, and loaded as BF16")])
def test_it_says_why_the_model_is_loaded(change: object, why: str) -> None:
    saved_model(load_demo(LLAMA))
    change()
    saved_adapter("lora")
    done = merge_files("adapter", "merged")
    assert why in done.in_memory
    assert_same(tensors("merged"), reference("adapter"))


def test_a_model_whose_configuration_says_no_dtype_has_that_of_its_files() -> None:
    """The skeleton that the adapter's class is told from wrote float32 into the configuration: the base was then loaded
    in that, and merged, evaluated and continued so."""
    saved_model(load_demo(LLAMA).to(torch.bfloat16))
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({n: v for n, v in config.items() if n != "dtype"}))
    saved_adapter("pissa")
    assert load_with_saved_head("base", Saved(Path("adapter"))).dtype == torch.bfloat16
    assert surgery.from_pretrained("adapter").model.dtype == torch.bfloat16
    assert merge_files("adapter", "merged").in_memory == ""
    assert {t.dtype for t in tensors("merged").values()} == {torch.bfloat16}
    assert_same(tensors("merged"), reference("adapter"))
    surgery.apply(surgery.load_model("base"), "pissa").save("whole-adapter", base_model="base")
    surgery.apply_files("base", "pissa", "adapter-of-files")
    assert Path("adapter-of-files/adapter.safetensors").read_bytes() == \
        Path("whole-adapter/adapter.safetensors").read_bytes()


def test_the_classes_of_a_head_are_written_into_the_configuration() -> None:
    """A head of the same size in the base model, whose classes have no names: an evaluation would guess their order."""
    torch.manual_seed(0)
    saved_model(transformers.BertForSequenceClassification(load_demo(SMALLER["bert"]).config))
    surgeon = perturbed(surgery.load_model("base"), parse(f'target linear "**.query" {LOW}\ntrain "classifier.**"'))
    surgeon.save("adapter", base_model="base", task={"kind": "classification", "classes": ["no", "yes"]})
    done = merge_files("adapter", "merged")
    assert "classes" in done.in_memory
    assert json.loads(Path("merged/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    assert_same(tensors("merged"), reference("adapter"))


def test_a_tensor_of_its_own_for_what_was_tied() -> None:
    saved_model(load_demo(SMALLER["gpt2"]))
    saved_adapter(parse(f'target embedding "**.wte" untie {LOW}'))
    done = merge_files("adapter", "merged")
    assert "`untie`" in done.in_memory
    assert_same(tensors("merged"), reference("adapter"))


def test_the_way_back_is_tried_on_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that does not give back what it took would write other numbers than were loaded."""
    saved_model(load_demo(SMALLER["mixtral"]))
    saved_adapter("lora")
    monkeypatch.setattr(merge_work, "reverses", lambda *given: False)
    done = merge_files("adapter", "merged")
    assert "is another one when it is loaded and saved" in done.in_memory
    assert_same(tensors("merged"), reference("adapter"))
    assert not [*Path().glob(".surgery-*")]


# ------------------------------------------------------------------------------------------------------ interruptions


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the system anywhere: what is there is kept, and nothing half is shown."""
    saved_model(load_demo(LLAMA), shards=True)
    saved_adapter("dora")
    wanted, write = reference("adapter"), merge_writer._write_at
    for stop in (3, 9, 4, 1):
        seen = []

        def failing(path: Path, begin: int, held: object) -> None:
            seen.append(begin)
            if len(seen) > stop:
                raise OSError(28, "No space left on device")
            write(path, begin, held)

        monkeypatch.setattr(merge_writer, "_write_at", failing)
        with pytest.raises(SurgeryError, match="No space left") as error:
            merge_files("adapter", "merged")
        assert not Path("merged").exists()
        (left,) = Path().glob(".surgery-*")
        assert str(left) in error.value.diagnostics[0].helps[0]
    monkeypatch.setattr(merge_writer, "_write_at", write)
    done = merge_files("adapter", "merged")
    assert done.kept > 0 and len(done.errors) == 14
    assert_same(tensors("merged"), wanted)
    assert not [*Path().glob(".surgery-*")]


def test_what_a_run_before_has_left_is_told_and_compared_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(load_demo("llama"))
    saved_adapter("lora")
    other = load_demo("llama")
    for parameter in other.parameters():
        parameter.data *= 1.5
    other.save_pretrained("base")
    with monkeypatch.context() as patch, pytest.raises(SurgeryError, match="it stops"):
        patch.setattr(merge_writer.Writer, "_check", stopped)
        merge_files("adapter", "merged")
    with pytest.warns(SurgeryWarning, match="has left of `merged`"):
        merge_files("adapter", "elsewhere")
    with pytest.warns(SurgeryWarning, match="another-base"):
        assert merge_files("adapter", "merged").kept == 28
    assert_same(tensors("merged"), tensors("elsewhere"))


@pytest.mark.parametrize("stop", ["a file is read back", "the folder takes its place"])
def test_rounding_that_a_run_before_has_met_is_told(monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """Of what is made of W for a unit alone, and of what an adapter after another makes."""
    saved_model(load_demo(LLAMA), shards=True)
    saved_adapter("lora")
    saved_adapter(parse(f"{SPECTRAL} target \"**.q_proj\" {{ add spectral() }}"), "second")
    made = remade.again
    monkeypatch.setattr(remade, "again", lambda *of: {k: t.detach() * (1 + 1e-7) for k, t in made(*of).items()})
    with monkeypatch.context() as patch, pytest.raises(SurgeryError, match="it stops"):
        if stop == "a file is read back":
            patch.setattr(merge_writer.Writer, "_check", stopped)
        else:
            patch.setattr(atomic_folders, "_put", stopped)
        merge_files("adapter", "merged", then=["second"])
    with pytest.warns(SurgeryWarning, match="4 frozen tensors of the adapter in second.*differ by rounding"):
        assert merge_files("adapter", "merged", then=["second"]).kept > 7


def test_another_adapter_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(load_demo(LLAMA))
    saved_adapter("lora")
    with monkeypatch.context() as patch, pytest.raises(SurgeryError, match="it stops"):
        patch.setattr(merge_writer.Writer, "_check", stopped)
        merge_files("adapter", "merged")
    saved_adapter("oft")
    assert merge_files("adapter", "merged").kept == 0
    assert_same(tensors("merged"), reference("adapter"))


def stopped(*given: object) -> None:
    raise OSError("it stops")


def test_what_reads_back_otherwise_is_not_called_done(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A disk that loses what it was given: a computed tensor, or a run that was copied."""
    saved_model(load_demo("llama"))
    saved_adapter("lora")
    for lost in (2, 30):
        seen, write = [], merge_writer._write_at

        def losing(path: Path, begin: int, held: object) -> None:
            seen.append(begin)
            write(path, begin, (memoryview(bytes(len(each))) for each in held) if len(seen) == lost else held)

        with monkeypatch.context() as patch, pytest.raises(SurgeryError, match="reads back otherwise"):
            patch.setattr(merge_writer, "_write_at", losing)
            merge_files("adapter", "merged")
        assert not Path("merged").exists()
        for left in Path().glob(".surgery-*"):
            shutil.rmtree(left)


@pytest.mark.parametrize("changed", ["base/model.safetensors", "adapter/adapter.safetensors"])
def test_what_changes_while_it_is_merged_is_refused(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it would be of the one, and half of the other."""
    saved_model(load_demo(LLAMA))
    saved_adapter("lora")
    run = merge_writer.Writer.run

    def late(writer: object, jobs: int) -> None:
        run(writer, jobs)
        held = bytearray(Path(changed).read_bytes())
        held[-1] ^= 1
        Path(changed).write_bytes(held)

    monkeypatch.setattr(merge_writer.Writer, "run", late)
    with pytest.raises(SurgeryError, match="were changed while they were merged"):
        merge_files("adapter", "merged")
    assert not Path("merged").exists() and not [*Path().glob(".surgery-*")]


def killed_at(stop: int) -> int:
    """How a process ends that is killed in the middle of its so manieth tensor."""
    number = os.fork()
    if number:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    write, seen = merge_writer._write_at, []

    def killed(path: Path, begin: int, held: object) -> None:
        seen.append(begin)
        if len(seen) == stop:
            write(path, begin, [memoryview(bytes(64))])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, begin, held)

    try:
        merge_writer._write_at = killed
        merge_files("adapter", "merged", jobs=2)
    finally:
        os._exit(1)


@pytest.mark.skipif(os.name != "posix", reason="kills a process as a POSIX system does")
def test_killed_and_run_again() -> None:
    """Half a tensor is written when the process is killed, at several places one after the other."""
    saved_model(load_demo(LLAMA), shards=True)
    saved_adapter("lora")
    for stop in (8, 12):
        assert killed_at(stop) == -signal.SIGKILL and not Path("merged").exists()
    assert merge_files("adapter", "merged").kept > 0
    assert not [*Path().glob(".surgery-*")]
    assert_same(tensors("merged"), reference("adapter"))
