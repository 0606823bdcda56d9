"""Frozen tensors that follow from a seed or from W are not saved, but made again and compared."""

import json
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import perturbed
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.analysis.saved_weights import opened_adapter
from surgery.diagnostics import SurgeryError, SurgeryWarning
from surgery.models.demo import load_demo
from surgery.planning.initial_values import follows
from surgery.runtime import remade
from surgery.runtime.remade import departure_from_summary, digest_of, summary_of

pytestmark = pytest.mark.usefixtures("folder")

SMALL = "llama:num_hidden_layers=2,hidden_size=32,intermediate_size=64"
SVFT = surgery.parse("""spec svft
update spectral() {
  frozen param U[out, min(out, in)] = left_singular(W, min(out, in))
  frozen param V[min(out, in), in] = right_singular(W, min(out, in))
  param m[min(out, in)] = 0
  return U @ diag(m) @ V
}
target linear { add spectral() }""")
#: Draws that are shared, places, what is made of both W and a draw, of a trained start, a number, places of W.
MIXED = surgery.parse("""spec mixed
update many() {
  frozen shared param S[2, in] ~ normal()
  param T[out, 2] ~ normal()
  frozen param at[3] ~ sample(of = in)
  frozen param R[2, 2] = S @ W.T @ T
  frozen param n = 3
  frozen param top_rows[4] = top(row_norm(W), 4)
  param k[2] = 0
  param v[4, 3] = 0
  return n * T @ diag(k) @ R @ S + rows(I(out), top_rows).T @ v @ rows(I(in), at)
}
target "**.q_proj", "**.down_proj" shifted { add many() }""")
RULES = {"svft": SVFT, "mixed": MIXED, "vera": "vera", "unilora": "unilora", "randlora": surgery.load("randlora", rank=4),
         "psoft": surgery.load("psoft", rank=4),
         "olora": "olora", "supertuning": "supertuning", "tinylora": "tinylora"}


def meta(folder: str = "a") -> dict:
    return json.loads(Path(folder, "meta.json").read_text())


def frozen_names(surgeon: surgery.Surgeon) -> set[str]:
    return {surgeon.name_of(p, leaf.key) for p in surgeon.plan.placed for leaf in p.formula.leaves if leaf.frozen}


def same(one: surgery.Surgeon, other: surgery.Surgeon) -> bool:
    first, second = one.state(), other.state()
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


def test_a_model_without_numbers_is_refused_before_they_are_read() -> None:
    perturbed(load_demo(SMALL), SVFT).save("a")
    with pytest.raises(SurgeryError, match="no numbers yet"):
        surgery.attach(load_demo(SMALL).to("meta"), "a")


@pytest.mark.parametrize("name", RULES)
def test_what_follows_is_left_out_and_comes_back_bit_for_bit(name: str) -> None:
    surgeon = perturbed(load_demo(SMALL), RULES[name], seed=3)
    surgeon.save("a")
    surgeon.save("whole", self_contained=True)
    held, frozen = load_file("a/adapter.safetensors"), frozen_names(surgeon)
    assert held.keys() == surgeon.state().keys() - frozen and meta()["remade"].keys() == frozen
    assert meta()["format_version"] == "2.0" and meta("whole")["format_version"] == "1.0"
    assert load_file("whole/adapter.safetensors").keys() == surgeon.state().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = surgery.attach(load_demo(SMALL), "a")
        assert same(again, surgeon) and same(surgery.attach(load_demo(SMALL), "whole"), surgeon)
    again.save("b")  # what was attached is saved as it was
    assert load_file("b/adapter.safetensors").keys() == held.keys() and meta("b")["remade"] == meta()["remade"]


def test_only_what_still_is_what_was_made_is_left_out() -> None:
    surgeon = perturbed(load_demo(SMALL), SVFT)
    first, *others = sorted(frozen_names(surgeon))
    with torch.no_grad():
        surgeon.named_tensors()[first].view(-1)[5] += 1e-7
    surgeon.save("a")
    assert first in load_file("a/adapter.safetensors") and meta()["remade"].keys() == {*others}
    assert same(surgery.attach(load_demo(SMALL), "a"), surgeon)
    surgeon = perturbed(load_demo(SMALL), "vera")
    surgeon.load({n: t.bfloat16() for n, t in surgeon.state().items()})
    surgeon.save("b")
    assert "remade" not in meta("b") and meta("b")["format_version"] == "1.0"


def test_what_does_not_follow_from_one_module_alone_is_saved() -> None:
    spec = surgery.parse("""spec s
    update u() on bias { frozen param c[out] = b  param k = 0  return k * c }
    update v() {
      frozen shared param F[out, 2] = left_singular(W, 2)
      frozen param G[2, in] = F.T @ W
      param k[2] = 0
      return F @ diag(k) @ G
    }
    target "**.q_proj" { add v() add u() }""")
    plan = surgery.plan(load_demo("bert:num_hidden_layers=1"), spec.retarget("**.query"))
    assert [follows(p) for p in plan.placed] == [{}]


@pytest.mark.parametrize("what", ["seed", "W", "dtype", "digest"])
def test_other_numbers_are_refused_and_the_model_is_as_it_was(what: str) -> None:
    perturbed(load_demo(SMALL), "vera" if what == "seed" else SVFT).save("a")
    model, about = load_demo(SMALL), meta()
    if what == "seed":
        about["seed"] = 1
    elif what == "digest":
        for said in about["remade"].values():
            said["digest"], said["sums"] = "0" * 32, summary_of(torch.randn(said["shape"]))["sums"]
    elif what == "W":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.0001)
    else:
        model = model.bfloat16()
    Path("a/meta.json").write_text(json.dumps(about))
    kinds, state = [*map(type, model.modules())], {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="not-remade") as refused:
        surgery.attach(model, "a")
    text = str(refused.value)
    assert "self_contained=True" in text and ("load the base model in float32" in text) is (what == "dtype")
    assert ("which is not the one that it was trained on" in text) is (what == "W")
    assert [*map(type, model.modules())] == kinds
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_a_base_in_a_wider_dtype_is_rounded_as_it_was() -> None:
    surgeon = perturbed(load_demo(SMALL).bfloat16(), SVFT)
    surgeon.save("a")
    wide = load_demo(SMALL).bfloat16().float()
    again = surgery.attach(wide, "a")
    assert same(again, surgeon)
    exact = surgery.attach(load_demo(SMALL), "a")  # whose numbers bfloat16 rounds to those
    assert same(exact, surgeon)


def test_what_is_off_by_rounding_is_told_where_the_base_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed(load_demo(SMALL), SVFT).save("a")
    made = remade.again
    monkeypatch.setattr(remade, "again", lambda *of: {k: t.detach() * (1 + 1e-7) for k, t in made(*of).items()})
    with pytest.warns(SurgeryWarning, match="not-remade.*28 frozen tensors.*differ by rounding"):
        surgeon = surgery.attach(load_demo(SMALL), "a")
    assert [w.code for w in surgeon.plan.warnings] == ["not-remade"]
    with pytest.raises(SurgeryError, match="differ by rounding"):
        surgery.attach(load_demo(SMALL), "a", strict=True)
    about = meta()
    for form in about["base_weights"]:
        about["base_weights"][form] = about["base_weights"]["model.layers.0.mlp.up_proj.weight"]
    Path("a/meta.json").write_text(json.dumps(about))
    with pytest.raises(SurgeryError, match="comes out otherwise"):  # another base: no tolerance
        surgery.attach(load_demo(SMALL), "a")


@pytest.mark.parametrize("change", ["one", "sign", "columns", "rotation", "noise"])
def test_the_sums_see_what_the_digest_sees(change: str) -> None:
    tensor = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))).Q.contiguous()
    other = tensor.clone()
    if change == "one":
        other[7, 3] += 0.1
    elif change == "sign":
        other[:, 5] *= -1
    elif change == "columns":
        other[:, [2, 3]] = other[:, [3, 2]]
    elif change == "rotation":
        other[:, :2] = other[:, :2] @ torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    else:
        other += 1e-3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    said, wanted = summary_of(tensor), float((other - tensor).norm() / tensor.norm())
    assert departure_from_summary(said, tensor.clone()) == 0 and digest_of(other) != said["digest"]
    assert wanted / 2 < departure_from_summary(said, other) < 2 * wanted
    assert departure_from_summary(said, tensor.bfloat16()) == departure_from_summary(said, tensor.T.contiguous()) == float("inf")
    assert departure_from_summary(summary_of(torch.arange(5)), torch.arange(5) + 1) == float("inf")


def test_adapters_of_before_attach_as_before_and_rules_need_their_version() -> None:
    surgeon = perturbed(load_demo(SMALL), "vera")
    surgeon.save("a", self_contained=True)
    assert "remade" not in meta() and "torch_version" not in meta()
    assert same(surgery.attach(load_demo(SMALL), "a"), surgeon)
    surgeon.save("a")
    Path("a/meta.json").write_text(json.dumps({**meta(), "format_version": "1.0"}))
    with pytest.raises(SurgeryError, match="lacks . tensors"):
        surgery.attach(load_demo(SMALL), "a")


@pytest.mark.parametrize("fault", ["sums", "digest", "unknown", "huge"])
def test_what_a_folder_says_is_checked(fault: str) -> None:
    perturbed(load_demo(SMALL), "vera").save("a")
    about = meta()
    name, said = next(iter(about["remade"].items()))
    if fault == "unknown":
        trained = next(n for n in about["tensors"] if n.endswith(".d"))
        about["remade"][trained] = {**said, **about["tensors"].pop(trained)}
        tensors = load_file("a/adapter.safetensors")
        save_file({n: t for n, t in tensors.items() if n != trained}, "a/adapter.safetensors")
    elif fault == "huge":
        spec = Path("a/adapter.surg")
        text = spec.read_text().replace("A[rank, in]", "A[100000, in]")
        spec.write_text(text.replace("diag(d) @ A", "diag(d) @ columns(A.T, rank).T"))
    else:
        said[fault] = "x"
    Path("a/meta.json").write_text(json.dumps(about))
    messages = {"unknown": "cannot be made again", "huge": "numbers, and the adapter"}
    with pytest.raises(SurgeryError, match=messages.get(fault, "lacks, or has wrongly: remade")):
        surgery.attach(load_demo(SMALL), "a")


def test_more_than_there_is_room_for_is_saved() -> None:
    wide = surgery.parse("""spec wide
    update u() { frozen param X[5 * out, in] ~ normal()  param k = 0
                 return k * columns(X.T, out).T }
    target "**.q_proj", "**.k_proj", "**.v_proj", "**.o_proj" { add u() }""")
    model = nn.ModuleDict({f"{n}_proj": nn.Linear(8, 8, bias=False) for n in "qkvo"})
    surgeon = surgery.apply(model, wide, check=False)
    surgeon.save("a")
    assert "remade" not in meta()


@pytest.mark.parametrize("name", ["svft", "mixed", "vera"])
def test_files_are_merged_and_measured_from_rules(name: str) -> None:
    model = load_demo(SMALL)
    model.save_pretrained("base")
    surgeon = perturbed(model, RULES[name])
    surgeon.save("a")
    surgeon.save("whole", self_contained=True)
    done = surgery.merge_files("a", "merged", "base")
    surgery.merge_files("whole", "wanted", "base")
    assert not done.in_memory
    one, other = load_file("merged/model.safetensors"), load_file("wanted/model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
    for update, wanted in zip(opened_adapter("a", "base").updates(), opened_adapter("whole", "base").updates()):
        (mine,), (theirs,) = update.load(), wanted.load()
        parts = ([mine.delta], [theirs.delta]) if isinstance(mine.delta, torch.Tensor) else (mine.delta, theirs.delta)
        assert all(torch.equal(x, y) for x, y in zip(*parts))


def test_adapters_one_after_the_other_are_made_of_the_base() -> None:
    load_demo(SMALL).save_pretrained("base")
    for folder, spec in (("a", SVFT), ("b", "tinylora")):
        surgeon = perturbed(load_demo(SMALL), spec)
        surgeon.save(folder)
        surgeon.save(f"{folder}-whole", self_contained=True)
    surgery.merge_files("a", "merged", "base", then=["b"])
    surgery.merge_files("a-whole", "wanted", "base", then=["b-whole"])
    one, other = load_file("merged/model.safetensors"), load_file("wanted/model.safetensors")
    assert all(torch.equal(t, other[n]) for n, t in one.items())


def test_a_merge_into_files_of_another_base_is_refused() -> None:
    perturbed(load_demo(SMALL), SVFT).save("a")
    load_demo(SMALL, seed=1).save_pretrained("other")
    with pytest.raises(SurgeryError, match="not-remade"):
        surgery.merge_files("a", "merged", "other")
    assert not Path("merged").exists()


@pytest.mark.parametrize("name", ["svft", "unilora"])
def test_checkpoints_hold_what_trains_and_know_the_rest(name: str) -> None:
    model = load_demo(SMALL)
    surgeon = perturbed(model, RULES[name], seed=2)
    deepcopy(model).save_pretrained("c")  # a copy knows it too
    state = load_file("c/model.safetensors")
    assert state.keys() == (surgeon.state().keys() - frozen_names(surgeon)) | {"surgery.remade"}
    assert same(surgery.attach(load_demo(SMALL), "c"), surgeon)
    other = load_demo(SMALL)
    again = surgery.apply(other, RULES[name], check=False, seed=2)
    assert other.load_state_dict(state).missing_keys == [] and same(again, surgeon)
    if name == "unilora":
        third = load_demo(SMALL)
        surgery.apply(third, "unilora", check=False, seed=3)
        before = {n: t.clone() for n, t in third.state_dict().items()}
        for more in ({}, load_demo(SMALL).state_dict()):
            with pytest.raises(SurgeryError, match="seed=2"):
                third.load_state_dict({**more, **state}, strict=False)
        assert all(torch.equal(t, before[n]) for n, t in third.state_dict().items())
    again.load({n: torch.zeros_like(t) if n in state else t for n, t in again.state().items()})
    other.load_state_dict({**load_demo(SMALL).state_dict(), **state})
    assert same(again, surgeon)
    model.save_pretrained("d", self_contained=True)
    assert load_file("d/model.safetensors").keys() == surgeon.state().keys()


def test_the_stack_saves_rules_and_reads_them() -> None:
    surgeon = perturbed(load_demo(SMALL), SVFT)
    surgeon.save("a")
    surgeries = surgery.Surgeries(load_demo(SMALL))
    surgeries.add("one", Path("a"))
    surgeries.use("one")
    surgeries.save("one", "b")
    assert meta("b")["remade"] == meta()["remade"]


def test_a_gpus_singular_vectors_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU what follows from W is held, and draws, which the CPU makes, are not."""
    from surgery.layers.survey import Site

    surgeon = perturbed(load_demo(SMALL), "tinylora")
    names = frozen_names(surgeon)
    monkeypatch.setattr(Site, "device", property(lambda site: torch.device("meta")))
    made = remade.made_by_rule(surgeon)
    assert {n.rpartition(".")[2] for n in names} == {"A", "B", "P"}
    assert {n.rpartition(".")[2] for n in made} == {"P"}


def test_what_takes_minutes_to_decompose_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    surgeon = perturbed(load_demo(SMALL), "tinylora")
    assert remade.made_by_rule(surgeon) == surgeon.made and len(surgeon.made) == 3 * 14
    monkeypatch.setattr(remade, "LONG", 1e5)
    assert {n.rpartition(".")[2] for n in remade.made_by_rule(surgeon)} == {"P"}


def test_what_rounding_decides_is_saved() -> None:
    """Vectors of equal singular values, the order of equal rows: another number of threads gives others."""
    spec = surgery.parse("""spec s
    update u() {
      frozen param U[out, 4] = left_singular(W, 4)
      frozen param S[out, 4] ~ normal()
      frozen param R[4, 4] = U.T @ S
      frozen param at[3] = top(row_norm(W), 3)
      param k[4] = 0
      param v[3, 4] = 0
      return S @ diag(k) @ R @ S.T @ W + rows(I(out), at).T @ v @ U.T @ W
    }
    target linear { add u() }""")
    model = nn.ModuleDict({name: nn.Linear(6, 8, bias=False) for name in ("plain", "twice", "narrow")})
    half = torch.randint(-9, 9, (4, 6), generator=torch.Generator().manual_seed(0)) / 4
    model["twice"].weight.data = torch.cat([half, half])
    model["narrow"].weight.data = torch.arange(1, 9)[:, None] * half[:1]  # of rank 1: three vectors are anything
    surgery.apply(model, spec, check=False).save("a")
    left_out = {name.split(".")[0] + "." + name.rpartition(".")[2] for name in meta()["remade"]}
    assert {n for n in left_out if n.startswith("plain")} == {"plain.U", "plain.S", "plain.R", "plain.at"}
    assert {n for n in left_out if n.startswith("narrow")} == {"narrow.S", "narrow.at"}
    assert {n for n in left_out if n.startswith("twice")} == {"twice.U", "twice.S", "twice.R"}


def test_what_was_made_of_a_rounded_base_is_saved_from_a_wider_one() -> None:
    surgeon = perturbed(load_demo(SMALL).bfloat16(), SVFT)
    surgeon.save("a")
    surgery.attach(load_demo(SMALL), "a").save("b")
    assert "remade" not in meta("b") and same(surgery.attach(load_demo(SMALL), "b"), surgeon)


def test_an_adapter_that_has_changed_its_dtype_holds_all() -> None:
    """`meta.json` has one dtype, which what is made again is rounded to."""
    surgeon = perturbed(load_demo(SMALL), surgery.parse("""spec s
    update u() {
      param v[4, 2] = 0
      frozen param S[2, in] ~ normal()
      frozen param at[4] = top(row_norm(W), 4)
      return rows(I(out), at).T @ v @ S
    }
    target linear { add u() }"""))
    surgeon.load({n: t.bfloat16() if n.endswith(".v") else t for n, t in surgeon.state().items()})
    surgeon.save("a")
    assert "remade" not in meta() and same(surgery.attach(load_demo(SMALL), "a"), surgeon)


def test_numbers_of_a_double_adapter_are_made_in_double() -> None:
    spec = surgery.parse("spec s\nupdate u() { frozen param c[out] = 1 / 3  param k = 0  return k * diag(c) @ W }\n"
                         "target linear { add u() }")
    surgery.apply(load_demo(SMALL).double(), spec, dtype=torch.float64).save("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.attach(load_demo(SMALL).double(), "a")
