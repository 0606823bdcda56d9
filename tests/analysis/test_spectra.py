"""The microscope against a dense SVD in float64: updates of every structure, merged models, and rounding."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import pytest
import torch
from each import in_turns, of_some
from layers import LAYOUTS, Tower, operated
from models import perturbed, spec_for
from torch import Tensor, nn
from zoo import CASES

import surgery
from surgery.analysis.spectra import pending_of, row_of, updates
from surgery.analysis.spectra.orthogonality import distance
from surgery.analysis.spectra.spectrum import (
    Spectrum,
    condition_number,
    leading,
    of_factors,
    overlap,
    singular_values,
)
from surgery.analysis.spectra.summary import Group, Row
from surgery.analysis.spectra.updates import rounding
from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.matching.name_ranges import module_type
from surgery.models.demo import load_demo

EXACT = 1e-6
SEEN = [LAYOUTS[name] for name in ("linear 12x18", "Conv1D 18x12", "Conv2d 12x18")]


def by_svd(matrix: Tensor, squared: bool = False) -> tuple[float, float]:
    """Entropy and stable rank, written out from a dense SVD."""
    s = torch.linalg.svdvals(matrix.double())
    weights = s**2 if squared else s
    p = weights / weights.sum()
    p = p[p > 0]
    return float(-(p * p.log()).sum()), float((s**2).sum() / s.max() ** 2)


@in_turns(3)
@pytest.mark.parametrize("case", CASES, ids=str)
@of_some("layout", [], SEEN)
def test_every_structure_is_as_a_dense_svd_says(case, layout):
    op = operated(case, layout)
    delta = case.formula(op.weight, op.p) - op.weight
    for squared in (False, True):
        (row,) = surgery.spectrum(op.surgeon, squared=squared).rows
        entropy, stable = by_svd(delta, squared)
        assert abs(row.spectrum.entropy - entropy) < EXACT and abs(row.spectrum.stable_rank - stable) < EXACT
    assert abs(row.relative_size - float(delta.norm() / op.weight.norm())) < EXACT
    assert row.spectrum.numerical_rank == torch.linalg.matrix_rank(delta, rtol=1e-11)
    u, _, vh = torch.linalg.svd(delta)
    w, _, xh = torch.linalg.svd(op.weight)
    k = min(8, row.spectrum.numerical_rank)
    if case.name != "fourierft":  # its singular values come in equal pairs, so that eight of them span no one space
        assert abs(row.overlap_out - overlap(w[:, :8], u[:, :k])) < EXACT
        assert abs(row.overlap_in - overlap(xh[:8].mT, vh[:k].mT)) < EXACT


THIN = ("lora", "two updates", "mirrors on in", "rotation on in", "loha", "vera", "deft", "W among the factors",
        "expm of a low-rank skew", "a projection from W on in")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in THIN], ids=str)
def test_what_is_thin_is_never_built(case, monkeypatch):
    """ΔW = U V stays two factors, and no SVD is of more than r rows and columns."""
    op = operated(case, LAYOUTS["linear 12x18"])
    (pending,) = pending_of(op.surgeon)
    (update,) = pending.load()
    u, v = update.delta
    assert u.shape[1] == v.shape[0] <= 6
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    monkeypatch.setattr(torch.linalg, "svd", lambda a: svd(a) if max(a.shape) <= 6 else None)
    assert row_of(update, top=0).spectrum.numerical_rank >= 1


def test_the_thin_cases_are_all_here():
    assert {case.name for case in CASES if case.name in THIN} == set(THIN)


# --------------------------------------------------------------------------------------------------------- values


def matrix(m: int, n: int, spread: float = 0.0, seed: int = 0) -> Tensor:
    """A random matrix whose singular values fall from 1 to e^-spread (as they come without a spread)."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=draw, dtype=torch.float64)
    if not spread:
        return a
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u * torch.linspace(0, -spread, min(m, n), dtype=a.dtype).exp() @ vh


@pytest.mark.parametrize("a", [
    matrix(300, 280), matrix(270, 330), matrix(300, 300, spread=11), matrix(300, 300, spread=30),
    matrix(300, 2) @ matrix(2, 290)], ids=["tall", "wide", "steep", "tiny values", "low rank"])
def test_large_matrices_are_as_exact(a):
    found = singular_values(a)
    assert found.dtype == torch.float64 and (found[:-1] >= found[1:]).all()
    torch.testing.assert_close(found, torch.linalg.svdvals(a), rtol=0, atol=1e-10 * float(found[0]))
    spectrum = Spectrum.of(a)
    entropy, stable = by_svd(a)
    assert abs(spectrum.entropy - entropy) < EXACT and abs(spectrum.stable_rank - stable) < EXACT


def test_the_figures_of_known_spectra():
    flat = Spectrum.of(torch.eye(5)[:, :4] * 3)
    assert math.isclose(flat.entropy, math.log(4)) and math.isclose(flat.normalised_entropy, 1)
    assert [round(x, 12) for x in (flat.effective_rank, flat.stable_rank, flat.norm)] == [4, 4, 6]
    assert flat.numerical_rank == 4
    two = Spectrum.of(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
    assert math.isclose(two.entropy, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    squared = Spectrum.of(torch.diag(torch.tensor([3.0, 1.0, 0.0])), squared=True)
    assert math.isclose(squared.entropy, -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert flat.entropy_by_largest == 0 and math.isclose(two.entropy_by_largest, -math.log(1 / 3) / 3)
    assert two.stable_rank == squared.stable_rank == 1 + 1 / 9 and two.numerical_rank == 2


@pytest.mark.parametrize("name", ["lora", "dora"])  # thin factors, and a matrix
def test_the_condition_number_is_that_of_the_merged_weight(name):
    model = load_demo("llama")
    surgeon = perturbed(model, name)
    rows = surgery.spectrum(surgeon, top=0, condition=True).rows
    surgeon.merge()
    for row in rows[:4]:
        weight = model.get_parameter(f"{row.name}.weight").double()
        assert math.isclose(row.condition_number, float(torch.linalg.cond(weight)), rel_tol=1e-4)
    assert surgery.spectrum(surgeon, top=0).rows[0].condition_number is None
    assert condition_number(torch.diag(torch.tensor([2.0, 1.0, 0.0]))) is None


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (300, 300)])
def test_no_update_is_no_spectrum(shape):
    zero = Spectrum.of(torch.zeros(shape))
    assert zero == of_factors(torch.zeros(shape[0], 1), torch.ones(1, shape[1]))[0]
    assert zero.to_json() == {"shape": list(shape), "entropy": 0.0, "normalised_entropy": 0.0, "entropy_by_largest": 0.0,
                              "stable_rank": 0.0, "effective_rank": 0.0, "numerical_rank": 0, "norm": 0.0,
                              "singular_values": []}


def test_a_row_has_one_direction_and_no_entropy():
    row = Spectrum.of(torch.tensor([[3.0, 4.0]]))
    assert (row.entropy, row.normalised_entropy, row.stable_rank, row.norm) == (0, 0, 1, 5)


def test_factors_that_cancel_leave_nothing():
    u, v = matrix(40, 3), matrix(3, 30)
    found, directions = of_factors(torch.cat([u, u], 1), torch.cat([v, -v], 0))
    assert found.values == () and directions.out.shape == (40, 0)


def same_span(a: Tensor, b: Tensor) -> bool:
    is_orthonormal = (a.mT @ a - torch.eye(a.shape[1])).norm() < 1e-10
    return bool(is_orthonormal) and abs(overlap(a, b) - 1) < 1e-10


def test_directions_of_a_large_matrix():
    """Exact where the singular values are apart; of a flat spectrum, directions as strong as the strongest."""
    a = matrix(400, 300, spread=20)
    u, s, vh = torch.linalg.svd(a)
    found = leading(a, 8)
    assert same_span(found.out, u[:, :8]) and same_span(found.in_, vh[:8].mT)
    low = matrix(300, 8) @ matrix(8, 350, seed=1) + 1e-8 * matrix(300, 350, seed=2)
    u, _, vh = torch.linalg.svd(low)
    assert same_span(leading(low, 8).out, u[:, :8]) and same_span(leading(low, 8).in_, vh[:8].mT)
    flat = matrix(500, 450)
    values = torch.linalg.svdvals(flat @ leading(flat, 8).in_)
    torch.testing.assert_close(values, torch.linalg.svdvals(flat)[:8], rtol=2e-3, atol=0)
    assert torch.equal(leading(flat, 8).out, leading(flat, 8).out)


def test_overlap_is_one_within_and_zero_beside():
    q = torch.linalg.qr(matrix(10, 6)).Q
    assert math.isclose(overlap(q, q[:, :2]), 1) and overlap(q[:, :3], q[:, 3:]) < 1e-12
    assert math.isclose(overlap(q[:, :3], q[:, 1:]), 2 / 3)


# ----------------------------------------------------------------------------------------------------- orthogonality


@in_turns(3)
@pytest.mark.parametrize("case", [c for c in CASES if c.claims and not c.shifted], ids=str)
def test_the_transforms_that_claim_it_are_orthogonal(case):
    op = operated(case, LAYOUTS["linear 12x18"])
    (row,) = surgery.spectrum(op.surgeon).rows
    claims = [c.owner for c in op.adapter.formula.claims if c.name == "orthogonal"]
    assert [d.name for d in row.orthogonality] == claims
    assert all(0 <= d.distance < 1e-12 for d in row.orthogonality)


@pytest.mark.parametrize("text", ["param C[n, 2] ~ normal() return I(n) + C @ C.T", "param X[n, n] ~ normal() return X",
                                  "param X[n / 3, 3, 3] ~ normal() return block_diag(X)"])
def test_what_is_not_orthogonal_is_measured(text):
    spec = f'transform own() on n : orthogonal {{ {text} }}\nspec s()\ntarget any "layers.0" shifted {{ post own() }}'
    surgeon = surgery.apply(Tower(nn.Linear(12, 12)), surgery.parse(spec))
    (claim,) = surgeon.plan.placed[0].formula.claims
    (defect,) = surgery.spectrum(surgeon).rows[0].orthogonality
    values = {"weight": torch.zeros(12, 12), **surgeon.adapters["layers.0"].tensors()}
    r = dense(claim.expr, values).detach().double()
    wanted = float((r @ r.mT - torch.eye(12)).norm()) / 12**0.5
    assert defect.name == "own" and math.isclose(defect.distance, wanted, rel_tol=1e-5)
    turned = Expr("T", (claim.expr,), None, (12, 12))
    assert math.isclose(distance(turned, values), wanted, rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("spec", ["lora", "sora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "resnet"])
def test_a_merged_model_has_the_adapters_spectra(name, spec):
    base = load_demo(name)
    model = deepcopy(base)
    surgeon = perturbed(model, spec_for(name, spec))
    adapter = surgery.spectrum(surgeon)
    surgeon.merge()
    assert surgery.spectrum(surgeon) == adapter and surgeon.merged
    with surgeon.disabled():
        assert surgery.spectrum(surgeon) == adapter
    merged = {row.name: row for row in surgery.spectrum(base, model).rows}
    assert set(merged) > {row.name for row in adapter.rows} and len(adapter.rows) > 5
    for row in adapter.rows:
        other = merged[row.name]
        assert abs(row.spectrum.entropy - other.spectrum.entropy) < EXACT
        assert abs(row.spectrum.stable_rank - other.spectrum.stable_rank) < EXACT
        assert row.spectrum.numerical_rank == other.spectrum.numerical_rank and row.type == other.type


def test_rounding_to_a_narrow_dtype_is_not_taken_for_an_update():
    base = load_demo("llama").bfloat16()
    model = deepcopy(base)
    surgeon = perturbed(model, "lora", scale=0.1)
    adapter = surgery.spectrum(surgeon)
    surgeon.merge()
    merged = {row.name: row for row in surgery.spectrum(base, model).rows}
    for row in adapter.rows:
        assert row.spectrum.numerical_rank == 8 >= merged[row.name].spectrum.numerical_rank
        assert abs(row.spectrum.entropy - merged[row.name].spectrum.entropy) < 0.02


def test_a_small_update_of_narrow_parameters_is_measured():
    """Rotations by angles of 5e-4 in bfloat16, half a unit in the last place of W, were said to change nothing."""
    surgeon = perturbed(load_demo("llama:num_hidden_layers=1"), "oft", scale=5e-4)
    wide = surgery.spectrum(surgeon)
    for parameter in surgeon.parameters():
        parameter.data = parameter.data.bfloat16()
    narrow = surgery.spectrum(surgeon)
    assert max(row.relative_size for row in narrow.rows) < torch.finfo(torch.bfloat16).eps and not narrow.unchanged
    for one, other in zip(wide.rows, narrow.rows):
        assert other.spectrum.entropy == pytest.approx(one.spectrum.entropy, rel=1e-3)
        assert other.relative_size == pytest.approx(one.relative_size, rel=1e-2)
    scaled = surgery.apply(load_demo("llama:num_hidden_layers=1"), "dora")
    for parameter in scaled.parameters():
        parameter.data = parameter.data.bfloat16()
    assert len(surgery.spectrum(scaled).unchanged) == 7  # its magnitudes are rounded, and that is no update


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_bounded_and_not_by_much(dtype, monkeypatch):
    """The largest singular value of what rounding a matrix changes, of rows and columns of very different sizes."""
    a = torch.randn(200, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a *= torch.logspace(-2, 1, 200, dtype=a.dtype)[:, None]
    bound = rounding(a.to(dtype))
    if dtype != torch.float64:
        error = float(torch.linalg.matrix_norm(a.to(dtype).double() - a, 2))
        assert error < bound < 4 * error
    monkeypatch.setattr(updates, "_ROWS", 7)
    zero = torch.zeros(9, 150, dtype=a.dtype)
    assert rounding(torch.cat([a, zero]).to(dtype)) == pytest.approx(bound)


def test_each_expert_is_a_matrix_of_its_own():
    surgeon = perturbed(load_demo("mixtral"), "lora")
    spectra = surgery.spectrum(surgeon)
    experts = [row for row in spectra.rows if "experts" in row.name]
    site = next(p.site for p in surgeon.plan.placed if p.site.stack)
    tensors = surgeon.adapters[site.name].tensors()
    names = [row.name for row in experts if row.name.startswith(site.name)]
    assert names == [f"{site.name}.{i}" for i in range(4)] and {row.type for row in experts} == {
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    third = next(row for row in experts if row.name == f"{site.name}.2")
    product = tensors["add_low_rank.B"][2].detach().double() @ tensors["add_low_rank.A"][2].detach().double()
    assert abs(third.spectrum.entropy - by_svd(product)[0]) < EXACT


def test_unchanged_weights_are_said_and_left_out_of_means():
    base = load_demo("llama")
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(1e-3 * matrix(128, 64).float())
    spectra = surgery.spectrum(base, tuned)
    assert len(spectra.unchanged) == len(spectra.rows) - 1 and spectra.total.count == len(spectra.rows)
    (row,) = (row for row in spectra.rows if row.changed)
    assert spectra.total.means["entropy"] == row.spectrum.entropy and (row.type, row.layer) == ("mlp.up_proj", 1)
    assert [g.means["entropy"] for g in spectra.layers] == [None, row.spectrum.entropy, None, None]
    assert json.loads(json.dumps(spectra.to_json(), allow_nan=False))["all"]["count"] == len(spectra.rows)


def test_a_fresh_adapter_changes_nothing():
    for spec in ("lora", "dora", "sora", "oft"):
        assert not any(row.changed for row in surgery.spectrum(surgery.apply(load_demo("llama"), spec)).rows), spec


def test_models_that_have_nothing_in_common():
    with pytest.raises(surgery.SurgeryError, match="no weight in common"):
        surgery.spectrum(nn.Linear(2, 3), nn.Linear(3, 2))


def test_what_is_not_finite_is_said():
    base, tuned = nn.Linear(3, 3), nn.Linear(3, 3)
    tuned.weight.data[0, 0] = math.nan
    with pytest.raises(surgery.SurgeryError, match="not finite"):
        surgery.spectrum(base, tuned)


def test_raw_matrices():
    a, b = matrix(7, 5), matrix(7, 5, seed=1)
    assert surgery.spectrum(b - a) == surgery.spectrum(a, b) == Spectrum.of(b - a)
    assert surgery.spectrum(a, squared=True).entropy == pytest.approx(by_svd(a, True)[0])


@pytest.mark.parametrize("name, type_", [
    ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"), ("encoder.block.0.layer.1.ff.wi", "layer.ff.wi"),
    ("model.layers.0.mlp.experts.down_proj.2", "mlp.experts.down_proj"), ("lm_head", "lm_head"), ("0", "0"),
    ("net.0", "net.0"),
])
def test_module_types(name, type_):
    assert module_type(name) == type_


def test_means_are_of_the_known():
    rows = [Row(str(i), "t", None, Spectrum((4, 4), values), size, None, None)
            for i, (values, size) in enumerate([((2.0, 2.0), 1.0), ((1.0,), None), ((), 0.0)])]
    group = Group.of("g", rows)
    assert (group.count, group.means["relative_size"], group.means["overlap_in"]) == (3, 1.0, None)
    assert math.isclose(group.means["entropy"], math.log(2) / 2)


def test_tied_weights_are_one_row_unless_one_model_parted_them():
    base, parted = load_demo("gpt2"), load_demo("gpt2")
    names = [row.name for row in surgery.spectrum(base, load_demo("gpt2")).rows]
    assert "transformer.wte" in names and "lm_head" not in names
    parted.lm_head.weight = nn.Parameter(parted.lm_head.weight.detach() + 1)
    changed = [row.name for row in surgery.spectrum(base, parted).rows if row.changed]
    assert changed == ["lm_head"]
