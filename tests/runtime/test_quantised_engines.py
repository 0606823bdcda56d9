"""Bases that the packages themselves quantise, on the CPU: applied to, and merged dequantised, they give what was
trained; `plan` and `apply` say the same of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import perturbed
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

import surgery
from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.models.demo import demo_inputs, load_demo
from surgery.planning.initial_values import departure

SMALL = "llama:num_hidden_layers=2,hidden_size=64,intermediate_size=128"
# what the package rounds beside W: activations to 8 bits, or what leaves a layer to bfloat16
ROUNDS = {"bitsandbytes int8": 2e-2, "gptq": 5e-3, "awq": 5e-3}


def compressed(bits: int, kind: str, form: str, **more: Any) -> None:
    """A model's folder as compressed-tensors packs it, symmetric, with scales by the largest numbers."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = load_demo(SMALL)
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=True, **more)
    apply_quantization_config(model, QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=args)}, ignore=["lm_head"], format=form))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.reshape(len(module.weight), -1, more.get("group_size") or module.weight.shape[1])
            most = 448.0 if kind == "float" else 2 ** (bits - 1) - 0.5
            module.weight_scale.data.copy_(groups.abs().amax(-1) / most)
    packer = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    packer.compress_model(model)
    model.save_pretrained("base")
    packer.update_config("base")


def whole(quantisation: object) -> Any:
    load_demo(SMALL).save_pretrained("base")
    return LlamaForCausalLM.from_pretrained("base", quantization_config=quantisation).eval()


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return whole(TorchAoConfig(Int8WeightOnlyConfig()))


def gptq() -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return in_groups(TorchLinear, {"quant_method": "gptq", "desc_act": False, "sym": True,
                                   "checkpoint_format": "gptq_v2", "backend": "torch"})


def awq() -> Any:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return in_groups(AwqTorchLinear, {"quant_method": "awq", "zero_point": True, "version": "gemm",
                                      "backend": "torch_awq"})


def in_groups(layer_class: type, config: dict[str, Any]) -> Any:
    """As gptqmodel packs 4 bits in groups of 32, each with a scale by its largest number, and transformers loads it."""
    model = load_demo(SMALL).half()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            out, in_ = layer.weight.shape
            scales = layer.weight.data.float().reshape(out, -1, 32).abs().amax(-1) / 7
            packed = layer_class(bits=4, group_size=32, sym=True, desc_act=False, in_features=in_, out_features=out,
                                 bias=False, pack_dtype=torch.int32)
            packed.pack(layer.float(), scales, torch.full_like(scales, 8), (torch.arange(in_) // 32).int())
            del state[f"{name}.weight"]
            state |= {f"{name}.{own}": tensor.contiguous() for own, tensor in packed.state_dict().items()}
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], "float16"
    model.config.quantization_config = {"bits": 4, "group_size": 32, **config}
    model.config.save_pretrained("base")
    save_file(state, "base/model.safetensors", {"format": "pt"})
    return surgery.load_model("base")


def of_files(*form: Any, **more: Any) -> Any:
    compressed(*form, **more)
    return surgery.load_model("base")


QUANTISED = {
    "bitsandbytes nf4": ("bitsandbytes", lambda: whole(BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32))),
    "bitsandbytes int8": ("bitsandbytes", lambda: whole(BitsAndBytesConfig(load_in_8bit=True))),
    "torchao int8": ("torchao", torchao),
    "gptq": ("gptqmodel", gptq),
    "awq": ("gptqmodel", awq),
    "compressed-tensors int4": ("compressed_tensors", lambda: of_files(
        4, "int", "pack-quantized", strategy="group", group_size=32)),
    "compressed-tensors int8": ("compressed_tensors", lambda: of_files(8, "int", "int-quantized", strategy="channel")),
    "compressed-tensors fp8": ("compressed_tensors", lambda: of_files(8, "float", "float-quantized", strategy="channel")),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # gptqmodel would compile how it unpacks, for minutes
        yield tmp_path


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**demo_inputs(SMALL)).logits.float()


def gradients(surgeon: surgery.Surgeon) -> list[torch.Tensor]:
    for parameter in surgeon.parameters():
        parameter.grad = None
    torch.manual_seed(0)  # dropout
    surgeon.model.train()(**demo_inputs(SMALL)).logits.float().square().mean().backward()
    return [p.grad.clone() for p in surgeon.parameters() if p.grad is not None]


@pytest.mark.engines
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_operated_on_and_merged_as_it_was_trained(name: str) -> None:
    package, build = QUANTISED[name]
    pytest.importorskip(package, reason=f"{package} is of the extra `engines`")
    model = build()
    assert all(len({*(type(m) for n, m in model.named_modules() if n.endswith(kind))}) == 1 for kind in ("q_proj", "up_proj"))
    surgeon = perturbed(model, "dora", check=True)
    assert surgeon.proof.start is not None and surgeon.proof.start <= surgeon.proof.allowed
    with surgeon.disabled():
        before = logits(model)
    optimiser = torch.optim.SGD(surgeon.parameters(), lr=1.0)
    slopes = gradients(surgeon)
    assert len(slopes) == len([*surgeon.parameters()]) and all(g.isfinite().all() and g.any() for g in slopes)
    logits(model.eval())  # bitsandbytes repacks a layer that is evaluated, on some processors, and gives no gradient more
    assert all(departure(g, again) < ROUNDS.get(name, 1e-5) for g, again in zip(slopes, gradients(surgeon), strict=True))
    stood = [p.detach().clone() for p in surgeon.parameters()]
    optimiser.step()
    assert not any(map(torch.equal, stood, surgeon.parameters()))
    wanted = logits(model.eval())
    assert departure(before, wanted) > 0.1
    with pytest.raises(SurgeryError, match="W' cannot be written into"):
        surgeon.merge()
    surgeon.save("adapter", base_model="base")
    assert json.loads(Path("adapter/meta.json").read_text())["quantization"] is not None
    done = surgery.merge_files("adapter", "merged", dequantise=True)
    merged = LlamaForCausalLM.from_pretrained("merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    assert departure(wanted, logits(merged)) < ROUNDS.get(name, 1e-5)
    assert done.logits is not None and done.logits < ROUNDS.get(name, 1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("name", ["compressed-tensors int8", "awq"])
def test_plan_and_apply_say_the_same(name: str) -> None:
    package, build = QUANTISED[name]
    pytest.importorskip(package, reason=f"{package} is of the extra `engines`")
    build()
    run = CliRunner(env={"NO_COLOR": "1"}).invoke
    assert "14 weights" in run(main, ["plan", "lora", "base"]).stdout
    found = run(main, ["apply", "lora", "base", "-o", "adapter"])
    assert "14 weights" in found.stdout and "14 of 14 adapters act" in found.stdout
    assert "is quantised" in str(run(main, ["apply", "lora", "base", "-o", "none", "--no-load"]).stderr)
    assert "cannot be written into" in str(run(main, ["merge", "adapter", "-o", "merged"]).stderr)
    if name == "awq":
        return
    packed = LlamaForCausalLM.from_pretrained("base")
    with pytest.raises(SurgeryError, match="first forward pass: run one before"):
        surgery.apply(packed, "lora")
    logits(packed)
    assert surgery.apply(packed, "lora").proof.start is not None
