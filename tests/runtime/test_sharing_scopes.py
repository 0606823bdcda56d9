"""One tensor for several modules: of a layer, of a model, of a module's steps; of the size of its largest user."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diagnosed import errors_of
from models import perturbed
from torch import Tensor, nn

import surgery
from surgery.language.to_python import python_text

SCOPES = """spec scopes(rank: int = 2)

update tied(rank: int = 2) {
  shared(layer) param A[rank, in] ~ kaiming_uniform(a = sqrt(5))
  frozen shared(model) param B[out, rank] ~ normal(std = 0.5)
  shared param g = 1
  param d[rank] = 0
  return g * (B @ diag(d) @ A)
}

target linear "**.{q,v}" {
  add tied(rank)
}

target linear "**.{up,down}" {
  add tied(rank)
}
"""
# LoReFT on a layer's output: R acts on the weight and on the bias.
REFT = """spec reft(rank: int = 2)

transform intervene(rank: int = 2) on n {
  shared(module) param R[rank, n] ~ orthogonal()
  param A[rank, n] = 0
  return I(n) + R.T @ A
}

update moved_by(rank: int = 2) on bias {
  shared(module) param R[rank, out] ~ orthogonal()
  param c[rank] = 0
  return R.T @ c
}

target linear "**.down" {
  pre intervene(rank) with bias
  add moved_by(rank)
}
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 12), nn.Linear(8, 6)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) + self.q(x)[..., :8] + torch.nn.functional.pad(self.v(x), (0, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def operated(text: str = SCOPES, **more) -> tuple[Model, surgery.Surgeon]:
    found = model()
    return found, perturbed(found, surgery.parse(text), dtype=torch.float64, example=X, **more)


# --------------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize("text", [SCOPES, REFT])
def test_a_scope_is_one_thing_in_text_json_and_python(text: str) -> None:
    spec = surgery.parse(text)
    assert spec.to_surg() == text
    assert surgery.Spec.model_validate_json(spec.model_dump_json()) == spec
    scope: dict = {}
    exec(python_text(spec), scope)
    assert scope["spec"] == spec
    assert surgery.check(spec) == []


def test_shared_alone_is_the_scope_of_a_target() -> None:
    text = "update u() { frozen shared(target) param A[2, in] ~ normal() param B[out, 2] = 0 return B @ A }"
    assert surgery.parse(text) == surgery.parse(text.replace("(target)", ""))
    assert "frozen shared param A" in surgery.parse(text).to_surg()


def faults(body: str, targets: str = 'target linear "**" { add u() }') -> list:
    text = f"update u() {{ {body} }} {targets}"
    return errors_of("", lambda _: surgery.apply(model(), surgery.parse(text), check=False))


@pytest.mark.parametrize(("body", "code", "says"), [
    ("shared(model) param A[out, in] = 0 * W return A", "wrong-kind", "this start is made of what each has by itself"),
    ("param B[out, in] = 0 shared(layer) param A[out, in] = B return A", "wrong-kind", "what each has by itself"),
    ("shared(model) param A[out, in] = 0 * ones(out, in) return A", "unlike-shared", "its start is said in two ways"),
    ("shared(layer) param A[out, 2] = if in > 8 then 1 else 2 param B[2, in] = 0 return A @ B", "unlike-shared",
     "its start"),
    ("shared(layer) param A[out, 2] ~ normal(std = 1 / in) param B[2, in] = 0 return A @ B", "unlike-shared",
     "its start"),
    ("shared(model) param A[out, 2] ~ orthogonal() on stiefel param B[2, in] = 0 return A @ B", "unlike-shared",
     "is needed in 4 sizes, and a part of a matrix `on stiefel` is not on it"),
    ("shared param A[2] ~ normal(std = 1 / in) param B[out, 2] = 0 return B @ diag(A) @ ones(2, in)", "unlike-shared",
     "its start"),
    ("frozen shared param at[2] = top(col_norm(W), 2) param C[out, 2] = 0 return C @ rows(I(in), at)", "unlike-shared",
     "its start"),
    ("shared(planet) param A[out, in] = 0 return A", "syntax", "expected"),
    ("shared(layer) shared(layer) param A[out, in] = 0 return A", "syntax", "expected"),
])
def test_what_cannot_be_one_tensor(body: str, code: str, says: str) -> None:
    found = faults(body)
    assert [d.code for d in found][:1] == [code] and says in found[0].message


@pytest.mark.parametrize(("first", "second", "what"), [
    ("= 0", "= 1", "its start"), ("= 0", "~ normal()", "its start"), ("= 0 rate 2", "= 0", "its rate"),
    ("= 0 no decay", "= 0", "`no decay`"),
])
@pytest.mark.parametrize("apart", [True, False], ids=["two targets", "two steps"])
def test_what_two_definitions_say_in_two_ways(first: str, second: str, what: str, apart: bool) -> None:
    text = (f"update u() {{ shared(model) param A[out, in] {first} return A }} "
            f"update v() {{ shared(model) param A[out, in] {second} return A }} ")
    text += ('target "**.q" { add u() } target "**.v" { add v() }' if apart else 'target "**.q" { add u() add v() }')
    found = errors_of("", lambda _: surgery.apply(model(), surgery.parse(text), check=False))
    assert found[0].code == "unlike-shared" and f"{what} is said in two ways" in found[0].message
    assert found[0].related


@pytest.mark.parametrize(("first", "second", "what"), [
    ("frozen shared(model) param A[out] = 0 return A", "shared(model) param A[out] = 0 return A", "`frozen`"),
    ("shared(model) param A[out, 2] = 0 return A @ ones(2, 1) @ ones(1, in) @ ones(in)",
     "shared(model) param A[out] = 0 return A", "the number of dimensions"),
])
def test_frozen_and_dimensions_must_agree_too(first: str, second: str, what: str) -> None:
    first = first.replace(" @ ones(in)", "")
    text = (f"update u() {'on bias ' if 'frozen' in first else ''}{{ {first} }} update v() on bias {{ {second} }} "
            'target "**.q" { add u() add v() }')
    found = errors_of("", lambda _: surgery.apply(model(), surgery.parse(text), check=False))
    assert any(d.code == "unlike-shared" and what in d.message for d in found)


@pytest.mark.parametrize(("said", "what"), [
    ("= place", "its start"), ("~ normal(std = place + 1)", "its start"), ("= 0 rate place + 1", "its rate"),
    ("= W rate place + 1", "its rate")])
def test_what_a_layer_says_otherwise_than_another(said: str, what: str) -> None:
    """Silently, one of the two would count for both. A start that names W is that of the first module."""
    text = (f"update u(place: float) {{ shared param A[out, in] {said} return A }} "
            'target "**.{q,v}" shifted { add u(layer) }')
    found = errors_of("", lambda _: surgery.apply(model(), surgery.parse(text), check=False))
    assert all(d.code == "unlike-shared" and f"{what} is said in two ways" in d.message for d in found)
    first = text.replace(said, "= place * W") if "W" in said else text.replace("layer", "1")
    surgery.apply(model(), surgery.parse(first), check=False)


def test_a_module_outside_of_all_layers_has_no_tensor_of_its_layer() -> None:
    text = "update u() { shared(layer) param A[out, in] = 0 return A } target linear { add u() }"
    with pytest.raises(surgery.SurgeryError, match="stands in no list of layers"):
        surgery.apply(nn.ModuleDict({"one": nn.Linear(2, 2)}), surgery.parse(text), check=False)


def test_show_says_who_shares() -> None:
    from surgery.planning.formulas import formula_lines, formulas

    both = surgery.parse(SCOPES + REFT.partition("\n\n")[2])
    said = "\n".join(line for pair in formulas(both) for line in formula_lines(*pair))
    for words in ("shared by the modules of a layer", "frozen, shared by all modules", "shared by the modules of the "
                  "target", "shared by the steps of the module"):
        assert words in said


# ----------------------------------------------------------------------------------------------------------- tensors


def test_one_tensor_for_each_layer_and_one_for_the_model_of_the_largest_size() -> None:
    _, surgeon = operated()
    shared = {n.removeprefix("shared_surgery."): tuple(t.shape) for n, t in surgeon.named_tensors().items()
              if n.startswith("shared_surgery")}
    assert shared == {"layer-layers-0-A": (2, 16), "layer-layers-1-A": (2, 16), "model-B": (16, 2),
                      "0-add_tied-g-": (1,), "1-add_tied-g-": (1,)}
    assert surgeon.plan.trainable == sum(p.numel() for p in surgeon.parameters()) == 2 * 32 + 8 * 2 + 2
    assert surgeon.plan.frozen == 32
    assert [n for n, p in surgeon.model.named_parameters() if n.startswith("shared") and not p.requires_grad] == [
        "shared_surgery.model-B"]


def dense(surgeon: surgery.Surgeon, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + g B d A of each module, from the tensors as they are held."""
    found = {}
    for index, placed in enumerate(surgeon.plan.placed):
        name = placed.site.name
        layer, target = name.split(".")[1], 0 if name[-1] in "qv" else 1
        out, in_ = placed.site.out, placed.site.in_
        a = tensors[f"shared_surgery.layer-layers-{layer}-A"][:, :in_]
        b = tensors["shared_surgery.model-B"][:out]
        d, g = tensors[f"{name}.weight_surgery.add_tied.d"], tensors[f"shared_surgery.{target}-add_tied-g-"]
        found[f"{name}.weight"] = placed.site.weight.detach() + g * (b @ torch.diag(d) @ a)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_the_dense_formula(training: bool) -> None:
    found, surgeon = operated()
    found.train(training)
    held = {n: t.detach().clone().requires_grad_() for n, t in surgeon.named_tensors().items()}
    wanted = torch.func.functional_call(model(), dense(surgeon, held), (X,))
    y = found(X)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    direction = torch.randn(y.shape, dtype=y.dtype)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    for name, tensor in surgeon.named_tensors().items():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, held[name].grad, rtol=1e-10, atol=1e-12)
    surgeon.merge()
    torch.testing.assert_close(found(X), wanted, rtol=1e-10, atol=1e-12)


def test_a_weight_and_its_bias_share_one_tensor() -> None:
    found, surgeon = operated(REFT)
    names = [n for n in surgeon.named_tensors() if n.endswith("-R")]
    assert names == [f"shared_surgery.module-layers-{i}-down-R" for i in (0, 1)]
    values = surgeon.adapters["layers.0.down"].values()
    assert set(values) == {"shared.R", "pre_intervene.A", "add_moved_by.c"}
    r, a, c = values["shared.R"], values["pre_intervene.A"], values["add_moved_by.c"]
    (down, *_), (operated_down, *_) = ([b.down for b in m.blocks()] for m in (model(), found))
    through = torch.eye(8, dtype=torch.float64) + r.T @ a
    x = torch.randn(3, 16, dtype=torch.float64)
    wanted = x @ (through @ down.weight).T + through @ down.bias + r.T @ c
    torch.testing.assert_close(operated_down(x), wanted, rtol=1e-10, atol=1e-12)
    direction = torch.randn(3, 8, dtype=torch.float64)
    (theirs,) = torch.autograd.grad((wanted * direction).sum(), r, retain_graph=True)
    (ours,) = torch.autograd.grad((operated_down(x) * direction).sum(), r)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_two_steps_of_a_module_may_need_it_in_two_sizes() -> None:
    text = """update rows() { shared(module) param A[out, 2] ~ normal() param B[2, in] = 0 return A @ B }
    update columns() { shared(module) param A[in, 2] ~ normal() param C[out, 2] = 0 return C @ A.T }
    target "**.up" { add rows() add columns() }"""
    _, surgeon = operated(text)
    shapes = [tuple(t.shape) for n, t in surgeon.named_tensors().items() if n.endswith("-A")]
    assert shapes == [(16, 2)] * 2
    values = surgeon.adapters["layers.0.up"].values()
    assert torch.equal(values["shared.A"][:8], values["shared.A#2"])


TWO_SIDES = """spec both()
transform around(scale: float = 1) on n {
  shared(module) param C[n, 2] ~ normal()
  shared(module) param D[n, 2] = 0
  return expm(scale * (C @ D.T - D @ C.T))
}
transform there_and_back() on n : symmetric { return around() + around(scale = -1) - I(n) }
"""


@pytest.mark.parametrize("steps, codes", [
    ("pre there_and_back() pre there_and_back() on in", []),
    ("pre around() pre around(scale = -1) on in", []),
    ("pre around(scale = 2) pre there_and_back() pre around() on in", []),
    ("add low_rank(2) post around() post around() on in", []),
])
def test_check_tries_what_steps_share_in_two_sizes(steps: str, codes: list[str]) -> None:
    """Of its numbers they had one tensor for both sizes, and a claim that rests on the sharing was refuted."""
    found = surgery.check(surgery.parse(f"{TWO_SIDES} target linear {{ {steps} }}"), prove=True)
    assert [d.code for d in found if d.severity == "error"] == codes, found


def test_what_cannot_be_one_tensor_of_two_sizes_is_told_by_check() -> None:
    text = """transform turn() on n : orthogonal { shared(module) param R[n, n] ~ orthogonal() on stiefel return R }
    target linear shifted { pre turn() pre turn() on in }"""
    assert not surgery.check(surgery.parse(text))  # for square weights alone
    narrow = text.replace("pre turn() on in", "check_wide() on in").replace("target", """
    transform check_wide() on n : orthogonal { shared(module) param R[2 * n, 2 * n] ~ orthogonal() on stiefel
      return rows(R, n) @ columns(I(2 * n), n) } target""").replace("check_wide() on in", "pre check_wide() on in")
    assert "unlike-shared" in [d.code for d in surgery.check(surgery.parse(narrow))]


def test_the_draw_rests_on_the_seed_and_the_name_alone() -> None:
    """Whoever shares it, in whatever order the modules stand."""
    one, two = (surgery.apply(model(), surgery.parse(text), check=False, seed=3).state()["shared_surgery.model-B"]
                for text in (SCOPES, SCOPES.replace("{q,v}", "{v,q}")))
    other = surgery.apply(model(), surgery.parse(SCOPES), check=False, seed=4).state()["shared_surgery.model-B"]
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_names_with_hyphens_are_not_one_tensor() -> None:
    found = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a-b": nn.Linear(4, 4)})
    text = "update u() { shared(module) param A[out, in] = 0 return A } target linear { add u() }"
    surgeon = surgery.apply(found, surgery.parse(text), check=False)
    assert len(surgeon.named_tensors()) == 2 == len(list(surgeon.parameters()))


# ------------------------------------------------------------------------------------------------------------- verbs


@pytest.mark.parametrize("text", [SCOPES, REFT])
def test_saved_it_is_attached(text: str, tmp_path: Path) -> None:
    found, surgeon = operated(text)
    surgeon.save(tmp_path / "a")
    other = model()
    again = surgery.attach(other, tmp_path / "a")
    assert torch.equal(other(X), found(X))
    assert set(again.named_tensors()) == set(surgeon.named_tensors())
    wanted = found(X).detach()
    surgeon.merge()
    torch.testing.assert_close(found(X), wanted)
    surgeon.unmerge()
    assert torch.equal(deepcopy(found)(X), found(X))
    surgeon.remove()
    assert list(found.state_dict()) == list(model().state_dict())


def test_in_company_each_surgery_has_its_own(tmp_path: Path) -> None:
    alone, surgeon = operated(SCOPES, seed=1)
    surgeon.save(tmp_path / "a")
    wanted = alone(X).detach()
    found = model()
    surgeries = surgery.Surgeries(found)
    surgeries.add("one", tmp_path / "a")
    surgeries.add("two", surgery.parse(SCOPES), seed=2, dtype=torch.float64)
    surgeries.use("one", "two")
    torch.testing.assert_close(found(X), wanted, rtol=1e-10, atol=1e-12)  # the second starts at 0
    held = dict(found.get_submodule("shared_surgery").named_parameters())
    assert {n.partition(":")[0] for n in held} == {"one", "two"} and len(held) == 10
    surgeries.mix({"one": 1.0, "two": 0.5})
    torch.testing.assert_close(found(X), wanted, rtol=1e-10, atol=1e-12)


def test_fused_experts_share_one_tensor_with_what_stands_beside_them() -> None:
    from surgery.models.demo import load_demo

    found = load_demo("mixtral:num_hidden_layers=1")
    text = """update u() { shared(model) param A[2, in] ~ normal(std = 0.1) param B[out, 2] = 0 return B @ A }
    target any "**.{q_proj,experts.gate_up_proj,experts.down_proj}" { add u() }"""
    surgeon = perturbed(found, surgery.parse(text), check=True)
    (name,) = [n for n in surgeon.named_tensors() if n.startswith("shared_surgery")]
    widest = max(p.site.in_ for p in surgeon.plan.placed)
    assert tuple(surgeon.named_tensors()[name].shape) == (2, widest)


def test_one_graph_of_a_compiler_gives_the_same() -> None:
    found, surgeon = operated()
    torch._dynamo.reset()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), found(X), rtol=1e-10, atol=1e-12)
