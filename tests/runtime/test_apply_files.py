"""Applying to a model's files: the folder that `apply` and `save` write of the model in memory, and no model in memory."""

import json
from pathlib import Path
from weakref import ref

import pytest
import torch
import transformers
from click.testing import CliRunner
from models import SMALLER
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.models.demo import load_demo
from surgery.runtime import apply_files as applying
from surgery.runtime import stored_weights
from surgery.runtime.atomic_folders import MANIFEST
from surgery.runtime.saved_format import FILES, TENSORS

pytestmark = pytest.mark.usefixtures("folder")

LOW = "{ add low_rank(rank = 2) }"
SHARED = """update tied(rank: int = 2) {
  shared(model) param A[rank, in] ~ kaiming_uniform(a = sqrt(5))
  shared(layer) param B[out, rank] = 0
  frozen shared(model) param F[rank, rank] ~ normal(0, 1)
  shared(model) param g = 1
  return g * (B @ F @ A)
}
"""


def gemma() -> torch.nn.Module:
    """Its head is tied to its embedding, and the files hold it once."""
    torch.manual_seed(0)
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, architectures=["GemmaForCausalLM"]))


# (model, dtype of the files, dtype that is asked for, spec)
CASES = {
    "lora": ("llama", "bfloat16", None, "lora"), "dora": ("llama", "bfloat16", None, "dora"),
    "pissa": ("llama", "float32", None, "pissa"), "milora": ("llama", "bfloat16", "float32", "milora"),
    "svft": ("llama", "float32", "bfloat16", "svft"), "vera": ("llama", "float32", None, "vera"),
    "sora, transposed": ("gpt2", "float32", None, "sora"), "experts": ("mixtral", "bfloat16", None, "dora"),
    "experts, joined": ("qwen2-moe", "float32", None, surgery.load("pissa", rank=2).retarget("**.experts.*")),
    "vit": ("vit", "float32", None, "fourierft"),
    "biases": ("bert", "float32", None, parse("target linear { add shift() }")),
    "convolutions": ("resnet", "float32", None, parse(f"target conv {LOW}")),
    "norms": ("llama", "float32", None, parse('target norm { post diagonal() }')),
    "shared": ("llama", "float32", None, parse(f"{SHARED} target linear {{ add tied(rank = 2) }}")),
    "trained, tied": ("gemma", "bfloat16", None, parse(
        f'target linear "**.k_proj" {LOW}\ntrain "**.embed_tokens.weight", "**.q_proj.weight"')),
    "untied": ("gemma", "bfloat16", None, parse(f'target embedding untie {LOW}')),
    "shifted": ("llama", "float32", None, parse('update more() { param B[out, in] ~ normal(0, 1)  return B }\n'
                                                'target linear "**.q_proj" shifted { add more() }')),
    # T5 keeps its `wo` in float32 where it is loaded in float16, and not where in bfloat16
    **{f"kept wide, {asked}": ("t5", "bfloat16", asked, surgery.load("lora").retarget("encoder.**.wo", "encoder.**.wi"))
       for asked in (None, "float16")},
    "a number": ("llama", "float32", None, parse(
        "update sized(rank: int) {\n  frozen param c = norm(W) / 1000\n  param B[out, rank] = 0\n"
        "  param A[rank, in] ~ normal(std = 0.02)\n  return c * (B @ A)\n}\n"
        'target linear "**.q_proj" { add sized(2) }')),
}


def base(family: str, dtype: str, shards: bool = True) -> None:
    from test_merge_files import qwen_moe

    own = {"qwen2-moe": qwen_moe, "gemma": gemma}
    model = (own[family]() if family in own else load_demo(SMALLER[family])).to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained("base", max_shard_size=size // 3 if shards else size * 2)


@pytest.mark.parametrize("case", CASES)
def test_it_writes_what_apply_writes_of_the_model_in_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, stored, asked, spec = CASES[case]
    base(family, stored)
    surgery.apply(surgery.load_model("base", asked), spec, seed=3, check=False).save("memory", base_model="base")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # which would load it
        done = surgery.apply_files("base", spec, "files", seed=3, dtype=asked)
    for name in FILES:
        assert Path("files", name).read_bytes() == Path("memory", name).read_bytes(), name
    surgery.attach(surgery.load_model("base", asked), "files")
    assert done.computed + done.proven == (0 if case == "shifted" else len(done.plan.placed))
    assert sorted(p.name for p in Path("files").iterdir()) == sorted([*FILES, MANIFEST])


def test_a_parameter_may_have_a_dtype_of_its_own() -> None:
    base("llama", "bfloat16")
    for asked, wanted in ((None, torch.bfloat16), ("float16", torch.float16)):
        model = stored_weights.skeleton_of_files("base")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.float())  # as a class of it would make it
        weights = stored_weights.StoredWeights(model, Path("base"), asked)
        assert weights.parameter("lm_head.weight").dtype == torch.float32
        assert weights.parameter("model.layers.0.self_attn.q_proj.weight").dtype == wanted


def test_frozen_tensors_too() -> None:
    base("llama", "float32")
    surgery.apply(surgery.load_model("base"), "pissa", check=False).save("memory", base_model="base", self_contained=True)
    surgery.apply_files("base", "pissa", "files", self_contained=True)
    assert Path("files", TENSORS).read_bytes() == Path("memory", TENSORS).read_bytes()
    assert any(name.endswith("A0") for name in load_file(f"files/{TENSORS}"))


def without_plain_weights() -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))


def without_a_tensor() -> None:
    tensors = load_file("base/model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


def with_nan() -> None:
    tensors = load_file("base/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


MOVED = 'update more() { param B[out, in] ~ normal(0, 1)  return B }\ntarget linear "**.q_proj" { add more() }'
MEASURED = 'update more() { param B[out, in] = G  return B - B }\ntarget linear "**.q_proj" { add more() }'


@pytest.mark.parametrize(("change", "spec", "code", "words"), [
    (without_plain_weights, "lora", "unknown-model", "the base model is quantised"),
    (without_a_tensor, "lora", "unknown-model", "the files hold no model.layers.0.mlp.up_proj.weight"),
    (with_nan, "lora", "not-identity", "model.layers.0.mlp.up_proj"), (lambda: None, MOVED, "not-identity", "q_proj"),
    (lambda: None, MEASURED, "needs-data", "`G`")], ids=["quantised", "not whole", "NaN", "moved", "needs data"])
def test_what_cannot_be_done_leaves_nothing(change: object, spec: str, code: str, words: str) -> None:
    base("llama", "float32", shards=False)
    change()
    with pytest.raises(SurgeryError) as raised:
        surgery.apply_files("base", spec if spec == "lora" else parse(spec), "files")
    (found,) = raised.value.diagnostics
    assert found.code == code and words in found.message
    assert [p.name for p in Path().iterdir()] == ["base"]


def test_the_command_loads_no_model_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and says so, and what was not tried; a model that cannot be read so is loaded as ever."""
    base("llama", "float32", shards=False)
    run = CliRunner().invoke
    assert "start     the logits are unchanged" in run(main, ["apply", "lora", "base", "-o", "memory"]).stdout
    asked = run(main, ["apply", "lora", "base", "-o", "asked", "--no-load"])
    assert "that each adapter acts, and acts as it does merged, was not tried" in asked.stdout
    monkeypatch.setattr(applying, "_free_memory", lambda: 1000)
    alone = run(main, ["apply", "lora", "base", "-o", "alone"])
    assert "base is not loaded: its weights take 0.0 GB, and 0.0 GB of memory are free" in alone.stderr
    assert alone.stdout == asked.stdout.replace("asked", "alone")
    for name in ("asked", "alone"):
        assert Path(name, TENSORS).read_bytes() == Path("memory", TENSORS).read_bytes()
    assert "start     the logits are unchanged" in run(main, ["apply", "lora", "demo:llama", "-o", "demo"]).stdout
    assert run(main, ["apply", "lora", "base", "-o", "merged", "--no-load", "--merge"]).exit_code == 2


def test_one_weight_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter is read once, in the order of the model, and let go before the next one is read."""
    base("llama", "float32")
    read, alive = stored_weights.StoredWeights.parameter, []

    def counted(self: object, name: str) -> torch.Tensor:
        assert not any(held() is not None for held in alive)
        tensor = read(self, name)
        alive.append(ref(tensor))
        return tensor

    monkeypatch.setattr(stored_weights.StoredWeights, "parameter", counted)
    done = surgery.apply_files("base", "dora", "files")
    assert len(alive) == len(done.plan.placed)
