"""What a parameter says of how it trains: `rate 16`, `no decay`, `on stiefel`."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diagnosed import errors_of
from models import perturbed
from torch import nn

import surgery
from surgery.ir.manifolds import MANIFOLDS
from surgery.language.expressions import Name, as_expression
from surgery.language.to_python import python_text
from surgery.language.tree import Definition, Param

CLAUSES = """spec clauses(ratio: float = 16)

update factors(ratio: float = 16) {
  param A[4, in] ~ kaiming_uniform(a = sqrt(5)) no decay
  param B[out, 4] = 0 rate 2 * ratio
  param C[out] = 0 rate 3 no decay
  return B @ A + diag(C) @ ones(out, in)
}

update subspace() {
  param X[out, 4] ~ orthogonal() rate 2 on stiefel
  param Y[4, in] ~ orthogonal() on stiefel
  param theta[4, 4] = 0
  return X @ theta @ Y
}

target linear {
  add factors(ratio)
  add subspace()
}
"""


def layer(spec: str | surgery.Spec = CLAUSES, **more) -> tuple[nn.Module, surgery.Surgeon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10))
    spec = surgery.parse(spec) if isinstance(spec, str) else spec
    return model, surgery.apply(model, spec, example=torch.ones(2, 6), **more)


def defect(tensor: torch.Tensor) -> float:
    return MANIFOLDS["stiefel"].defect(tensor)


def kept(surgeon: surgery.Surgeon) -> list[torch.Tensor]:
    found = [t for n, t in surgeon.named_tensors().items() if n.rpartition(".")[2] in ("X", "Y")]
    assert len(found) == 4
    return found


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        (model(torch.ones(2, 6)) - 1).square().sum().backward()
        optimiser.step()


# --------------------------------------------------------------------------------------------------------- language


def params(definition: Definition) -> list[Param]:
    return [statement for statement in definition.body if isinstance(statement, Param)]


def test_clauses_are_one_thing_in_text_json_and_python() -> None:
    spec = surgery.parse(CLAUSES)
    assert spec.to_surg() == CLAUSES
    assert surgery.Spec.model_validate_json(spec.model_dump_json()) == spec
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
    a, b, c = params(spec.definitions[0])
    assert (a.decay, b.rate, c.rate, c.decay) == (False, as_expression("2 * ratio"), as_expression(3), False)
    assert params(spec.definitions[1])[0].manifold == "stiefel"


def test_clauses_come_in_any_order_and_their_words_are_names_elsewhere() -> None:
    text = ("update u(rate: int = 2, no: float = 1) { param decay[out, in] = 0 on stiefel no decay rate rate "
            "let stiefel = decay * no return stiefel }")
    (param,) = params(surgery.parse(text).definitions[0])
    assert (param.name, param.rate, param.decay, param.manifold) == ("decay", Name("rate"), False, "stiefel")


@pytest.mark.parametrize(("statement", "code", "says"), [
    ("param A[out, in] = 0 rate 2 no decay rate 3", "syntax", "`rate` stands twice"),
    ("frozen param A[out, in] = 0 rate 2", "syntax", "`rate` says how a parameter trains, and `A` is frozen"),
    ("frozen param A[out, in] = 0 no decay", "syntax", "`no decay` says how"),
    ("param A[out, in] = 0 rate 0", "bad-value", "more than 0, not 0"),
    ("param A[out, in] = 0 rate -1", "bad-value", "more than 0, not -1"),
    ("param A[out, in] = 0 rate W", "wrong-type", "a number known at compile time, not a tensor"),
    ("param A[out, in] = 0 rate true", "wrong-type", "not bool"),
    ("param A[out, in] = 0 on sphere", "syntax", "expected `stiefel`"),
    ("param A[out, in] = 0 no", "syntax", "expected `decay`"),
    ("param v[out] = 1 on stiefel let A = diag(v) @ W", "shape-mismatch", "is for matrices, and `v` is [out]"),
    ("param A[out, in] = 0 on stiefel", "off-manifold", "does not start there"),
    ("param A[out, in] ~ normal() on stiefel", "off-manifold", "does not start there"),
])
def test_what_a_clause_cannot_say(statement: str, code: str, says: str) -> None:
    found = errors_of(f"update u() {{ {statement} return A }} target linear shifted {{ add u() }}", raise_errors)
    assert [d.code for d in found][:1] == [code] and says in found[0].message


def raise_errors(text: str) -> None:
    errors = [d for d in surgery.check(surgery.parse(text)) if d.severity == "error"]
    if errors:
        raise surgery.SurgeryError(errors)


def test_a_start_off_its_manifold_is_refused_by_apply_too() -> None:
    text = CLAUSES.replace("param Y[4, in] ~ orthogonal()", "param Y[4, in] ~ normal()")
    with pytest.raises(surgery.SurgeryError, match="`Y` is kept `on stiefel`, and does not start there in 0"):
        layer(text)


def test_what_starts_at_singular_vectors_is_on_it() -> None:
    _, surgeon = layer("update u() { param U[out, 4] = left_singular(W, 4) on stiefel param V[4, in] = 0 "
                       "return U @ V } target linear { add u() }")
    assert all(defect(t) < 1e-5 for n, t in surgeon.state().items() if n.endswith("U"))


def test_show_says_how_a_parameter_trains() -> None:
    from surgery.planning.formulas import formula_lines, formulas

    (pair,) = formulas(surgery.parse(CLAUSES))
    said = "\n".join(formula_lines(*pair))
    assert "rate 32" in said and "rate 3, no decay" in said and "rate 2, kept on stiefel" in said


def test_a_claim_may_rest_on_the_manifold() -> None:
    kept_ = "transform r() on n : orthogonal { param R[n, n] = I(n) on stiefel return R } target linear { post r() }"
    assert surgery.check(surgery.parse(kept_)) == []
    free = kept_.replace(" on stiefel", "")
    assert [d.code for d in surgery.check(surgery.parse(free))] == ["false-claim"]


# ---------------------------------------------------------------------------------------------------------- groups


def groups_of(surgeon: surgery.Surgeon, **rates: float) -> dict[str, tuple[float, float]]:
    names = {id(t): n.rpartition(".")[2] for n, t in surgeon.named_tensors().items()}
    return {names[id(p)]: (g["lr"], g["weight_decay"])
            for g in surgeon.parameter_groups(lr=0.5, weight_decay=0.1, **rates) for p in g["params"]}


def test_groups_have_the_rates_and_the_decay_that_the_spec_says() -> None:
    _, surgeon = layer()
    assert groups_of(surgeon) == {"A": (0.5, 0.0), "B": (16.0, 0.1), "C": (1.5, 0.0), "X": (1.0, 0.0),
                                  "Y": (0.5, 0.0), "theta": (0.5, 0.1)}
    assert groups_of(surgeon, lr_B=0.25)["B"] == (0.25, 0.1)


def test_a_rate_is_of_every_tensor_of_that_param() -> None:
    """In the rounds of a `for`, and in the second size that steps of a module need, its name has a number behind it."""
    text = """transform gains() on n { shared(module) param d[n] = 1 return diag(d) }
    update rounds() {
      let S = 0 * W
      for i in 0..3 { param t[out, in] = 0 let S = S + t }
      return S
    }
    target linear { pre gains() pre gains() on in add rounds() }"""
    surgeon = surgery.apply(nn.Sequential(nn.Linear(6, 4)), surgery.parse(text.replace("linear", '"**"')))
    found = groups_of(surgeon, lr_d=0.25, lr_t=2.0, lr_t_2=3.0)
    assert {name: rate for name, (rate, _) in found.items()} == {"module-0-d": 0.25, "t": 2.0, "t_2": 3.0, "t_3": 2.0}


def test_a_saved_adapter_keeps_its_clauses(tmp_path: Path) -> None:
    _, surgeon = layer()
    surgeon.save(tmp_path / "a")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10))
    again = surgery.attach(model, tmp_path / "a")
    assert groups_of(again) == groups_of(surgeon)
    train(model, torch.optim.SGD(again.parameters(), lr=0.1))
    assert all(defect(t) < 1e-5 for t in kept(again))


# ------------------------------------------------------------------------------------------------------ retraction


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_step_of_any_optimiser_ends_on_the_manifold(kind: type) -> None:
    model, surgeon = layer()
    before = [t.detach().clone() for t in kept(surgeon)]
    tensors = kept(surgeon)
    optimiser = kind(list(surgeon.parameters()), lr=0.1)
    for _ in range(3):
        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = (model(torch.ones(2, 6)) - 1).square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    assert all(new is old for new, old in zip(kept(surgeon), tensors))
    assert all(defect(t) < 1e-5 for t in tensors)
    assert any((t - b).abs().max() > 1e-3 for t, b in zip(tensors, before))


def test_the_step_ends_at_the_nearest_point() -> None:
    model, surgeon = layer()
    (model(torch.ones(2, 6)) - 1).square().sum().backward()
    for t in surgeon.parameters():
        t.grad = torch.randn_like(t)
    wanted = []
    for t in kept(surgeon):
        assert t.grad is not None
        left, _, right = torch.linalg.svd((t - 0.1 * t.grad).detach().double(), full_matrices=False)
        wanted.append(left @ right)
    torch.optim.SGD(surgeon.parameters(), lr=0.1).step()
    for t, w in zip(kept(surgeon), wanted):
        torch.testing.assert_close(t.double(), w, rtol=0, atol=1e-6)


def test_a_step_of_ones_own_is_followed_by_retract() -> None:
    _, surgeon = layer()
    with torch.no_grad():
        for t in kept(surgeon):
            t.add_(0.3 * torch.randn_like(t))
    assert all(defect(t) > 1e-2 for t in kept(surgeon))
    surgeon.retract()
    assert all(defect(t) < 1e-5 for t in kept(surgeon))


def test_an_optimiser_of_other_parameters_moves_nothing() -> None:
    _, surgeon = layer()
    with torch.no_grad():
        for t in kept(surgeon):
            t.mul_(2)
    before = [t.detach().clone() for t in kept(surgeon)]
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(torch.equal(t, b) for t, b in zip(kept(surgeon), before))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_kept_on_the_manifold_too(copied) -> None:
    model, _ = layer()
    other = copied(model)
    train(other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1))
    found = [p for n, p in other.named_parameters() if n.endswith((".X", ".Y"))]
    assert len(found) == 4 and all(defect(p) < 1e-5 for p in found)


def test_what_diverged_stays_not_finite_and_raises_nothing() -> None:
    model, surgeon = layer()
    (model(torch.ones(2, 6)) * torch.nan).sum().backward()
    torch.optim.SGD(surgeon.parameters(), lr=0.1).step()
    assert not any(t.isfinite().all() for t in kept(surgeon))


def test_in_half_precision_it_is_as_near_as_the_dtype_allows() -> None:
    model, surgeon = layer(dtype=torch.bfloat16)
    train(model, torch.optim.SGD(surgeon.parameters(), lr=0.1))
    assert all(t.dtype == torch.bfloat16 and defect(t) < 3e-2 for t in kept(surgeon))


def test_of_a_stack_each_matrix_is_moved() -> None:
    stack = torch.randn(3, 5, 2)
    found = MANIFOLDS["stiefel"].retract(stack)
    for each, wanted in zip(found, stack):
        torch.testing.assert_close(each, MANIFOLDS["stiefel"].retract(wanted))
    assert defect(found) < 1e-5 < defect(stack)


def test_surgeries_in_company_are_kept_on_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10))
    surgeries = surgery.Surgeries(model)
    surgeries.add("one", surgery.parse(CLAUSES))
    surgeries.add("two", "lora")
    surgeon = surgeries.use("one", "two")
    assert surgeon is not None
    train(model, torch.optim.SGD(surgeon.parameters(), lr=0.1))
    assert all(defect(t) < 1e-5 for t in kept(surgeon))


def test_a_trainer_keeps_it_without_a_word(tmp_path: Path) -> None:
    from test_checkpoints import SMALL, trainer

    from surgery.models.demo import load_demo

    model = load_demo(SMALL)
    surgeon = surgery.apply(model, "polar", check=False)
    before = {n: t.detach().clone() for n, t in surgeon.named_tensors().items()}
    trainer(model, tmp_path / "a", surgeon.parameter_groups(lr=0.05)).train()
    moved = {n: t for n, t in surgeon.named_tensors().items() if n.endswith(("X", "Y"))}
    assert moved and all(defect(t) < 1e-5 and not torch.equal(t, before[n]) for n, t in moved.items())


def test_perturbed_values_merge_as_they_are() -> None:
    """The manifold is the optimiser's affair: the formula holds for any value."""
    model = nn.Sequential(nn.Linear(6, 8))
    surgeon = perturbed(model, surgery.parse(CLAUSES), check=False)
    x = torch.randn(3, 6)
    before = model(x)
    surgeon.merge()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
