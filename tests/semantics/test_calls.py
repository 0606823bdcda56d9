"""Definitions that call others: the formula is that of the text written out, and each call has parameters of its own."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.editor.document import Document
from surgery.editor.names import occurrences
from surgery.ir.dense import dense
from surgery.ir.expression import Formula
from surgery.language.library import parse
from surgery.language.tree import Binary, Call, Definition, Spec, Target, add
from surgery.planning.check import check
from surgery.semantics.resolved_spec import resolved

CALLING = """
spec calling()
update mine(rank: int = 4, k: int = 2) {
  let U = low_rank(rank, alpha = 8)
  param g[out] = 1
  return diag(g) @ turned(k, n = out) @ U @ turned(1, n = in) + low_rank(1) + U
}
transform turned(k: int) on n : orthogonal { return orthogonal(k) @ reflections() }
transform reflections() on n : orthogonal { return householder(1) }
target linear { add mine(3)
  post turned(1) on in }
"""
WRITTEN_OUT = """
spec written_out()
update mine() {
  param A[3, in] ~ kaiming_uniform(a = sqrt(5))
  param B[out, 3] = 0
  param g[out] = 1
  param C[out, 2] ~ kaiming_uniform(a = sqrt(5), mode = "fan_out")
  param D[out, 2] = C
  param U[out, 1] ~ normal(std = 1)
  param V[out, 1] = U
  param C2[in, 1] ~ kaiming_uniform(a = sqrt(5), mode = "fan_out")
  param D2[in, 1] = C2
  param U2[in, 1] ~ normal(std = 1)
  param V2[in, 1] = U2
  param A2[1, in] ~ kaiming_uniform(a = sqrt(5))
  param B2[out, 1] = 0
  let X = 8 / 3 * (B @ A)
  return diag(g) @ (cayley(C @ D.T - D @ C.T) @ (reflect(U) @ reflect(V).T)) @ X
    @ (cayley(C2 @ D2.T - D2 @ C2.T) @ (reflect(U2) @ reflect(V2).T)) + 16 * (B2 @ A2) + X
}
transform turned() on n {
  param C[n, 1] ~ kaiming_uniform(a = sqrt(5), mode = "fan_out")
  param D[n, 1] = C
  param U[n, 1] ~ normal(std = 1)
  param V[n, 1] = U
  return cayley(C @ D.T - D @ C.T) @ (reflect(U) @ reflect(V).T)
}
target linear { add mine()
  post turned() on in }
"""


def formula(text: str, out: int = 6, in_: int = 4) -> Formula:
    (_, found), = resolved(parse(text)).formulas(out, in_)
    return found


def codes(body: str, kind: str = "update own()") -> list[tuple[str, str]]:
    text = f"spec s()\n{kind} {{ {body} }}\ntarget linear {{ {'pre' if 'transform' in kind else 'add'} own() }}"
    return [(d.code, d.message) for d in check(parse(text), tried=False)]


def test_a_stack_that_starts_at_one_matrix_is_told_how():
    (error,) = (d for d in check(parse("transform own(k: int = 2) on n { param S[n / k, k, k] = I(k) return block_diag(S) } "
                                       "target linear { pre own() }")) if d.severity == "error")
    fixed = error.helps[0].partition("`")[2].rstrip("`")
    text = f"transform own(k: int = 2) on n {{ param S[n / k, k, k] = {fixed} return block_diag(S) }} target linear {{ pre own() }}"
    assert error.code == "shape-mismatch" and check(parse(text)) == []


def test_it_is_what_the_text_written_out_is():
    calling, written = formula(CALLING), formula(WRITTEN_OUT)
    assert [leaf.shape for leaf in calling.leaves] == [leaf.shape for leaf in written.leaves]
    generator = torch.Generator().manual_seed(0)
    weight, values = torch.randn(6, 4, dtype=torch.float64, generator=generator), []
    for leaf in calling.leaves:
        values.append(torch.randn(leaf.shape, dtype=torch.float64, generator=generator))
    results = [dense(each.weight, {"weight": weight, **{leaf.key: v for leaf, v in zip(each.leaves, values)}})
               for each in (calling, written)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert {claim.owner for claim in calling.claims} == {"turned", "reflections", "orthogonal", "householder"}
    assert check(parse(CALLING)) == []


def test_each_call_has_names_of_its_own():
    keys = [leaf.key for leaf in formula(CALLING).leaves]
    assert keys[:4] == ["add_mine-low_rank.A", "add_mine-low_rank.B", "add_mine.g", "add_mine-turned-orthogonal.C"]
    assert keys[-6:-4] == ["add_mine-low_rank_2.A", "add_mine-low_rank_2.B"]
    assert keys[-1] == "post_turned-reflections-householder.V" and len({*keys}) == len(keys)


def test_which_side_of_an_if_holds_renames_nothing():
    text = """spec s()
    update own(k: int) {
      return (if k > 1 then low_rank(1) else low_rank(2)) + low_rank(3)
    }
    target linear { add own(%s) }"""
    names = [[leaf.key.partition("-")[2] for leaf in formula(text % k).leaves][::2] for k in (1, 2)]
    assert names == [["low_rank_2.A", "low_rank_3.A"], ["low_rank.A", "low_rank_3.A"]]


def test_a_tree_built_of_one_node_twice_is_what_its_text_says():
    call = Call("low_rank")
    own = Definition(kind="update", name="own", result=Binary("+", call, call))
    spec = Spec("s", definitions=[own], targets=[Target(add("own"), kind="linear")])
    assert len(formula(spec.to_surg()).leaves) == 4
    (_, found), = resolved(spec).formulas()
    assert len(found.leaves) == 4


def test_an_adapter_trains_is_saved_and_put_on_again(tmp_path):
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))

    operated, x = model(), torch.randn(5, 4)
    surgeon = surgery.apply(operated, parse(CALLING))
    for parameter in (p for p in operated.parameters() if p.requires_grad):
        parameter.data.normal_()
    operated(x).square().sum().backward()
    assert all(p.grad is not None for p in operated.parameters() if p.requires_grad)
    surgeon.save(tmp_path / "adapter")
    again = model()
    surgery.attach(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x), operated(x), rtol=0, atol=0)


@pytest.mark.parametrize(("body", "kind", "code", "words"), [
    ("return own()", "update own()", "definition-cycle", "`own` comes to call itself"),
    ("return if false then own() else 0 * W", "update own()", "", ""),
    ("return if out > 9 then own() else 0 * W", "update own()", "definition-cycle", "`own` comes to call itself"),
    ("return orthogonal(2) @ W", "update own()", "missing-argument", "here orthogonal needs its side: `n = out`"),
    ("return orthogonal(2, n = 1 / 2 * out) @ W", "update own()", "shape-mismatch", "inner dimensions"),
    ("return orthogonal(2, n = 0) @ W", "update own()", "bad-value", "must be at least 1"),
    ("return orthogonal(m = out) @ W", "update own()", "unknown-argument", "orthogonal has no argument `m`"),
    ("return low_rank(rank = W)", "update own()", "wrong-type", "`rank` is of type int"),
    ("return low_rank(0)", "update own()", "check-failed", "`check rank >= 1` is not met"),
    ("return shift()", "update own()", "wrong-kind", "shift is added to a bias, and `own` is not"),
    ("return 2 * shift()", "update own() on bias", "", ""),
    ("param A[out, in] = low_rank(2) return A", "update own()", "wrong-kind", "a start is made once"),
    ("let U = low_rank(2) param A[out, in] = U return A", "update own()", "", ""),
    ("param d[n] = 1 return magnitude() @ diag(d)", "transform own() on n", "", ""),
    ("param A[out, low_rank(2)] = 0 return A @ A.T", "update own()", "wrong-type", "a dimension must be a whole number"),
    ("check low_rank(2) return W", "update own()", "wrong-type", "a check is of compile-time values"),
    ("return diagonl()", "transform own() on n", "unknown-primitive", "unknown primitive `diagonl`"),
])
def test_mistakes(body, kind, code, words):
    found = codes(body, kind)
    assert (not found) if not code else code in found[0][0] and words in found[0][1]


def test_a_start_may_call_what_has_no_parameters():
    text = """spec s()
    update part(k: int) { return left_singular(W, k) @ left_singular(W, k).T @ W }
    update own() { frozen param M[out, in] = part(2)
      param A[out, in] = M
      return A - M }
    target linear { add own() }"""
    assert [leaf.key for leaf in formula(text).leaves] == ["add_own.M", "add_own.A"]


def test_square_definitions_are_square_where_they_are_called():
    text = """spec s()
    update square() { check out == in
      param K[in, in] = 0
      return K @ W }
    update own() { return square() @ I(out) }
    target linear { add own() }"""
    assert check(parse(text), tried=False) == []


def test_a_mistake_is_told_once_with_where_it_is_called():
    text = "spec s()\nupdate wrong() { return W.T }\nupdate own() { return wrong() + wrong() }\ntarget linear { add own() }"
    assert [d.code for d in check(parse(text))] == ["shape-mismatch"]
    (told,) = check(parse("spec s()\nupdate own() { return low_rank(0) }\ntarget linear { add own() }"))
    assert [words for _, words in told.related] == ["called here"]


def test_what_has_a_primitives_name_is_the_primitive():
    text = "spec s()\ntransform reflect() on n { param U[n, 2] = 1 return reflect(U) }\ntarget linear { pre reflect() }"
    assert check(parse(text), tried=False) == []


@pytest.mark.parametrize(("bodies", "calls"), [
    (["return {next} + {next}"] * 12, "comes to more than 100 calls of definitions"),
    (["return {next}"] * 60, "too deep in one another"),
    (["return " + "(0 * W + " * 40 + "{next}" + ")" * 40] * 6, "too deep in one another"),
])
def test_calls_have_a_bound(bodies, calls):
    """2^12 updates in one are no formula, and neither is what Python's own stack does not hold."""
    names = [f"u{i}" for i in range(len(bodies))]
    definitions = [f"update {name}() {{ {body.format(next=f'{following}()')} }}"
                   for name, following, body in zip(names, [*names[1:], "low_rank"], bodies)]
    found = check(parse("\n".join(["spec s()", *definitions, "target linear { add u0() }"])))
    assert {d.code for d in found} == {"too-large"} and any(calls in d.message for d in found)


def test_an_editor_knows_what_is_called():
    found = [each for each in occurrences(Document("s.surg", CALLING)) if each.name in ("low_rank", "alpha", "n")]
    kinds = {(each.name, each.kind, each.home) for each in found}
    assert {("low_rank", "definition", ""), ("alpha", "local", "low_rank()"), ("n", "local", "turned()")} <= kinds
