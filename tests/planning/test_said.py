"""What `check` and JSON say of a spec beside its errors: descriptions, draws without names, what never trains."""

import json
from collections import Counter

import pytest
import torch

import surgery
from surgery.language.library import parse
from surgery.language.tree import Definition, Parameter, Spec
from surgery.planning import numeric_check
from surgery.planning.check import check
from surgery.planning.formulas import formula_lines, formulas

TEXT = """# What it is.
#
# Two lines: # and a sign.
spec t(
  # How many columns.
  rank: int = 8,
)

# What is chosen.
select s = "**.q"

# not this

# An update.
update u(rank: int = 2) {
  # It is positive.
  check rank > 0
  # The first factor.
  param A[rank, in] ~ kaiming_uniform()  # not this
  param B[out, rank] = 0
  # Their product.
  let x = B @ A
  return x
}

# Here it goes.
target linear s {
  # It goes on top.
  add u(rank)
}
"""


def docs(node) -> list[str]:
    inner = [getattr(node, name) for name in ("params", "selects", "definitions", "checks", "body", "targets", "steps")
             if hasattr(node, name)]
    return [node.doc, *(doc for part in inner for each in part for doc in docs(each))]


def test_json_keeps_the_descriptions():
    spec = parse(TEXT)
    again = Spec.model_validate_json(spec.model_dump_json())
    assert again == spec and docs(again) == docs(spec)
    assert len(list(filter(None, docs(again)))) == 9
    assert again.doc == "What it is.\n\nTwo lines: # and a sign."
    assert docs(parse(again.to_surg())) == docs(spec)
    assert Spec.model_validate_json(again.model_dump_json()).model_dump_json() == spec.model_dump_json()


def test_json_has_no_description_where_there_is_none():
    assert "doc" not in parse("target linear { add low_rank() }").model_dump_json()


def test_the_schema_knows_descriptions():
    schema = Spec.model_json_schema()
    assert "doc" in schema["properties"] and "doc" in schema["$defs"]["Param"]["properties"]


@pytest.mark.parametrize("doc", ["one\ntwo", "one\r\ntwo", "one\rtwo", "", " ", "\x85", "# sharp", "a\n\n b"])
def test_any_text_is_a_description(doc):
    spec = Spec(definitions=(Definition(kind="update", name="u", result="W", doc=doc),))
    text = spec.to_surg()
    assert parse(text) == spec
    lines = [line.strip() for line in doc.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    assert parse(text).definitions[0].doc == "\n".join(lines).strip("\n")


@pytest.mark.parametrize("doc", [3, None, ["a"]])
def test_a_description_is_text(doc):
    with pytest.raises(surgery.SurgeryError):
        Parameter.model_validate_json(json.dumps({"name": "a", "type": "int", "doc": doc}))


# ------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("text", "name"), [
    ("update u { param in[4] = 0 return 0 * W }", "in"), ("update u { let out = 3 return 0 * W }", "out"),
    ("update u { let W = 0 return W }", "W"), ("update u on bias { param b[out] = 0 return b }", "b"),
    ("update u(in: int = 3) { param A[out, in] = 0 return A }", "in"),
    ("transform t on in { return I(in) }", "in"), ("transform t on n { param out[n] = 1 return diag(out) }", "out"),
    ("spec a(in: int = 3) target linear { add low_rank(in) }", "in"),
    ("spec a(layer: int = 3) target linear { add low_rank(layer) }", "layer"),
])
def test_a_name_that_has_a_meaning_is_given_to_nothing_else(text, name):
    """The meaning outweighed what a spec said, or the other way round, and nobody was told."""
    (error,) = check(parse(text))
    assert error.code == "duplicate-name" and error.message.startswith(f"`{name}` is the ") and error.span


@pytest.mark.parametrize("text", ["update u { param b[out] = 0 return diag(b) @ W }", "transform t on b { return I(b) }",
                                  "spec a(W: int = 3, b: int = 2) target linear { add low_rank(W + b) }"])
def test_a_name_without_a_meaning_there_is_free(text):
    assert [d for d in check(parse(text)) if d.severity == "error"] == []


@pytest.mark.parametrize(("draw", "is_told"), [
    ("normal(0.02)", True), ("uniform(0)", True), ("kaiming_uniform(2)", True), ("normal(0, 0.02)", False),
    ("normal(std = 0.02)", False), ("normal()", False), ("xavier_normal(2)", False), ("normal(mean = 1)", False)])
def test_one_argument_without_a_name_is_told(draw, is_told):
    found = check(parse(f"update u {{ param A[4, in] ~ {draw}  param B[out, 4] = 0  return B @ A }}\n"
                        "target linear { add u() }"))
    assert ["unnamed-argument"] * is_told == [d.code for d in found]


# ------------------------------------------------------------------------------------------------- never trains

# Bodies of updates, and whether one of their parameters has a gradient where they start.
BODIES = {
    "both factors zero": ("param A[4, in] = 0 param B[out, 4] = 0 return B @ A", False),
    "one factor zero": ("param A[4, in] ~ normal() param B[out, 4] = 0 return B @ A", True),
    "the other one zero": ("param A[4, in] = 0 param B[out, 4] ~ normal() return B @ A", True),
    "a square": ("param A[out, in] = 0 return A * A", False),
    "a square and a part of its own": ("param A[out, in] = 0 return A * A + A", True),
    "three factors, two zero": ("param A[4, in] = 0 param g = 0 param B[out, 4] ~ normal() return g * (B @ A)", False),
    "a gate": ("param A[4, in] ~ normal() param g = 0 param B[out, 4] ~ normal() return g * (B @ A)", True),
    "detached": ("param A[out, in] ~ normal() return detach(A) - detach(A)", False),
    "only a frozen factor is not zero":
        ("param A[4, in] = 0 param B[out, 4] = 0 frozen param F[4, 4] ~ normal() return B @ F @ A", False),
    "times zero": ("param A[out, in] = 0 return 0 * A", False),
    "a sine": ("param A[out, in] = 0 return sin(A)", True),
    "a cosine less one": ("param A[out, in] = 0 return cos(A) - 1", False),
    "an entry that one column alone reaches": ("param d[in] = 0 param B[out, in] ~ normal() return B @ diag(d)", True),
    "a start that is another's":
        ("param A[out, 2] ~ normal() param B[out, 2] = A return (B - A) @ (B - A).T @ W", False),
    "one that starts as the other":
        ("param A[out, 2] ~ normal() param B[out, 2] = A return (B - A) @ ones(2, in)", True),
    "all frozen": ("frozen param A[out, in] = 0 return A", True),
}


@pytest.mark.parametrize(("body", "trains"), BODIES.values(), ids=BODIES)
def test_what_never_trains_is_told(body, trains):
    spec = parse(f"update u {{ {body} }}\ntarget linear {{ add u() }}")
    assert ("never-trains" in [d.code for d in check(spec)]) is not trains


@pytest.mark.parametrize(("body", "trains"), BODIES.values(), ids=BODIES)
def test_what_is_told_is_true_of_a_training(body, trains):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    surgeon = surgery.apply(model, parse(f"update u {{ {body} }}\ntarget linear {{ add u() }}"))
    trained = [p for p in surgeon.parameters() if p.requires_grad]
    loss = model(torch.randn(5, 6)).square().sum()
    if loss.requires_grad:
        loss.backward()
    moves = any(p.grad is not None and bool((p.grad.abs() > 1e-4).any()) for p in trained)
    assert moves is trains or not trained


def test_a_transform_that_stays_the_identity():
    text = "transform t on n { param A[n, n] = 0 return I(n) + A @ A }\ntarget linear { pre t() }"
    assert "never-trains" in [d.code for d in check(parse(text))]


def test_a_bias_that_stays_zero():
    text = "update t on bias { param a[out] = 0 return a * a }\ntarget linear { add t() }"
    assert "never-trains" in [d.code for d in check(parse(text))]


def test_each_target_is_told_of():
    both = "update u { param A[4, in] = 0 param B[out, 4] = 0 return B @ A }\n"
    found = check(parse(f'{both}target "**.a" {{ add u() }}\ntarget "**.b" {{ add low_rank() }}\n'
                        'target "**.c" { add u() add low_rank() }\ntarget "**.d" { add u() }'))
    assert [d.code for d in found] == ["never-trains"] * 2


@pytest.mark.parametrize("name", ["lora", "sora", "pissa", "vera", "glora"])
def test_specs_that_ship_train(name):
    assert not {d.code for d in check(surgery.load(name))} & {"never-trains", "unnamed-argument"}


SHOWN = """spec s(scale: float = 1)
update u(k: float = 1) {
  param X[4, in] ~ kaiming_uniform()
  param Y[out, 4] = 0
  param Z[in, 4] = 0
  return k * (Y @ X) + 3.14159 / in * (Y @ X) + (Z @ Y.T).T.T.T - 0.5 * out * (Y @ X) + (0 - 1) * (Y @ X)
}
transform m() on n {
  param m[n] = row_norm(W)
  return diag(m / row_norm(W))
}
target linear { add u(scale)
  post m()
  post m() }
"""


def test_a_formula_is_said_without_what_says_nothing():
    """No factor 1, nothing turned twice, no fraction that was a float, and each symbol for one thing."""
    ((target, formula),) = formulas(parse(SHOWN))
    lines = formula_lines(target, formula)
    text = "\n".join(lines)
    assert "1 Y X" not in text and "ᵀᵀ" not in text and "3.14159" in text and "884279719003555" not in text
    assert "(Z Yᵀ)ᵀ" in text and "-Y X" in text
    declared = [line.split()[0] for line in lines[1:]]
    assert max(Counter(declared).values()) == 1 and {"X", "Y", "Z"} <= {*declared}


def test_what_runs_dense_on_one_form_of_a_weight_is_told():
    """On a square weight it is thin beside what it acts on, and on a tall one it is not."""
    text = """spec s()
    update u() {
      param A[in, in] = 0
      return if out == in then 0 * W else sigmoid(W @ A) - sigmoid(0 * W)
    }
    target linear { add u() }"""
    assert "fallback" in [d.code for d in check(parse(text))]


def test_what_runs_dense_is_named_by_its_parameters():
    """Of the matrices that every step makes one that trains, though sigmoid(W) and its product are costlier."""
    text = """spec s()
    update u() { param m[out] = 0
      return diag(m) @ (sigmoid(W) @ W.T @ W) + sigmoid(diag(m) @ W) - sigmoid(0 * W) }
    target linear { add u() }"""
    (told,) = [d for d in check(parse(text)) if d.code == "fallback"]
    assert told.notes[0].startswith("every step makes scale(") and "m" in told.notes[0].partition("scale")[2]


def test_a_layer_that_is_the_culprit_is_named():
    text = 'spec s() target "**.q" { add low_rank(%s) }'
    assert check(parse(text % "layer + 1")) == []
    (told,) = check(parse(text % "layer"))
    assert told.code == "untested" and told.message.startswith("with layer = 0 this target fits no weight, whatever")
    assert told.notes == ("`check rank >= 1` is not met",) and "`if layer ...`" in told.helps[0]


def test_claims_on_large_sides_are_tried_once(monkeypatch):
    """A matrix that takes seconds is made once for a claim, and R Rᵀ not at all where random vectors show no defect."""
    sizes = []
    monkeypatch.setattr(numeric_check, "LARGE", 90)
    monkeypatch.setattr(numeric_check, "PROPERTIES", {"orthogonal": numeric_check.Property(
        "", lambda r: sizes.append(len(r)) or numeric_check._unorthogonal(r))})
    text = """spec s()
    transform turn() on n : orthogonal { check n > 90
      param Q[n, 2] = 0
      param R[n, 2] ~ normal(std = 1)
      return cayley(Q @ R.T - R @ Q.T) }
    transform %s
    target linear { post turn() }"""
    assert check(parse(text % "bent() on n { return I(n) }")) == [] and len(sizes) == 1
    defect = numeric_check._unorthogonal(torch.eye(100, dtype=torch.float64).index_fill(1, torch.tensor([7]), 1e-4))
    assert defect > 0.9
