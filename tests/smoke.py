"""What a user does first, with the installed package alone: `python smoke.py` in an empty folder, outside of a checkout.

Stops at the first thing that is not as it should be. The values are compared with DoRA's formula, written here in torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import surgery

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def command(*words: str, says: str) -> None:
    """A command of the command line succeeds, and says what it should."""
    result = subprocess.run([sys.executable, "-m", "surgery", *words], capture_output=True, text=True)
    assert result.returncode == 0 and says in result.stdout, (words, result.stdout, result.stderr)


def dora(name: str, base: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """DoRA's W' of one layer: diag(m / |V|_row) V, where V = W + (alpha / rank) B A."""
    A, B, m = (tensors[f"{name}.weight_surgery.{part}"].detach().double()
               for part in ("add_low_rank.A", "add_low_rank.B", "post_magnitude.m"))
    moved = base.double() + 32 / 4 * B @ A
    return m[:, None] * moved / moved.norm(dim=1, keepdim=True)


def main() -> None:
    assert "site-packages" in surgery.__file__, surgery.__file__
    command("specs", says="sora_reference")
    command("show", "dora", says="row_norm")
    command("show", "dora", "--emit", "json", says='"targets"')
    command("check", "dora", says="")
    command("plan", "dora", "demo:llama", "--set", "rank=4", says="28 weights")
    command("apply", "lora", "demo:llama", "-o", "of-command", says="")

    model = surgery.load_model("demo:llama")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = model(PROMPT).logits
    surgeon = surgery.apply(model, surgery.load("dora", rank=4, dropout=0))
    torch.testing.assert_close(model(PROMPT).logits, before)

    for learning_rate in (0.02, 0.02):  # B starts at 0: A has a gradient from the second step on
        optimiser = torch.optim.AdamW(surgeon.parameter_groups(lr=learning_rate))
        model(PROMPT, labels=PROMPT).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = model(PROMPT).logits
    assert not torch.allclose(trained, before, atol=1e-3)

    tensors = dict(model.named_parameters())
    names = [name.removesuffix(".weight_surgery.add_low_rank.A") for name in tensors if name.endswith("add_low_rank.A")]
    assert len(names) == 28
    wanted = {f"{name}.weight": dora(name, base[f"{name}.weight"], tensors) for name in names}

    surgeon.save("adapter")
    again = surgery.load_model("demo:llama")
    attached = surgery.attach(again, "adapter")
    torch.testing.assert_close(again(PROMPT).logits, trained)
    with attached.serving():
        generated = again.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    attached.merge()
    merged = dict(again.state_dict())
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again(PROMPT).logits, trained, rtol=1e-4, atol=1e-4)
    attached.merge_and_remove()
    plain = again.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(plain, generated) and plain.shape == (1, 9)

    command("merge", "adapter", "demo:llama", "-o", "merged", says="")
    assert any(Path("merged").glob("*.safetensors"))
    files = surgery.load_model("merged")
    torch.testing.assert_close(files(PROMPT).logits, trained, rtol=1e-4, atol=1e-4)
    print("smoke: all as it should be")


if __name__ == "__main__":
    main()
