"""What records a forward pass (torch.jit.trace, ONNX) records an operated one, without operations that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import perturbed
from torch import nn

import surgery
from surgery.ir.orthogonal_maps import eliminated, triangle

SPECS = {"sora": "sora", "oft": "target linear { pre block_orthogonal(4) on in }", "hra": "hra", "dora": "dora",
         "rotation": "target linear { post orthogonal(rank = 2) }"}


def operated(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    spec = SPECS[name]
    perturbed(model, surgery.parse(spec) if "{" in spec else spec)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will drop
@pytest.mark.parametrize("name", [name for name in SPECS if name != "rotation"])  # which sora has, among others
def test_a_trace_and_a_graph_without_solvers_give_what_the_model_gives(name, monkeypatch):
    model, x = operated(name), torch.randn(5, 16)
    wanted = model(x)
    traced: Any = torch.jit.trace(model, torch.randn(3, 16))  # where gradients are taken, too
    torch.testing.assert_close(traced(x), wanted, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = torch.export.export(model, (torch.randn(3, 16),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert not [node for node in graph.graph.nodes if "linalg_inv" in str(node.target)
                or "cholesky" in str(node.target) or "triangular" in str(node.target)]
    torch.testing.assert_close(graph.module()(x), wanted, rtol=1e-5, atol=1e-5)


def test_elimination_is_the_inverse_and_the_triangle_the_factor():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 9, 9, generator=draw, dtype=torch.float64)
    rotated = torch.eye(9, dtype=torch.float64) + 2 * (a - a.mT)
    torch.testing.assert_close(eliminated(rotated), torch.linalg.inv(rotated), rtol=1e-10, atol=1e-10)
    gram = a @ a.mT
    torch.testing.assert_close(triangle(gram), torch.linalg.cholesky(gram), rtol=1e-9, atol=1e-9)
    for made in (eliminated, triangle):
        found = made(torch.eye(4, dtype=torch.bfloat16, device="meta"))
        assert (found.dtype, found.device.type) == (torch.bfloat16, "meta")


@pytest.mark.engines
@pytest.mark.parametrize("name", SPECS)
def test_onnxruntime_gives_what_the_model_gives(name, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="ONNX is of the extra `engines`")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is of the extra `engines`")
    model, x, file = operated(name), torch.randn(5, 16), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (torch.randn(3, 16),), file, dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("rows")},))
    session = runtime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-4)
