"""Where parameters start that are made of the frozen weight or of whole numbers; updates on the bias."""

from __future__ import annotations

import weakref

import oracle as o
import pytest
import torch
from layers import assert_close, perturb
from torch import nn

import surgery
from surgery.diagnostics import SurgeryError
from surgery.ir import dense as evaluate
from surgery.planning import initial_values
from surgery.planning.compile import Placed, compile
from surgery.planning.initial_values import Shared, departure, tensors

OUT, IN = 12, 18


def leaves(name: str, out: int = OUT, in_: int = IN, **settings):
    """The frozen weight and an adapter's tensors at their start, by their own names."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(in_, out).double())
    surgeon = surgery.apply(layer, surgery.load(name, **settings).retarget("0"), dtype=torch.float64)
    return layer[0].weight, {key.partition(".")[2]: t.detach() for key, t in surgeon.adapters["0"].tensors().items()}


@pytest.mark.parametrize("name, scaling", [("pissa", 2), ("psoft", 1), ("tinylora", 1)])
def test_the_principal_part_of_the_weight(name, scaling):
    weight, found = leaves(name, rank=3, **({"alpha": 6} if scaling == 2 else {}))
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :3] @ s[:3].diag() @ v[:3]
    b, a = (found.get(f"{n}0", found[n]) for n in "BA")
    assert_close(scaling * b @ a, best, 1e-10)


def test_pissa_shares_the_singular_values_between_its_factors():
    weight, found = leaves("pissa", rank=3, alpha=6)
    assert_close(found["A"].norm(dim=1), found["B"].norm(dim=0), 1e-10)
    assert torch.equal(found["A"], found["A0"]) and torch.equal(found["B"], found["B0"])


@pytest.mark.parametrize("name, settings", [("svf", {}), ("milora", {"rank": 3}), ("pissa", {"rank": 3})])
def test_a_weight_is_decomposed_once_for_all_that_starts_from_it(name, settings, monkeypatch):
    """Which takes long for a large one: as it starts, and twice more to see what rounding decides."""
    decompose, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **how: calls.append(a[0].shape) or decompose(*a, **how))
    leaves(name, **settings)
    assert calls == [(OUT, IN)] * 3


@pytest.mark.parametrize("spec, spoil, told", [
    (surgery.load("pissa", rank=2), lambda w: w.fill_(float("nan")), "`A0` has no start in spoilt: linalg.*not finite"),
    (surgery.load("pissa", rank=2), lambda w: w[:1].fill_(float("inf")), "spoilt.*not finite"),
    (surgery.parse("""update by_inverse() { frozen param A[out, out] = inverse(W @ W.T) param B[out, in] = 0
        return A @ B }
        target linear { add by_inverse() }"""), lambda w: w.zero_(), "spoilt.*not finite")])
def test_a_start_that_linear_algebra_does_not_give_is_refused_by_name(spec, spoil, told):
    model = nn.ModuleDict({"sound": nn.Linear(6, 4), "spoilt": nn.Linear(6, 4)})
    spoil(model["spoilt"].weight.data)
    with pytest.raises(SurgeryError, match=f"(?s){told}"):
        surgery.apply(model, spec.retarget("*"))
    assert [*model.state_dict()] == ["sound.weight", "sound.bias", "spoilt.weight", "spoilt.bias"]


def test_olora_starts_at_the_qr_factors():
    weight, found = leaves("olora", rank=3)
    q, r = torch.linalg.qr(weight)
    assert_close(found["B"], q[:, :3], 1e-10)
    assert_close(found["A"], r[:3], 1e-10)
    assert_close(found["B"], o.qr(weight.detach()[:, :3]), 1e-10)


@pytest.mark.parametrize("name", ["fourierft", "waveft"])
def test_places_are_different_ones_of_all(name):
    _, found = leaves(name, count=OUT * IN)
    assert torch.equal(found["at"].sort().values, torch.arange(OUT * IN))
    with pytest.raises(SurgeryError, match="217 different places are asked for, and there are 216"):
        leaves(name, count=OUT * IN + 1)


def test_places_are_those_of_the_largest_entries():
    weight, found = leaves("supertuning", sparsity=0.875)
    least = weight.abs().flatten()[found["at"]].min()
    assert (weight.abs() >= least).sum() == len(found["at"]) == OUT * IN // 8


def test_whole_numbers_are_drawn_below_their_bound():
    _, found = leaves("unilora", length=5)
    assert found["at_A"].dtype == torch.int64 and set(found["at_A"].flatten().tolist()) == set(range(5))


# ------------------------------------------------------------------------------------------------------- on the bias


@pytest.mark.parametrize("name", ["lora_bias", "glora", "beft"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_an_update_on_the_bias(name, has_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, has_bias)).double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone() if has_bias else None
    spec = surgery.load(name).retarget("0")
    if not has_bias and name == "beft":
        with pytest.raises(SurgeryError, match="1 of the 1 modules have none"):
            surgery.apply(model, spec)
        return
    surgeon = surgery.apply(model, spec, dtype=torch.float64)
    assert [d.code for d in surgeon.plan.warnings] == ([] if has_bias else ["no-bias"])
    perturb(model)
    p = {key.partition(".")[2]: t.detach() for key, t in surgeon.adapters["0"].tensors().items()}
    wanted = {
        "lora_bias": lambda: (weight + 2 * o.mul(p["B"], p["A"]), has_bias and bias + 2 * p["beta"]),
        "glora": lambda: (weight + weight * o.mul(p["Ad"], p["Au"]) + o.mul(p["Bd"], p["Bu"]),
                          has_bias and bias + bias * p["d"] + p["e"] + o.mul(weight, p["c"])[:, 0]),
        "beft": lambda: (weight, bias + p["beta"]),
    }[name]()
    x = torch.randn(5, IN, dtype=torch.float64)
    y = o.linear(x, wanted[0], wanted[1] if has_bias else None)
    assert_close(model(x), y, 1e-10)
    surgeon.merge()
    assert_close(model(x), y, 1e-10)
    assert has_bias or "beta" not in p and "c" not in p


@pytest.mark.parametrize("start, large", [
    ("= 0", 1),  # W alone
    ("~ normal(std = 0.1)", 3)])  # what is added, and the sum
def test_a_start_holds_no_more_than_what_is_still_read(start: str, large: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of `row_norm(W + 2 B A)` is as large as the weight, in float32."""
    alive, most, value = weakref.WeakSet(), [], evaluate._value

    def counted(*of):
        made = value(*of)
        alive.update([made] if isinstance(made, torch.Tensor) else [])
        most.append(sum(t.numel() >= OUT * IN for t in alive))
        return made

    monkeypatch.setattr(evaluate, "_value", counted)
    placed = adapted(f"param A[2, in] ~ normal() param B[out, 2] {start} param m[out] = row_norm(W + 2 * (B @ A))")
    tensors(placed, 0, torch.float32, {})
    assert max(most) == large


def adapted(params: str) -> Placed:
    """A layer with parameters of which nothing is made."""
    torch.manual_seed(0)
    spec = surgery.parse(f"update u() {{ {params} return 0 * W }} spec s target linear shifted {{ add u() }}")
    return compile(nn.ModuleList([nn.Linear(IN, OUT)]), spec.retarget("0")).placed[0]


def started(text: str, monkeypatch: pytest.MonkeyPatch, placed: Placed | None = None, shared: Shared | None = None,
            ) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What is computed for a parameter that starts at the text, its value, and that of the text as it stands."""
    placed, asked = placed or adapted(f"{UNITS} frozen param C[out, in] = {text}"), []
    leaf, calls = placed.formula.leaves[-1], initial_values.dense
    monkeypatch.setattr(initial_values, "dense", lambda *of: asked.append(of) or calls(*of))
    found = tensors(placed, 0, torch.float32, shared or {})[leaf.key].detach()
    last, values, *_ = asked[-1]
    assert leaf.init is not None
    return str(last), found, calls(leaf.init, values).expand(OUT, IN)


UNITS = ("param A[in, in] ~ normal() shared param z[out, in] = 0 param g = 0 param h[out] = 1 "
         "param R[out, out] = I(out) param s = 0.3")


@pytest.mark.parametrize("text, plain", [
    ("W + z @ A", "weight()"), ("W - z @ A", "weight()"), ("W + 0.3 * (-z) @ A", "weight()"),
    ("W * (1 + g)", "weight()"), ("R @ diag(h) @ W", "weight()"), ("W @ expm(skew(g * A))", "weight()"),
    ("diag(row_norm(detach(W + kron(z, I(1))))) @ W", "matmul(diag(row_norm(weight())), weight())"),
    ("3 * (W @ z.T @ W)", "fill(0.0)"), ("W + (z / g) @ A", ""),
    ("s * W + z @ A", "mul(param('add_u.s'), weight())"), ("s * W + 0.5 * (2 * W @ A)", "")])
def test_a_start_leaves_out_what_is_lost_on_zeros_ones_and_identities(text, plain, monkeypatch):
    done, found, wanted = started(text, monkeypatch)
    assert done == plain or not plain
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_zero_times_what_is_not_finite_is_not_left_out(number, monkeypatch):
    placed = adapted(f"{UNITS} frozen param C[out, in] = W + (g * W) @ A")
    placed.site.module.weight.data[0, 0] = number
    _, found, _ = started("", monkeypatch, placed)
    assert found[0].isnan().all() and found[1:].isfinite().all()


def test_what_is_no_zero_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec says that `z` starts at 0, and whoever gives it says otherwise."""
    placed = adapted(f"{UNITS} frozen param C[out, in] = W + z @ A")
    z = next(leaf for leaf in placed.formula.leaves if leaf.key.endswith(".z"))
    _, found, wanted = started("", monkeypatch, placed, {placed.held(z).name: torch.ones(OUT, IN)})
    assert torch.equal(found, wanted) and not torch.equal(found, placed.site.module.weight)


NUMBERS = 0.02 * torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0))
HALF = torch.arange(len(NUMBERS)) < len(NUMBERS) // 2


PAIRS = {
    "rounded": (NUMBERS, NUMBERS.bfloat16()),
    "rounded equally": (torch.full_like(NUMBERS, 0.01234567), torch.full_like(NUMBERS, 0.01234567).bfloat16()),
    "the other way": (NUMBERS.half(), NUMBERS), "both narrow": (NUMBERS.half(), NUMBERS.bfloat16()),
    "a slice without a change": (NUMBERS, torch.where(HALF, NUMBERS, 1.001 * NUMBERS)),
    "a slice of zeros": (NUMBERS * HALF, NUMBERS.bfloat16()),
    "squares below float32": (1e-28 * NUMBERS, (1e-28 * NUMBERS).bfloat16()),
    "squares above float32": (1e28 * NUMBERS, (1e28 * NUMBERS).bfloat16()),
    "changes below float32": (NUMBERS, NUMBERS.double() * (1 + 1e-22 * HALF) + 1e-30),
    "some below float32": (NUMBERS * torch.where(HALF, 1.0, 1e-28), NUMBERS.bfloat16() * torch.where(HALF, 1.0, 1e-28)),
    "from zero": (torch.zeros(5), torch.ones(5)), "wide": (NUMBERS.double(), NUMBERS.double() * (1 + 1e-12)),
    "turned": (NUMBERS[:10**6].view(1000, 1000).T, NUMBERS[:10**6].view(1000, 1000).T.bfloat16()),
}


@pytest.mark.parametrize("before, after", PAIRS.values(), ids=PAIRS)
def test_how_far_one_tensor_is_from_another(before: torch.Tensor, after: torch.Tensor) -> None:
    """To six digits of what float64 gives of all numbers at once, wherever they lie in float32's range."""
    change, size = (after.double() - before.double()).norm(), before.double().norm()
    assert departure(before, after) == pytest.approx(float(change / size if size else change), rel=1e-6)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_is_infinitely_far(number: float) -> None:
    """Wherever it stands, also where nothing else has changed."""
    bad = NUMBERS.index_fill(0, torch.tensor(len(NUMBERS) - 3), number)
    for before, after in ((NUMBERS, bad), (bad, NUMBERS.bfloat16()), (bad, bad), (bad, bad.bfloat16())):
        assert departure(before, after) == torch.inf
