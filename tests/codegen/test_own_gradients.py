"""Each parameter's gradient has memory of its own: torch adds the next pass to what it keeps, and clips it, in place."""

from __future__ import annotations

import pytest
import torch
from layers import assert_close
from torch import nn

import surgery

# The gradient of a sum goes to its terms as it is, and through views as a view of it.
SUMS = {
    "alike": "param A[out, in] = 0\n param B[out, in] = 0\n return A + B",
    "turned": "param A[in, out] = 0\n param B[in, out] = 0\n return A.T + B.T",
    "one turned": "param A[out, in] = 0\n param B[in, out] = 0\n return A + B.T",
    "reshaped": "param A[out * in] = 0\n param B[out * in] = 0\n return reshape(A, out, in) + reshape(B, out, in)",
    "one reshaped": "param A[out, in] = 0\n param B[out * in] = 0\n return A + reshape(B, out, in)",
    "with a number": "param A[out, in] = 0\n param B[in, out] = 0\n return A + 2 * B.T",
    "factors": "param A[3, in] = 0\n param C[3, in] = 0\n param B[out, 3] ~ normal(std = 1)\n return B @ (A + C)",
    "factors, turned": "param A[in, 3] = 0\n param C[3, in] = 0\n param B[out, 3] ~ normal(std = 1)\n return B @ (A.T + C)",
    "products": "param A[in, 3] = 0\n param C[3, in] = 0\n param B[out, 3] ~ normal(std = 1)\n return B @ A.T + B @ C",
    "stacked": "param A[2, in] = 0\n param C[4, in] = 0\n param D[6, in] = 0\n param B[out, 6] ~ normal(std = 1)\n"
               "return B @ (stacked(A, C) + D)",
}


SUMS["frozen, unfrozen by hand"] = "frozen param A[out, in] = 0\n param B[in, out] = 0\n return A + B.T"


def trained(kind: str, body: str, is_unfrozen: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8) if kind == "linear" else nn.Embedding(9, 6))
    surgeon = surgery.apply(model, surgery.parse(f"spec t()\nupdate u() {{\n{body}\n}}\ntarget {kind} {{ add u() }}\n"))
    for tensor in surgeon.adapters["0"].parameters():
        tensor.requires_grad_(True)
    model.get_parameter("0.weight").requires_grad_(is_unfrozen)
    return model, [p for p in model.parameters() if p.requires_grad]


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("is_unfrozen", [False, True], ids=["W frozen", "W unfrozen"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("body", SUMS.values(), ids=SUMS)
def test_passes_add_up(body, kind, is_unfrozen):
    model, parameters = trained(kind, body, is_unfrozen)
    inputs = [torch.randn(n, 6) if kind == "linear" else torch.randint(9, (n,)) for n in (5, 7, 300)]
    apart = [torch.autograd.grad(model(x).square().sum(), parameters) for x in inputs]
    for x in inputs:
        model(x).square().sum().backward()
    for parameter, *each in zip(parameters, *apart):
        assert_close(gradient(parameter), torch.stack(each).sum(0), 1e-5)


@pytest.mark.parametrize("body", SUMS.values(), ids=SUMS)
def test_clipping_scales_once(body):
    model, parameters = trained("embedding", body, True)
    loss = model(torch.arange(9)).square().sum()
    before = torch.autograd.grad(loss, parameters, retain_graph=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 0.5)
    for parameter, whole in zip(parameters, before):
        assert_close(gradient(parameter), whole * (0.5 / norm), 1e-4)
