"""A body with its gradients written out: values and gradients of the plain body, and no more kept than they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from case import update
from formulas import formula
from layers import LAYOUTS, Operated, Tower, assert_close, gradients, operated, perturb
from torch import Tensor, nn
from zoo import CASES

from surgery.codegen import apply_to_activations, autograd_node, dropout_number, kernels, masks, program
from surgery.codegen.aliases import MemoryUse
from surgery.codegen.autograd_node import step
from surgery.codegen.candidates import Candidate
from surgery.codegen.compiled import Compiled
from surgery.codegen.cost_model import Cost
from surgery.codegen.emit import emitted
from surgery.codegen.program import Program
from surgery.codegen.program_text import step_text
from surgery.codegen.schedule import Region
from surgery.codegen.supposed_device import runs_as_on, steps_of
from surgery.experiments.timing import peak_bytes
from surgery.ir.builders import times
from surgery.ir.expression import Expr, walk
from surgery.ir.operations import PRIMITIVES, is_whole, make
from surgery.ir.sizes import TOKENS
from surgery.language.library import load, parse
from surgery.runtime.adapter import Adapter
from surgery.runtime.apply import apply

EXACT = 1e-10
WIDE = LAYOUTS["linear 12x18"]
on_every_case = pytest.mark.parametrize("case", CASES, ids=str)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, autograd sees every part of a body."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "is_traced", lambda: True)
        yield


def outputs(op: Operated, leaves: dict[str, Tensor], x: Tensor, seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    y = op.model(x)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    return {"the output": y.detach(), **(gradients(y, direction, leaves) if y.requires_grad else {})}


def programs(adapter: Adapter, dtype: torch.dtype) -> dict[bool, Program]:
    """Those that run for a layer in a dtype, by whether it trains."""
    return adapter.programs((runs_as_on("cpu"), dtype))


def agree(op: Operated, leaves: dict[str, Tensor], x: Tensor) -> None:
    """Each program that was found for the layer, not the chosen one alone, gives what its plain body gives."""
    running = programs(op.adapter, op.weight.dtype)
    best = running[True]
    for each in (best, *best.over):
        running[True] = each
        assert step(each.plan.written, (True, *(not is_whole(value) for value in each.plan.values))), "it has a step"
        found = outputs(op, leaves, x)
        with plainly():
            wanted = outputs(op, leaves, x)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(found[key], value, EXACT, f"{key} by {each.strategy}")


@on_every_case
def test_it_is_the_plain_body(case):
    op = operated(case, WIDE)
    agree(op, {**op.input(), **op.parameters}, op.x)
    x = op.input()
    agree(op, {**x, **op.parameters}, x["x"])


def test_some_columns_and_rows_of_what_acts_by_itself():
    """A Toeplitz matrix, whose gradient is put back among zeros on both sides."""
    case = update("toeplitz", None, None, "param h[out + in] = 0",
                  "columns(rows(circulant(reshape(h, 1, 1, out + in)), out), in)")
    op = operated(case, WIDE)
    best = programs(op.adapter, op.weight.dtype)[True]
    assert "activations" in {each.strategy for each in (best, *best.over)}
    x = op.input()
    agree(op, {**x, **op.parameters}, x["x"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_cancels_in_a_body_leaves_its_step_whole(device):
    """(P + Q) D + (P - Q) D reads no Q any more, which the step is given all the same."""
    case = update("undone", None, None, "param P[out, 2] = 0\nparam Q[out, 2] = 0\nparam D[2, in] ~ normal()",
                  "(P + Q) @ D + (P - Q) @ D")
    op = operated(case, WIDE)
    x = op.input()
    with steps_of(device):
        agree(op, {**x, **op.parameters}, x["x"])


@on_every_case
def test_the_step_of_a_gpu_in_plain_operations(case):
    """The frozen product is summed last, and gains beside low-rank terms are one operation."""
    op = operated(case, WIDE)
    x = op.input()
    with steps_of("cuda"):
        agree(op, {**x, **op.parameters}, x["x"])


@on_every_case
def test_a_set_up_that_is_made_again(case, monkeypatch):
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: Cost()))
    op = operated(case, WIDE)
    for x in (op.input(), {}):
        agree(op, {**x, **op.parameters}, x.get("x", op.x))
    few = dict(list(op.parameters.items())[::2])
    for key, tensor in op.parameters.items():
        tensor.requires_grad_(key in few and tensor.is_floating_point())
    agree(op, {key: tensor for key, tensor in few.items() if tensor.is_floating_point()}, op.x)


@on_every_case
def test_each_choice_of_what_takes_a_gradient(case):
    op = operated(case, WIDE)
    for one in (tensor for tensor in op.parameters.values() if tensor.is_floating_point()):
        for tensor in op.parameters.values():
            tensor.requires_grad_(tensor is one)
        agree(op, op.parameters, op.x)


@pytest.mark.parametrize("name", ["lora", "dora", "sora"])
def test_dropout_has_the_same_mask_in_both(name):
    case = next(case for case in CASES if case.name == name)
    op = operated(case, WIDE, dropout=0.4)
    x = op.input()
    agree(op, {**x, **op.parameters}, x["x"])


# --------------------------------------------------------------------------------------------- what stays in memory


def kept(run: Callable[[], Tensor], model: nn.Module) -> list[tuple]:
    """The shapes and dtypes of what a forward pass saves, tensors that the model holds anyway left out."""
    found: dict[int, Tensor] = {}
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sorted((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in found.values() if t.numel() > 8 * 192)


OWN = """
transform quarter_turn() on n {
  param d[n] = 1
  param e[n] = 0
  return diag(d) + diag(e) @ kron(I(n / 64), kron([[0, -1], [1, 0]], I(32)))
}
update gate() {
  param A[2, in] ~ normal()
  param B[out, 2] = 0
  return W * (B @ A)
}"""


def saved(steps: str) -> list[tuple]:
    """What a layer [256, 192] saves of 40 tokens, thin tensors left out."""
    model = Tower(nn.Linear(192, 256))
    apply(model, parse(f'spec s()\n{OWN}\ntarget linear "**" {{ {steps} }}'))
    perturb(model)
    x = torch.randn(40, 192, requires_grad=True)
    return kept(lambda: model(x), model)


IN, OUT = ((40, 192), "float32"), ((40, 256), "float32")


@pytest.mark.parametrize(("steps", "expected"), [
    ("add low_rank(2)", [IN]),
    ("pre diagonal()", [OUT]),
    ("pre diagonal() on in", [IN]),
    ("pre block_orthogonal(8) on in", [IN]),
    ("pre householder(2) on in", [IN]),
    ("add low_rank(2) dropout(0.1)", [IN]),  # and the places of the few that are dropped
    ("add low_rank(2)  post magnitude()", [IN, OUT]),
    ("pre diagonal() on in  add low_rank(2)  post diagonal() on in", [IN]),
    ("post quarter_turn()", [OUT]),  # what moves entries is no value of its own
])
def test_an_activation_is_kept_only_where_a_gradient_needs_it(steps, expected):
    assert saved(steps) == expected


@pytest.mark.parametrize("core", ["B @ R @ diag(d) @ A", "B @ diag(d) @ R.T @ A", "(A.T @ diag(d) @ R @ B.T).T",
                                  "2 * (B @ (R * R @ diag(d)) @ A)"])
@pytest.mark.parametrize("sizes", [(192, 256), (256, 192)])
def test_a_small_trained_factor_between_frozen_ones_keeps_no_wide_activation(core, sizes):
    model = Tower(nn.Linear(*sizes))
    apply(model, parse(f"""spec s()
        update own() {{
          frozen param B[out, 3] ~ normal()
          frozen param A[3, in] ~ normal()
          param R[3, 3] = 0
          param d[3] = 1
          return {core}
        }}
        target linear "**" {{ add own() }}"""))
    assert kept(lambda: model(torch.randn(40, sizes[0], requires_grad=True)), model) == []


def test_nothing_of_a_set_up_is_kept_that_is_made_again(monkeypatch):
    gate = "add gate()"
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: None))
    assert len(saved(gate)) > 1
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: Cost()))
    assert saved(gate) == [IN]


def test_a_set_up_is_made_again_as_it_was_made_under_autocast(monkeypatch):
    found = []
    for cost in (None, Cost()):
        monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan, cost=cost: cost))
        model = Tower(nn.Linear(192, 256))
        apply(model, parse(f'spec s()\n{OWN}\ntarget linear "**" {{ add gate() post quarter_turn() }}'), seed=1)
        perturb(model)
        tensors = dict(model.named_parameters())
        for tensor in tensors.values():
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(tensor.numel()))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.linspace(-1, 1, 40 * 192).view(40, 192))
        y.float().square().sum().backward()
        grads = {name: tensor.grad for name, tensor in tensors.items() if tensor.requires_grad}
        found.append({"the output": y, **grads})
    assert all(torch.equal(wanted, found[1][name]) for name, wanted in found[0].items())


@pytest.mark.parametrize("name", ["lora", "dora", "sora"])
def test_a_backward_pass_is_as_its_forward_pass_inside_autocast_too(name, monkeypatch):
    """`loss.backward()` within `torch.autocast`, of a pass that was none of it."""
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: Cost()))  # the set-up's gradients too
    op = operated(next(case for case in CASES if case.name == name), WIDE, torch.float32)
    x = op.input()
    leaves = {**x, **op.parameters}
    wanted = gradients(op.model(x["x"]), torch.ones(2, 3, 12), leaves)
    y = op.model(x["x"])
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(y, torch.ones(2, 3, 12), leaves)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_few_tokens_run_another_program_than_many():
    model = Tower(nn.Linear(64, 64, bias=False))
    apply(model, load("lora").retarget("**"))
    weight = ((64, 64), "float32")
    for tokens, is_built in ((40, False), (4000, True)):
        x = torch.randn(tokens, 64, requires_grad=True)
        assert (weight in kept(lambda: model(x), model)) is is_built


def test_one_program_is_exported_for_any_number_of_tokens():
    model = Tower(nn.Linear(64, 64))
    apply(model, load("lora").retarget("**"))
    any_number = {0: torch.export.Dim("tokens", min=2, max=10_000)}
    exported = torch.export.export(model.train(), (torch.randn(7, 64),), dynamic_shapes=(any_number,)).module()
    x = torch.randn(4000, 64)
    assert_close(exported(x), model(x), 1e-5)


def test_nothing_is_kept_where_nothing_trains():
    model = Tower(nn.Linear(192, 256))
    apply(model, parse('spec s()\ntarget linear "**" { add low_rank(2) }'))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(40, 192, requires_grad=True)
    assert kept(lambda: model(x), model) == []


def test_a_product_that_a_compiler_may_see_is_added_without_a_factor():
    a, b = Expr("param", (), "a", (3, 3)), Expr("param", (), "b", (3, 3))
    product = make("matmul", a, b)
    outputs = (make("add", b, times(2.0, product)), product)
    for owner, factors in ((False, 0), (True, 1)):
        names = {a: "a", b: "b"}
        found = emitted(Region(outputs, names.keys(), MemoryUse(recorded=not owner, writes=True)), names, "y")
        assert sum("alpha" in line for _, line in found.lines) == factors


def computed(*outputs: Expr, **values: Tensor) -> list[Tensor]:
    """What the lines of a region that owns its values give."""
    leaves = {node: node.data for output in outputs for node in walk(output) if node.op == "param"}
    found = emitted(Region(outputs, leaves.keys(), MemoryUse(recorded=False, writes=True)), leaves, "y")
    scope = {"torch": torch, **values}
    exec("\n".join(line for _, line in found.lines), scope)
    return [scope[found.results[output]] for output in outputs]


def test_what_reads_itself_or_is_an_output_is_not_written_over():
    a, b = Expr("param", (), "a", (3, 3)), Expr("param", (), "b", (3, 3))
    y = make("matmul", a, b)
    turned = make("T", y)
    values = {"a": torch.randn(3, 3), "b": torch.randn(3, 3)}
    product = values["a"] @ values["b"]
    for outputs, expected in [
        ([make("add", y, turned)], [product + product.T]),
        ([make("add", y, make("matmul", y, b))], [product + product @ values["b"]]),
        ([turned, make("add", y, b)], [product.T, product + values["b"]]),
        ([make("add", y, b), turned], [product + values["b"], product.T]),
    ]:
        for found, wanted in zip(computed(*outputs, **values), expected):
            assert_close(found, wanted.double(), 1e-6, str(outputs))


def test_what_else_reads_a_value_is_computed_before_it_is_written_over():
    a, b = Expr("param", (), "a", (3, 3)), Expr("param", (), "b", (3, 3))
    y = make("matmul", a, b)
    first = make("add", y, make("matmul", a, a))  # it comes first in the text, and reads y last
    other = make("matmul", b, make("T", y))
    apart = make("add", y, make("matmul", b, first))  # it reads y, and what would be written over it
    values = {"a": torch.randn(3, 3), "b": torch.randn(3, 3)}
    for outputs, writes in (((first, other), 1), ((other, first), 1), ((first, apart), 1), ((first, other, y), 0)):
        names = {a: "a", b: "b"}
        text = emitted(Region(outputs, names.keys(), MemoryUse(recorded=False, writes=True)), names, "y")
        assert sum("_(" in line for _, line in text.lines) == writes, text.lines
        means = {a: values["a"].double(), b: values["b"].double()}
        for found, output in zip(computed(*outputs, **values), outputs):
            for node in walk(output):
                if node not in means:
                    means[node] = PRIMITIVES[node.op].dense(*(means[arg] for arg in node.args))
            assert_close(found, means[output], 1e-5)


def test_a_value_that_is_given_is_not_written_over():
    """Neither where it is no leaf, as what another function keeps."""
    a, b = Expr("param", (), "a", (3, 3)), Expr("param", (), "b", (3, 3))
    given = make("matmul", a, b)
    names = {given: "kept", b: "b"}
    for output in (make("add", given, b), make("add", make("matmul", b, b), given), make("add", make("T", given), b)):
        text = emitted(Region((output,), names.keys(), MemoryUse(recorded=False, writes=True)), names, "y")
        scope = {"torch": torch, "kept": torch.ones(3, 3), "b": torch.ones(3, 3)}
        exec("\n".join(line for _, line in text.lines), scope)
        assert torch.equal(scope["kept"], torch.ones(3, 3)), text.lines


@pytest.mark.parametrize("frozen_last", [True, False])
def test_the_frozen_product_is_summed_into_a_thin_one_where_it_comes_last(frozen_last):
    plan = Compiled.supposed(formula(load("lora"))).candidates()[0]
    source = step_text(plan.written, plan.needs, frozen_last).source
    counts = [source.count(call) for call in ("layer.frozen_onto(", "layer.frozen_back_onto(", "addmm_(")]
    assert counts == ([1, 1, 0] if frozen_last else [0, 0, 2])


def test_two_values_of_one_kernel_are_told_apart_at_once():
    """As long as the pair is there, it holds both."""
    plan = Compiled.supposed(formula(load("dora"))).candidates()[0]
    lines = step_text(plan.written, plan.needs, frozen_last=True, one_pass=True).source.splitlines()
    first, second = (i for i, line in enumerate(lines) if "[0]  #" in line or "[1]  #" in line)
    assert second == first + 1 and lines[second + 1].startswith("    del ")


# ------------------------------------------------------------------------------------------------ beside other code


def test_an_output_that_is_written_over_changes_no_gradient():
    for case in CASES[:7]:
        op = operated(case, WIDE)
        x, y, ones = op.input(), op.input(), torch.ones(2, 3, 12, dtype=torch.float64)
        found = gradients(op.model(x["x"]).relu_(), ones, {**x, **op.parameters})
        wanted = gradients(op.model(y["x"]).relu(), ones, {"x": y["x"], **op.parameters})
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), case


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    op = operated(CASES[0], WIDE)
    y = op.model(op.input()["x"]).sum()
    with torch.no_grad():
        op.layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_trained_base_weight_takes_its_gradient():
    op = operated(CASES[1], WIDE)
    weight = op.layer.get_parameter("weight").requires_grad_()
    x = op.input()["x"]
    (g,) = torch.autograd.grad(op.model(x).sum(), [weight])
    assert g.norm() > 0


def test_second_derivatives_are_refused_and_torch_func_has_them():
    op = operated(CASES[1], WIDE)
    x = op.input()["x"]
    for loss in (op.model(x).pow(2).sum(), op.model(x).sum()):  # the gradient that comes in to the second is constant
        with pytest.raises(RuntimeError, match="have no second derivative"):
            torch.autograd.grad(loss, [x], create_graph=True)
    hessian = torch.func.hessian(lambda row: op.model(row).pow(2).sum())(x[0, 0])
    weight = torch.func.jacrev(op.model)(x[0, 0])
    assert_close(hessian, 2 * weight.T @ weight, EXACT)


def test_gradients_of_each_sample_by_vmap():
    op = operated(CASES[4], WIDE)
    rows = torch.randn(5, 18, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(op.model, parameters, row).pow(2).sum()

    trained = {name: p for name, p in op.model.named_parameters() if p.requires_grad}
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, rows)
    whole = torch.autograd.grad(op.model(rows).pow(2).sum(), list(trained.values()))
    for (name, found), wanted in zip(each.items(), whole):
        assert_close(found.sum(0), wanted, EXACT, name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    op = operated(CASES[4], WIDE, dropout=0.4)
    x, direction = op.input(), torch.randn(2, 3, 12, dtype=torch.float64)
    found = []
    for run in (op.model, lambda x: torch.utils.checkpoint.checkpoint(op.model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        (run(x["x"]) * direction).sum().backward()
        found.append({key: leaf.grad for key, leaf in {**x, **op.parameters}.items()})
        for leaf in (*x.values(), *op.parameters.values()):
            leaf.grad = None
    for key, gradient in found[0].items():
        assert_close(found[1][key], gradient, EXACT, key)


def test_an_activation_is_let_go_of_once_it_is_read():
    """Seven alive at most, of the eleven that the passes of a circulant update make."""
    layer = nn.Linear(96, 96, bias=False)
    adapter = apply(Tower(layer), load("c3a", block=8).retarget("**")).adapters["layers.0"]
    running = programs(adapter, layer.weight.dtype)
    best = running[True]
    running[True] = next(each for each in (best, *best.over) if each.strategy == "activations")
    x, grad = torch.randn(512, 96), torch.randn(512, 96)
    peak = peak_bytes(lambda: layer(x.clone().requires_grad_()).backward(grad), x.device)
    assert peak < 7.5 * x.nbytes


def test_a_large_value_of_a_set_up_is_let_go_of_once_it_is_read():
    """W' and W * (B A), without B A."""
    layer = nn.Linear(300, 300)
    adapter = apply(Tower(layer), load("hira").retarget("**")).adapters["layers.0"]
    assert peak_bytes(lambda: adapter.weights(layer), layer.weight.device) < 2.5 * layer.weight.nbytes


def test_a_block_update_is_written_into_what_it_is_added_to():
    """Of what is as wide as the layer there are the input, the output and the gradient of the input."""
    layer = nn.Linear(192, 192, bias=False)
    apply(Tower(layer), load("gralora", rank=4, grid=2).retarget("**"))
    x, grad = torch.randn(512, 192), torch.randn(512, 192)
    peak = peak_bytes(lambda: layer(x.clone().requires_grad_()).backward(grad), x.device)
    assert peak < 3.5 * x.nbytes


# ------------------------------------------------------------------------------------------------------- the kernels


def test_the_gradient_of_a_scalar_is_rounded_once():
    """Its terms are summed over rows and columns in float32: where columns cancel, the sum of rounded ones is 2 % off."""
    torch.manual_seed(0)
    written = step(make("mul", Expr("value", (), 0, ()), Expr("x", (), None, (TOKENS, 64))), (False, True))
    assert written is not None
    x, c = torch.randn(300, 64).bfloat16(), torch.tensor(0.5).bfloat16()
    signs = torch.tensor([1.0, -1.0] * 32)
    grad = (100 * signs * (1 + torch.rand(64) / 32) * x.double() / x.double().square().sum(0)).bfloat16()
    _, found = written.backward(None, grad, *written.forward(None, x, c)[1])
    assert_close(found, (grad.double() * x.double()).sum(), 2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_kernels_are_the_plain_formulas(dtype, rows):
    tolerance = 30 * torch.finfo(dtype).eps
    torch.manual_seed(0)
    a, b = torch.randn(rows, 12).to(dtype), torch.randn(rows, 12).to(dtype)
    s, t = torch.randn(4, 3, 3).to(dtype), torch.randn(4, 3, 2).to(dtype)
    wide = torch.block_diag(*t.double())
    assert_close(kernels.column_dot(a, b), (a.double() * b.double()).sum(0), tolerance)
    assert_close(kernels.dot(a, b), (a.double() * b.double()).sum(), tolerance)
    assert_close(kernels.blocks(a, t), a.double() @ wide, tolerance)
    assert_close(kernels.blocks(a.unflatten(0, (1, -1)), t), (a.double() @ wide)[None], tolerance)
    c = torch.randn(rows, 8).to(dtype)
    assert_close(kernels.add_blocks(c.clone(), a, t, 0.5), c.double() + a.double() @ wide / 2, tolerance)
    product = (a.double().mT @ b.double()).unflatten(0, (4, 3)).unflatten(-1, (4, 3))
    assert_close(kernels.block_dot(a, b, s), torch.stack([product[i, :, i] for i in range(4)]), tolerance)
    narrow = (a.double().mT @ c.double()).unflatten(0, (4, 3)).unflatten(-1, (4, 2))
    assert_close(kernels.block_dot(a, c, t), torch.stack([narrow[i, :, i] for i in range(4)]), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_masks_as_places_and_as_bits(dtype, rows):
    torch.manual_seed(0)
    a, y, m = torch.randn(rows, 4).to(dtype), torch.randn(rows, 12).to(dtype), torch.randn(4, 12).to(dtype)
    places = masks.mask(y, 0.25)
    bits = torch.zeros(y.numel(), dtype=torch.bool).index_fill(0, places.long(), True).view(y.shape)
    assert bits.sum() == len(places) and (rows < 300 or 750 < len(places) < 1050)
    for mask, turned in ((places, places), (bits, bits.view(12, -1))):
        assert torch.equal(masks.masked(y, mask), y * ~bits)
        for into in (y.clone(), y.mT.clone(memory_format=torch.contiguous_format).mT):  # by rows, and by columns
            assert masks.masked_(into, mask) is into
            assert torch.equal(into, y * ~bits)
        assert torch.equal(masks.masked(y.mT, turned).flatten(), y.mT.flatten() * ~bits.flatten())
        into = y.clone()
        assert masks.add_masked(into, a, m, mask, alpha=2.0) is into
        assert_close(into, y.double() + 2 * (a.double() @ m.double()) * ~bits, 60 * torch.finfo(dtype).eps)
    for mask in (places, bits):  # what lies in memory by columns too
        into = y.mT.clone(memory_format=torch.contiguous_format).mT
        assert masks.add_masked(into, a, m, mask, alpha=2.0) is into
        assert_close(into, y.double() + 2 * (a.double() @ m.double()) * ~bits, 60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p", [1e-5, 0.05, 0.5, 0.95])
def test_each_entry_is_dropped_with_its_chance_and_by_itself(p):
    """The share of 4 million entries that is dropped, of pairs at some distances, and of each entry of a small one."""
    torch.manual_seed(0)
    count = 4_000_000
    dropped = torch.zeros(count, dtype=torch.bool)
    dropped[masks.mask(torch.empty(count), p).long()] = True
    assert_share(dropped, p)
    for distance in (1, 2, 7, 1024):
        assert_share(dropped[:-distance] & dropped[distance:], p * p)
    few = torch.zeros(5_000, 5, dtype=torch.bool)
    for row in few:
        row[masks.mask(torch.empty(5), p).long()] = True
    for entry in few.unbind(1):
        assert_share(entry, p)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.4, 0.95, 1 - 1e-12])
def test_a_number_drops_each_entry_with_its_chance_and_by_itself(p):
    """As the kernels of a GPU do, whose draws are the same ones; rows of no whole number of words."""
    torch.manual_seed(0)
    dropped = dropout_number.dropped(dropout_number.drawn_number(torch.empty(0), p), (500, 803))
    assert_share(dropped.flatten(), p)
    assert_share((dropped[:, 1:] & dropped[:, :-1]).flatten(), p * p)
    assert_share((dropped[1:] & dropped[:-1]).flatten(), p * p)


def assert_share(found: Tensor, p: float) -> None:
    """Within five standard deviations (those of overlapping pairs are up to 1.4 times as large), and one entry."""
    share, deviation = found.double().mean().item(), (p * (1 - p) / len(found)) ** 0.5
    assert abs(share - p) < 7 * deviation + 1 / len(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 30])
def test_circulants_by_fourier_transforms(dtype, rows):
    torch.manual_seed(0)
    for p, q in ((3, 4), (1, 4), (3, 1), (1, 1)):
        a, b, c = torch.randn(rows, 3 * q).to(dtype), torch.randn(rows, 3 * p).to(dtype), torch.randn(p, q, 3).to(dtype)
        exact, tolerance = c.double().requires_grad_(), 30 * torch.finfo(dtype).eps
        whole = PRIMITIVES["circulant"].dense(exact)
        assert_close(kernels.circulate_back(b, c), b.double() @ whole, tolerance)
        assert_close(PRIMITIVES["circulate"].value(None, [a, c], a), a.double() @ whole.mT, tolerance)
        (wanted,) = torch.autograd.grad((a.double() @ whole.mT * b.double()).sum(), exact)
        assert_close(kernels.circulate_dot(a, b, c), wanted, tolerance)


@pytest.mark.parametrize("block", [2, 6])
@pytest.mark.parametrize(("layout", "largest"), [("linear 12x18", 128), ("linear 12x12", 0)])
def test_circulants_by_products_and_by_fast_transforms(monkeypatch, block, layout, largest):
    """Blocks of even size, the zoo having an odd one."""
    monkeypatch.setattr(apply_to_activations, "BY_PRODUCTS", largest)
    op = operated(next(case for case in CASES if case.name == "c3a"), LAYOUTS[layout], block=block)
    running, x = programs(op.adapter, op.weight.dtype), op.input()
    best = running[True]
    assert any("waves" in each.source for each in (best, *best.over)) is (largest > 0)
    agree(op, {**x, **op.parameters}, x["x"])
    for each in (best, *best.over):
        running[True] = each
        assert_close(op.model(op.x), op.oracle(op.x, op.leaves()), EXACT)


def test_spectra_of_stacks_are_mixed_alike():
    x, k = torch.randn(2, 4, 5, 7, 3), torch.randn(2, 4, 3, 6)
    wanted = PRIMITIVES["mixed"].dense(x, k)
    assert_close(kernels.mixed(x, k), wanted, 1e-6)
    assert_close(kernels.mixed(x.flatten(2, 3), k), wanted.flatten(2, 3), 1e-6)


def test_a_stride_changes_nothing():
    a, b = torch.randn(12, 300, dtype=torch.float64).mT, torch.randn(1, 12, dtype=torch.float64).expand(300, 12)
    s = torch.randn(4, 3, 3, dtype=torch.float64)
    assert_close(kernels.column_dot(a, b), (a * b).sum(0), EXACT)
    assert_close(kernels.dot(a, b), (a * b).sum(), EXACT)
    assert_close(kernels.blocks(a, s), a @ torch.block_diag(*s), EXACT)
    assert_close(kernels.block_dot(b, a, s), kernels.block_dot(b.contiguous(), a.contiguous(), s), EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if "block" in case.name], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_in_place_may_follow_a_layer(case, device):
    """Its last operation may be to see blocks as rows: torch refuses to write into a view that a node gives."""
    op = operated(case, LAYOUTS["linear 12x12"])
    x, leaves = op.x.detach().requires_grad_(), dict(op.adapter.named_parameters())
    found = []
    with steps_of(device):
        for in_place in (False, True):
            y = nn.functional.relu(op.model(x), inplace=in_place)
            found.append({"y": y, **gradients(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y),
                                              {**leaves, "x": x})})
    for name, wanted in found[0].items():
        assert_close(found[1][name], wanted, EXACT, name)


def test_a_view_of_what_is_kept_stays_one():
    """What is written into it would spoil a gradient: torch then refuses. (To torch `kept` is not the base of a view of
    `kept.detach()`, and in the same memory all the same.)"""
    kept, alone = torch.randn(6), torch.randn(6)
    for view in (kept.view(2, 3), kept[1:].view(5, 1).mT, kept.detach().view(2, 3)):
        for other in (kept, kept[1:], kept.detach(), kept.data):
            assert autograd_node._no_view(view, (None, alone, other)) is view
    free = autograd_node._no_view(alone.view(3, 2).T, (kept, None))
    assert free._base is None and free.data_ptr() == alone.data_ptr() and torch.equal(free, alone.view(3, 2).T)
