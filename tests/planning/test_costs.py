"""Estimates: which program is chosen, what is said to run dense, and where the figures are shown."""

import json
from pathlib import Path

import pytest
import torch
from command import run
from each import in_turns
from formulas import IN, OUT, formula
from torch import nn

from surgery.codegen.candidates import by_tokens, frozen_alone
from surgery.codegen.compiled import Compiled
from surgery.codegen.cost_model import Cost, body_cost
from surgery.codegen.operation_counts import flops
from surgery.ir.expression import Expr
from surgery.ir.operations import make
from surgery.language.library import load, parse, shipped
from surgery.layers.kinds import EMBEDDING, LINEAR, LayerKind
from surgery.models.demo import load_demo
from surgery.planning.check import check
from surgery.planning.compile import compile
from surgery.planning.cost_estimates import Estimate
from surgery.planning.figures import Report
from surgery.runtime.apply import apply

METHODS = Path(__file__).parents[1] / "methods"
# What no structure of the compiler's makes cheap: entry-by-entry products, a full solve.
DENSE = {
    "an entrywise gate": "update own() {\n param G[out, in] = 0\n return W * G\n}\ntarget linear {\n add own()\n}",
    "a full rotation": "transform own() on n {\n param X[n, n] = 0\n return cayley(skew(X))\n}\n"
                       "target linear {\n post own()\n}",
    "a full update": "update own() {\n param G[out, in] = 0\n return G * G\n}\ntarget linear {\n add own()\n}",
}
CHEAP = ("lora", "dora", "pre_diag", "post_diag", "sora", "sora_reference", "oft", "loha", "lokr", "hra", "boft", "ia3")
OF_STD = ("householder(4)", "orthogonal(4)", "block_orthogonal(32)", "diagonal()", "magnitude()", "scale()",
          "skew_rotation(4)")


def estimate(text: str, tokens: int = 1024, kind: LayerKind = LINEAR) -> Estimate:
    found = formula(load(text) if text in shipped() else parse(text))
    return Estimate(Compiled(found, kind, found.changes_bias), tokens)


@pytest.mark.parametrize("name", CHEAP)
def test_a_structured_spec_has_a_cheap_program(name):
    assert not estimate(name).built and estimate(name).candidates[0].strategy != "built weight"


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("transform", OF_STD)
def test_so_has_every_transform_of_the_library_on_either_side(transform, side):
    spec = parse(f"target linear {{\n add low_rank(8)\n post {transform} on {side}\n}}")
    assert not Estimate(Compiled.supposed(formula(spec, IN, IN))).built


@pytest.mark.parametrize("name", DENSE)
def test_what_has_no_structure_is_told_with_what_it_builds(name):
    found = estimate(DENSE[name])
    assert found.built and min(found.built[0].shape) == OUT
    assert "x the frozen layer's" in found.cost_text


def test_the_choice_rests_on_the_tokens():
    wide = "target linear {\n add low_rank(256)\n}"
    assert estimate(wide, 64).candidates[0].strategy == "activations"
    assert estimate(wide, 100_000).candidates[0].strategy == "built weight"
    assert not estimate(wide, 100_000).built  # by choice, not for want of a cheap program


@pytest.mark.parametrize("name", ["lora", "boft", "glora", "miss_bat", "randlora", "vera"])
def test_the_cheapest_program_by_the_number_of_tokens(name):
    ranges = by_tokens(estimate(name).candidates)
    ends = [end for end, _ in ranges]
    assert ends == sorted(set(ends)) and ends[-1] == float("inf")
    for tokens in (0, 1, 10, 100, 1000, 10_000, 100_000):
        chosen = next(plan for end, plan in ranges if tokens <= end)
        assert chosen.cost(tokens).seconds() == pytest.approx(estimate(name, tokens).candidates[0].cost(tokens).seconds())


def test_a_set_up_is_made_again_where_it_holds_much_and_takes_little():
    assert all(estimate(name).candidates[0].recompute_cost is not None for name in ("loha", "c3a"))
    assert all(estimate(name).candidates[0].recompute_cost is None for name in ("lora", "oft", "hira", "fourierft"))


def test_a_small_constant_is_made_once_and_a_large_one_at_every_step():
    plain = next(each for each in estimate("c3a").candidates if each.strategy == "activations")
    assert [node.op for node in plain.fixed] == ["fourier"]
    ones = "update own() {\n param G[out, in] = 0\n return tanh(G + ones(out, in))\n}\ntarget linear {\n add own()\n}"
    assert not any(each.fixed for each in estimate(ones).candidates)


def test_the_frozen_layer_is_two_products():
    cost = body_cost(frozen_alone(LINEAR, OUT, IN), (True,), 10)
    assert cost.body_flops == cost.flops == 2 * (2 * 10 * OUT * IN)
    assert cost.moved == 2 * (10 * OUT + 10 * IN + OUT * IN)


# A step as a multiple of the frozen layer's, measured on one core: [1024, 1024], 512 tokens, float32, no dropout.
MEASURED = {"lora": 1.14, "dora": 1.22, "sora": 1.37, "oft": 1.33, "boft": 1.38, "gsoft": 1.84, "hra": 1.18, "loha": 1.34,
            "lokr": 1.44, "c3a": 1.52, "svft": 3.01, "vera": 1.56, "waveft": 2.39, "quanta": 2.54, "goft": 8.10}


@pytest.mark.parametrize("name", MEASURED)
def test_an_estimate_is_near_what_was_measured(name):
    spec = parse((METHODS / f"{name}.surg").read_text()) if name in ("quanta", "goft") else load(name)
    if "dropout" in [parameter.name for parameter in spec.params]:
        spec = load(name, dropout=0.0)
    found = Estimate(Compiled.supposed(formula(spec, 1024, 1024)), 512).ratio()
    assert MEASURED[name] / 1.5 < found < MEASURED[name] * 1.5


def contraction(equation: str, *shapes: tuple[int, ...]) -> Expr:
    return make("einsum", *(Expr("param", (), f"a.{i}", shape) for i, shape in enumerate(shapes)), data=(equation,))


def test_a_contraction_sums_over_an_axis_as_soon_as_nothing_behind_names_it():
    assert flops(contraction("ab,bc->ac", (2, 3), (3, 5)), 0) == 2 * 2 * 3 * 5
    assert flops(contraction("ab,bc,cd->ad", (2, 3), (3, 5), (5, 7)), 0) == 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7
    assert flops(contraction("ab,bc,bd->acd", (2, 3), (3, 5), (3, 7)), 0) == 2 * 2 * 3 * 5 + 2 * 2 * 3 * 5 * 7
    assert flops(contraction("ab->b", (2, 3)), 0) == 2 * 2 * 3


def test_numbers_that_lie_alone_cost_more_to_reach_than_those_in_a_row():
    x = Expr("param", (), "a.x", (64, 512))
    blocks = [flops(make("blocks", x, Expr("param", (), "a.s", (512 // k, k, k))), 0) - 2 * 64 * 512 * k
              for k in (2, 8, 32)]
    swaps = [flops(make("swap", x, data=(2, 2, 128 // inner, inner)), 0) for inner in (1, 8, 64)]
    for costs in (blocks, swaps):
        assert costs == sorted(costs, reverse=True) and costs[0] > 6 * costs[-1]
    assert flops(make("swap", x, data=(2, 1, 256, 1)), 0) == 64 * 512  # a view


def test_the_gradients_that_are_taken_are_counted():
    plan = estimate("lora").candidates[0]
    assert plan.needs == (True, True, True)
    costs = [body_cost(plan.written, needs, 1024) for needs in (plan.needs, (True, True, False), (True, False, False))]
    assert costs[0].flops > costs[1].flops > costs[2].flops and costs[0].calls > costs[2].calls


def test_an_embedding_is_looked_up_and_not_multiplied():
    cost = body_cost(frozen_alone(EMBEDDING, OUT, IN), (False,), 10)
    assert cost == Cost(moved=2 * 10 * IN, calls=1)
    adapted = estimate("target embedding {\n add low_rank(4)\n}", 10, EMBEDDING).candidates[0].cost(10)
    assert adapted.flops < 10 * 10 * 4 * IN


def test_what_carries_no_gradient_is_computed_once():
    plain = ("transform own() on n {{\n param m[n] = row_norm(W)\n return diag(m / {}row_norm(W){})\n}}\n"
             "target linear {{\n add low_rank(8)\n post own()\n}}")
    detached, trained = (estimate(plain.format(*marks)).candidates[0].cost() for marks in (("detach(", ")"), ("", "")))
    assert detached.setup_flops < trained.setup_flops


@pytest.mark.parametrize("spec", ["lora", "dora", "sora", "oft"])
def test_a_large_layer_costs_little_more(spec):
    found = Estimate(Compiled.supposed(formula(load(spec), 4096, 4096)), 4096)
    assert 1 < found.ratio() < 1.2


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_report_counts_is_the_program_that_the_adapter_runs(bias):
    surgeon = apply(nn.Sequential(nn.Linear(64, 96, bias=bias)), "sora", check=False)
    (estimate,), (adapter,) = surgeon.report().estimates, surgeon.adapters.values()
    assert estimate.candidates[0] is adapter.programs()[True].plan


def test_a_stack_is_built_for_every_matrix():
    lora = Compiled.supposed(formula(load("lora")))
    one, many = (Estimate(lora, 64, stack=n, builds=True).ratio() for n in (1, 8))
    assert Estimate(lora, 64).ratio() < one < many
    assert Estimate(lora, 64, stack=8).ratio() == Estimate(lora, 8).ratio() < many  # the tokens of each expert alone


def test_experts_that_are_built_are_told():
    model = load_demo("mixtral")
    assert not Report(compile(model, "lora")).fallbacks
    ratio = Report(compile(model, "lora")).step_ratio
    model.set_experts_implementation("deepgemm")
    report = Report(compile(model, "lora"))
    (warning,) = report.fallbacks
    assert warning.code == "dense-copy" and "set_experts_implementation" in warning.helps[0]
    assert report.memory["dense copies"] == 2 * 4 * (256 * 64 + 64 * 128) * 4 and report.step_ratio > ratio
    del model.config  # as of a user's class, which has no such choice
    for module in model.modules():
        vars(module).pop("config", None)
    assert not Report(compile(model, "lora")).fallbacks[0].helps


def test_weights_in_one_line_cost_the_same():
    report = Report(compile(load_demo("llama"), "lora"))
    assert "layers.{0..3}.mlp.up_proj" in str(report)
    vars(report)["rows"] = tuple(row._replace(step_ratio=9.5) if row.name.endswith("layers.3.mlp.up_proj") else row
                                 for row in report.rows)
    assert "step 9.50 x" in str(report) and "layers.{0..2}.mlp.up_proj" in str(report) and "9.50 x" in report._repr_html_()


def test_what_train_unfreezes_takes_memory_in_its_own_dtype():
    model = load_demo("gpt2").bfloat16()  # its embedding is its head, too
    surgeon = apply(model, parse(
        'spec s()\ntrain "**.wte.weight"\ntarget linear {\n  add low_rank(rank = 2, alpha = 2)\n}\n'), check=False)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert surgeon.report().memory["gradients and AdamW"] == 3 * trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["lora", "shira", "curlora", "unilora", "poet"])
def test_the_adapter_takes_what_its_tensors_do(spec: str, dtype: torch.dtype) -> None:
    """Places among them, whole numbers of 64 bits; of shared tensors each once."""
    surgeon = apply(load_demo("gpt2"), spec, dtype=dtype, check=False)
    tensors = {id(t): t.nbytes for adapter in surgeon.adapters.values() for t in adapter.tensors().values()}
    assert surgeon.report().bytes == sum(tensors.values()) == surgeon.report().memory["adapter"]


# ------------------------------------------------------------------------------------------------- where it is shown


def test_a_plan_has_a_ratio_for_each_module():
    found = json.loads(run("plan", "dora", "demo:mixtral", "--json").stdout)
    assert all(module["step_ratio"] > 1 for module in found["modules"])
    ratios = [module["step_ratio"] for module in found["modules"]]
    assert min(ratios) < found["step_ratio"] < max(ratios)


def test_a_report_warns_of_the_targets_that_run_dense():
    spec = parse(DENSE["an entrywise gate"].replace("target linear {", 'target linear "**.up_proj" {')
                 + '\ntarget linear "**.q_proj" {\n add low_rank(2)\n}')
    (warning,) = Report(compile(load_demo("llama"), spec)).fallbacks
    assert warning.span.line == 5 and "[128, 64]" in warning.notes[0]


def test_check_tells_it(tmp_path):
    """Without torch, says test_imports.py."""
    path = tmp_path / "gate.surg"
    path.write_text(DENSE["an entrywise gate"])
    assert [d.code for d in check(load(str(path)))] == ["fallback"]
    assert run("check", str(path)).exit_code == 0
    assert run("check", str(path), "--strict").exit_code == 1


TAKEN_APART = """update u(rank: int = 4) {
  {frozen} U[out, rank] = left_singular(W, rank)
  param M[rank, in] = 0
  return U @ M
}
target linear { add u() }"""


def test_what_follows_from_the_weight_alone_and_is_made_at_every_step_is_told():
    """A step of a singular value decomposition costs as many as the frozen layer's as one likes, and runs by thin factors."""
    let = TAKEN_APART.replace("{frozen} U[out, rank]", "let U")
    (told,) = check(parse(let))
    assert told.code == "fallback" and "left_singular(W, 4)" in told.notes[0] and "frozen param" in told.helps[0]
    assert check(parse(TAKEN_APART.replace("{frozen}", "frozen param"))) == []


def test_the_program_is_shown_with_what_it_was_chosen_over():
    result = run("show", "dora", "--program", "--tokens", "64", "--shape", "96,128")
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert any(line.startswith("activations") and line.endswith("runs") for line in lines)
    assert any(line.startswith("built weight") for line in lines)
    assert {"in training", "def once(layer, dtype):", "and the body in training, as one node of autograd"} <= set(lines)
    assert sum(line.startswith("def body") for line in lines) == 2  # with dropout and without


def test_the_costs_of_the_programs_are_data_too():
    found = json.loads(run("show", "lora", "--program", "--json").stdout)
    assert [c["strategy"] for c in found["programs"][0]["candidates"]] == ["activations", "built weight"]
    assert found["programs"][0]["shape"] == [1024, 4096]


@in_turns(3)
@pytest.mark.parametrize("name", shipped())
def test_every_shipped_spec_has_a_program_to_show(name):
    assert run("show", name, "--program", "--shape", "768,768").exit_code == 0


def test_sizes_without_the_program_are_refused():
    assert run("show", "lora", "--tokens", "3").exit_code == 2
