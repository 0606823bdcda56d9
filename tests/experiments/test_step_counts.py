"""What a step is counted to ask of a device: what operations move, and programs that were counted by hand."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from surgery.cli.main import main
from surgery.codegen.candidates import Candidate
from surgery.codegen.cost_model import Cost
from surgery.codegen.kernels import column_dot
from surgery.experiments.bench import Bench, bench
from surgery.experiments.step_counts import Counting, Layers
from surgery.language.library import load
from surgery.models.demo import load_demo

NUMBER = 4  # bytes
TOKENS, IN, OUT, RANK = 384, 160, 192, 8
X, Y, W, H = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT), torch.randn(OUT, IN), torch.randn(TOKENS, RANK)
A, B, BIAS, PLACES = torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(OUT), torch.arange(6, dtype=torch.int32)
x, y, w, h, a, b = (t.numel() for t in (X, Y, W, H, A, B))


@pytest.mark.parametrize("call, expected", [
    # views, and memory that is asked for and not filled
    (lambda: (X.T, X[3:], X.view(-1, 8), X.detach(), X.expand(2, -1, -1)), (0, 0, 0, 0)),
    (lambda: (torch.empty(5), X.new_empty(5), torch.empty_like(X)), (0, 0, 0, 0)),
    # what is made, changed in place, written over
    (lambda: X + 1, (1, x, x, 2 * x)),
    (lambda: X * X, (1, x, x, 2 * x)),
    (lambda: X.mul_(2.0), (1, x, x, 2 * x)),
    (lambda: torch.empty_like(X).copy_(X), (1, x, x, 2 * x)),
    (lambda: torch.empty_like(X).bernoulli_(0.5), (1, 0, x, x)),
    (lambda: torch.add(X, X, out=torch.empty_like(X)), (1, x, x, 2 * x)),
    # what is only made like a tensor does not read it
    (lambda: (X.new_zeros(5), torch.zeros_like(X)), (2, 0, 5 + x, x)),
    # a part of an activation, read in strides too; the buffer that is written is none
    (lambda: X.T[:, :TOKENS // 2] + 1, (1, x // 2, x // 2, x // 2)),
    (lambda: BIAS.expand(TOKENS, OUT) + 1, (1, OUT, y, 0)),
    # a thin product, whose term is read; a wide one, whose traffic is hidden, that of its term too
    (lambda: X @ A.T, (1, x + a, h, x)),
    (lambda: torch.addmm(Y, H, B.T), (1, y + h + b, y, 2 * y)),
    (lambda: Y.addmm_(H, B.T), (1, y + h + b, y, 2 * y)),
    (lambda: torch.addmm(BIAS, X, W.T), (1, OUT + x + w, y, 0)),
    (lambda: Y.addmm_(X, W.T), (1, y + x + w, y, 0)),
    (lambda: X.unflatten(1, (5, 32)).transpose(0, 1) @ W.view(-1)[:5 * 32 * 32].view(5, 32, 32),
     (1, x + 5 * 32 * 32, x, 2 * x)),
    # at places
    (lambda: embedding(PLACES, X), (1, 6 + 6 * IN, 6 * IN, 6 * IN)),
    (lambda: X.view(-1).index_put_((PLACES.long(),), torch.ones(6)), (3, 6 + 6 + 12 + 6, 12 + 6 + 6, 12)),
])
def test_what_an_operation_moves(call: Callable[[], Any], expected: tuple[int, ...]) -> None:
    with Counting((X, Y, H), Layers(1, 1.0, x, TOKENS)) as counting:
        call()
    count = counting.count
    assert (count.launches["forward"], *(n / NUMBER for n in (count.read, count.written, count.passed))) == expected


def test_steps_that_were_counted_on_paper():
    """Programs as they were when their passes were counted by hand, for a layer [256, 256] and 512 tokens."""
    at, bt, ct = torch.randn(256, 8), torch.randn(8, 256), torch.randn(8, 256)
    w, d, tokens = torch.randn(256, 256), torch.randn(256), torch.randn(512, 256)
    grad = tokens.clone()

    def lora() -> None:
        h = tokens @ at
        (tokens @ w).addmm_(h, bt, alpha=2.0)  # x once, y read and written
        back = grad @ bt.T  # g
        (grad @ w).addmm_(back, at.T)  # gx read and written
        (back.T @ tokens, h.T @ grad)  # x, and g once more

    def gain() -> None:
        y = tokens @ w
        y * d  # y read, its multiple written
        column_dot(grad, y)  # both read
        (y @ ct.T, y.addmm_(y @ ct.T, ct))  # read twice, read and written

    for program, expected in ((lora, 8), (gain, 8)):
        with Counting((tokens, grad), Layers(1, 1.0, tokens.numel(), len(tokens))) as counting:
            program()
        assert counting.count.passed / (NUMBER * tokens.numel()) == expected


# --------------------------------------------------------------------------------------------------------- a model


SMALLEST = "llama:num_hidden_layers=1"
NAMES = ("lora", "dora", "sora")


def small() -> PreTrainedModel:
    return load_demo("llama:hidden_size=256,intermediate_size=256,num_hidden_layers=1,num_key_value_heads=4")


@pytest.fixture(scope="module")
def ready() -> Bench:
    specs = {name: load(name, **({} if name == "lora" else {"dropout": 0.0})) for name in NAMES}
    return Bench(small(), specs, (4, 128), against_peft=True)


@pytest.fixture(scope="module")
def rows(ready) -> Mapping[str, Mapping[str, Any]]:
    return {row["name"]: row for row in ready.count_rows()}


def test_no_program_takes_more_passes_than_it_once_did(rows, ready):
    elsewhere = {row["name"]: row for row in ready.count_rows("cuda")}
    passes = {name: (rows[name]["passes"], elsewhere[name]["passes"]) for name in NAMES}
    # A GPU builds W' of layers as small as these where a set-up is as long as sora's, and passes over nothing more.
    assert passes == {"lora": (8, 6), "dora": (14, 10), "sora": (18, 0)}


def test_products_on_two_axes_act_where_they_are_thin_and_blocks_are_written_once():
    """LoKr's three factors in six passes (the third of them on a quarter of the numbers), and a block rotation's step
    in six, where there were thirty and ten; four narrow blocks on both sides as thin products in 16, where they took
    22."""
    ready = Bench(small(), {name: load(name) for name in ("lokr", "oft", "ether_plus")}, (4, 128))
    passes = {row["name"]: row.get("passes") for row in ready.count_rows("cuda")}
    assert passes["lokr"] <= 6 and passes["oft"] <= 6 and passes["ether_plus"] <= 16, passes


def test_set_ups_of_like_layers_are_few_launches_in_a_batch(rows):
    """Of the four layers of [256, 256], two and one."""
    ready = Bench(small(), {"sora": load("sora", dropout=0.0)}, (4, 128), batched_setups=True)
    alone, together = rows["sora"], ready.count_rows()[1]
    for part in ("setup_launches", "setup_backward_launches"):
        assert 7 < together[part] < alone[part] / 2, part
        assert alone[f"batched_{part}"] == together[part]
    assert together["passes"] == alone["passes"]


def test_each_part_has_its_launches(rows):
    frozen, lora, dora = rows["frozen"], rows["lora"], rows["dora"]
    assert frozen["setup_launches"] == frozen["setup_backward_launches"] == 0 and "passes" not in frozen
    assert lora["layers"] == 7 and lora["setup_launches"] == 0
    # x @ A and its rows in order, and its product with B into y; back, two products for gx, two for the factors with
    # their multiples, and what is in parts in order
    assert lora["forward_launches"] - frozen["forward_launches"] == 7 * 3
    assert 7 * 4 <= lora["backward_launches"] - frozen["backward_launches"] <= 7 * 8
    # k0 of `once` (two), a product with W and two with A, one over the rows (two), a sum, a root (two) and m / it
    assert dora["setup_launches"] == 7 * 11 and 7 <= dora["setup_backward_launches"] < dora["setup_launches"]


def test_a_turn_of_thin_factors_is_few_launches(rows):
    """A turn 15, its gradient 12; the rest is the products that a body of few passes reads."""
    assert (rows["sora"]["setup_launches"], rows["sora"]["setup_backward_launches"]) == (7 * 18, 7 * 20)


def test_a_block_rotation_is_made_by_one_solve_and_its_gradient_by_two_products():
    """With a difference and 2 I before the one, and a difference behind the others."""
    row = Bench(small(), {"oft": load("oft", block=8)}, (4, 128)).count_rows("cuda")[1]
    assert (row["setup_launches"], row["setup_backward_launches"]) == (7 * 3, 7 * 3)


def test_what_peft_does_is_counted_too(rows):
    assert rows["lora"]["peft_passes"] > rows["lora"]["passes"] and rows["lora"]["peft_bytes_read"] > 0
    assert "peft_passes" not in rows["sora"] and rows["sora"]["peft_note"] == "PEFT has no method with this formula"


def test_a_set_up_that_is_made_again_belongs_to_its_backward_pass(monkeypatch):
    counts = []
    for cost in (None, Cost()):
        monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan, cost=cost: cost))
        counts.append(bench(load_demo(SMALLEST), ["loha"], (1, 8), count=True)[1])
    held, made_again = counts
    assert held["forward_launches"] == made_again["forward_launches"]
    assert held["backward_launches"] == made_again["backward_launches"]
    assert held["setup_launches"] == made_again["setup_launches"] > 0
    assert made_again["setup_backward_launches"] == held["setup_backward_launches"] + held["setup_launches"]


def test_counting_needs_no_clock_and_leaves_the_model_alone():
    model = load_demo(SMALLEST)
    first, second = (bench(model, ["hra"], (1, 8), count=True) for _ in range(2))
    assert first == second
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for name, module in model.named_modules() if "embed" not in name)


# ------------------------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1"}).invoke(main, ["bench", "lora", "--model", f"demo:{SMALLEST}", "--tokens", "1,8",
                                                          "--target", "**.q_proj", *arguments])


def test_the_command_shows_the_same_rows():
    result = run("--count", "--json")
    assert json.loads(result.stdout)["rows"] == bench(
        load_demo(SMALLEST), {"lora": load("lora").retarget("**.q_proj")}, (1, 8), count=True)
    table = run("--count").stdout.split("\n\n")[1].splitlines()
    assert table[0].split() == ["parameters", "set-up", "batched", "forward", "backward", "read", "written", "passes"]
    assert [line.split()[0] for line in table[1:]] == ["frozen", "lora"]


def test_what_the_compiler_makes_is_not_counted():
    result = run("--count", "--compiled")
    assert result.exit_code and "counted on a CPU" in result.stderr and "Traceback" not in result.stderr
