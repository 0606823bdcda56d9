"""Which layers are called and not read, and what is said of those that cannot be."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from layers import Tower, assert_close, perturb
from packed import Int4Linear, Int8Linear
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import CASES

from surgery.diagnostics import SurgeryError
from surgery.language.library import load, parse
from surgery.layers.layouts import CALLED, LINEAR
from surgery.layers.opaque_linear import matrix, size, twin
from surgery.layers.survey import sites, unsupported
from surgery.runtime.apply import apply

OUT, IN = 12, 18


class InBuffers(nn.Module):
    """A dense weight that is no parameter; its sides go by AutoGPTQ's names."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = IN, OUT
        self.register_buffer("dense", torch.randn(OUT, IN))
        self.register_buffer("bias", torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.dense.to(x.dtype), self.bias.to(x.dtype))


def _with_weight_of_a_class() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(OwnTensor), requires_grad=False)
    return linear


class OwnTensor(Tensor):
    pass


def _with_computed_bias() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Tanh())
    return linear


def _dynamic(in_features: int, out_features: int) -> nn.Module:
    """torch's own quantisation, whose activations are rounded too."""
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(in_features, out_features)))[0]


FOUND = [
    lambda: Int8Linear(IN, OUT), lambda: Int4Linear(IN, OUT), InBuffers, _with_weight_of_a_class, _with_computed_bias,
    lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)), lambda: nn.utils.weight_norm(nn.Linear(IN, OUT)),
    lambda: _dynamic(IN, OUT),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", FOUND)
def test_a_layer_without_a_plain_weight_is_called(build):
    torch.manual_seed(0)
    model = Tower(build())
    (site,) = sites(model)
    assert (site.layout, site.kind, site.out, site.in_, site.has_bias) == (CALLED, "linear", OUT, IN, True)
    assert not unsupported(model) and not site.answer.fault
    x = torch.randn(4, IN)
    with torch.no_grad():
        y = model(x)
        assert_close(x @ site.read().mT + site.bias, y, 2e-2)
        surgeon = apply(model, parse('target linear { pre diagonal()  add low_rank(2) }'))
        perturb(model)
        p = surgeon.adapters["layers.0"].tensors()
        weight = p["pre_diagonal.d"][:, None] * site.read() + 8 * p["add_low_rank.B"] @ p["add_low_rank.A"]
        assert_close(model(x), x @ weight.mT + site.bias, 2e-2)
    surgeon.remove()
    assert torch.equal(model(x), y)


def test_the_size_of_a_tensor_that_is_made_of_others_is_theirs():
    class Made(Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    made = torch.zeros(OUT, IN).as_subclass(Made)
    made.codes, made.scale = torch.zeros(OUT, IN, dtype=torch.int8), torch.zeros(OUT, 1)
    assert size(made) == OUT * IN + 4 * OUT and size(made.scale) == 4 * OUT


def test_a_plain_layer_is_not_called():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False).half())
    assert [s.layout for s in sites(model)] == [LINEAR, LINEAR]


class Spline(nn.Module):
    in_features, out_features = IN, OUT

    def __init__(self) -> None:
        super().__init__()
        self.knots = nn.Parameter(torch.randn(OUT, IN))
        self.register_buffer("grid", torch.randn(OUT, IN))


class Wrapper(nn.Module):
    in_features, out_features = IN, OUT

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.weight = Int8Linear(IN, OUT), None


def test_other_classes_with_features_are_left_alone():
    model = nn.ModuleDict({"spline": Spline(), "wrapper": Wrapper()})
    assert [site.name for site in sites(model)] == ["wrapper.base_layer"]
    assert "Spline is not a linear layer" in unsupported(model)["spline"]


def test_what_a_called_layer_is_made_of_is_no_site_and_is_not_trained():
    class Codebook(Int8Linear):
        def __init__(self) -> None:
            super().__init__(IN, OUT)
            self.codes = nn.Embedding(4, 4)

    model = Tower(Codebook())
    assert [s.name for s in sites(model)] == ["layers.0"] and not unsupported(model)
    with pytest.raises(SurgeryError, match="overlap"):
        apply(model, parse('target linear { add low_rank(2) }\ntrain "**.codes.*"'))
    assert apply(model, parse('target linear { add low_rank(2) }\ntrain "**.bias"')).plan.train == ("layers.0.bias",)


# ------------------------------------------------------------------------------------------------- what is refused


class Gate(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Broken(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this device\nsee the manual")


class Narrow(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


class Shifted(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 10


class Centred(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(0)


class Noisy(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5)


class Infinite(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class WrongGradient(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(super().forward(x))


@pytest.mark.parametrize(("build", "reason"), [
    (Gate, r"Gate is no linear map: f\(a x \+ b y\) is far from"),
    (Broken, r"calling Broken fails \(no kernel for this device\)"),
    (Narrow, r"Narrow gives \[4, 11\] for \[4, 18\]"), (Shifted, "at 0 it gives something else than its bias"),
    (Centred, "Centred is no map of each row"), (Noisy, "Noisy is no map of each row"), (Infinite, "not finite"),
    (WrongGradient, "the gradient that WrongGradient gives is not that of its map"),
])
def test_what_cannot_be_called_for_its_map_is_told(build, reason):
    torch.manual_seed(0)
    model = Tower(build(IN, OUT), build(IN, OUT))
    before = deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=reason) as error:
        apply(model, parse('spec s()\ntarget linear "**" { add low_rank(2) }'))
    (told,) = error.value.diagnostics
    assert told.code == "unsupported-module" and told.span.line == 2
    assert told.message.startswith("`layers.0`, `layers.1` cannot be operated on")
    assert model.state_dict().keys() == before.keys() and type(model.layers[0]) is build


class Deaf(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", [Deaf, _dynamic])
def test_a_layer_without_a_gradient_is_for_evaluation_and_for_what_is_first(build):
    torch.manual_seed(0)
    model = Tower(build(IN, OUT), build(OUT, IN))
    surgeon = apply(model, parse('target linear "**" { add low_rank(2) }'))
    assert model.layers[0](torch.randn(4, IN)).requires_grad  # its own adapter trains
    with pytest.raises(SurgeryError, match="gives no gradient to its input") as error:
        model(torch.randn(4, IN))
    assert error.value.diagnostics[0].code == "no-gradient"
    with torch.no_grad():
        perturb(model)
        changed = model(torch.randn(4, IN))
    assert changed.isfinite().all() and not surgeon.merged


def test_what_trains_before_a_layer_without_a_gradient_is_told_too():
    """A rotation of the input is before the layer, though the input needs no gradient. What is built into W is not."""
    model = Tower(Deaf(IN, OUT))
    surgeon = apply(model, load("oft", block=3).retarget("**"))
    with pytest.raises(SurgeryError, match="no-gradient"):
        model(torch.randn(4, IN))
    surgeon.remove()
    apply(model, load("hira", rank=2).retarget("**"))
    model(torch.randn(4, IN, requires_grad=True)).sum().backward()


def test_the_transposed_map_needs_the_gradient():
    with pytest.raises(SurgeryError, match="multiplies W from the left, and Deaf gives no gradient") as error:
        apply(Tower(Deaf(IN, OUT)), next(c for c in CASES if c.name == "a projection from W on in").spec())
    assert error.value.diagnostics[0].code == "unsupported-module"


def test_a_forward_on_the_instance_is_what_is_called():
    """As accelerate's hooks have it: it runs in the place of the class's, and would in the place of ours."""
    for layer in (nn.Linear(IN, OUT), Int8Linear(IN, OUT)):
        model, x, calls = Tower(layer), torch.randn(4, IN), []
        inner = layer.forward
        layer.forward = lambda x: calls.append(x) or inner(x)
        y = model(x)
        surgeon = apply(model, parse('target linear "**" { add low_rank(2) }'))
        perturb(model)
        assert not torch.equal(model(x), y)
        calls.clear()
        with surgeon.disabled():
            assert torch.equal(model(x), y) and len(calls) == 1
        surgeon.remove()
        assert torch.equal(model(x), y) and len(calls) == 2


@pytest.mark.parametrize("build", [nn.Linear, Int8Linear])
def test_a_forward_that_is_put_on_an_operated_layer_runs_ours(build):
    model, x = Tower(build(IN, OUT)), torch.randn(4, IN)
    base = model(x)
    surgeon = apply(model, parse('target linear "**" { add low_rank(2)  post magnitude() }'))
    perturb(model)
    y, inner = model(x), model.layers[0].forward
    model.layers[0].forward = lambda x: 2 * inner(x)
    assert torch.equal(model(x), 2 * y)
    with surgeon.disabled():
        assert torch.equal(model(x), 2 * base)


class Settling(Int8Linear):
    """As bitsandbytes has it: the first call decides on a dtype, and one that seems not to train repacks the weight."""

    settled, repacked = None, False

    def forward(self, x: Tensor) -> Tensor:
        self.settled = self.settled or x.dtype
        self.repacked = self.repacked or not (self.training or x.requires_grad)
        y = super().forward(x)
        return y.detach() if self.repacked else y


def test_what_apply_tries_leaves_no_trace_in_the_layer():
    model = Tower(Settling(IN, OUT)).eval()
    surgeon = apply(model, parse('target linear "**" { add low_rank(2)  post magnitude() }'))
    assert model.layers[0].settled is None and surgeon.adapters["layers.0"].gives_gradient
    assert type(twin(model.layers[0])) is Settling and len(list(twin(model.layers[0]).modules())) == 1
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    model.train()(x).sum().backward()
    assert model.layers[0].settled == torch.bfloat16 and not model.layers[0].repacked and x.grad.norm() > 0


def test_a_layer_that_repacks_itself_in_evaluation_trains_after_one():
    model, x = Tower(Settling(IN, IN), Settling(IN, OUT)).eval(), torch.randn(4, IN)
    spec = parse('target linear "layers.0" { add low_rank(2)  post magnitude() }')
    surgeon = apply(model, spec, example=(x,))  # its proof runs what is not operated on, too
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            y = model(x)
            with surgeon.disabled():
                assert not model.layers[0](x).requires_grad
        assert not any(layer.repacked for layer in model.layers)
    with torch.inference_mode():
        made = x.clone()
    with torch.no_grad():
        assert torch.equal(model(made), y) and not any(layer.repacked for layer in model.layers)
    x.requires_grad_()
    assert torch.equal(model.train()(x), y)
    model(x).sum().backward()
    assert x.grad.norm() > 0
    surgeon.remove()
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    with pytest.raises(SurgeryError, match="not-identity"):
        apply(model, parse('target linear "layers.0" { add low_rank(2)  post magnitude() }'), example=(torch.full((1, IN), torch.nan),))
    assert not any(layer._forward_pre_hooks for layer in model.layers)


class Gained(nn.Linear):
    """A layer with gains of its own, in a module within it."""

    def __init__(self, in_: int, out: int):
        super().__init__(in_, out)
        self.codes = nn.Parameter(torch.randint(-8, 8, (out, in_), dtype=torch.int8), requires_grad=False)
        del self.weight
        self.inner = nn.ParameterDict({"gain": nn.Parameter(torch.rand(out) + 0.5)})

    def forward(self, x):
        return self.inner["gain"] * (x @ self.codes.T.to(x.dtype)) + self.bias


def test_in_evaluation_too_what_trains_in_a_layer_takes_its_gradient():
    model, x = Tower(Gained(IN, OUT)), torch.randn(4, IN)
    apply(model, parse('target linear "**" { add low_rank(2)  post magnitude() }'))
    own = [model.layers[0].inner["gain"], model.layers[0].bias]
    for each in own:
        each.requires_grad_()
        wanted = torch.autograd.grad(model.train()(x).square().sum(), [each])
        assert wanted[0].norm() > 0
        torch.testing.assert_close(torch.autograd.grad(model.eval()(x).square().sum(), [each]), wanted)
        each.requires_grad_(False)


def test_what_was_evaluated_before_the_surgery_is_refused_where_it_trains():
    model, x = Tower(Settling(IN, OUT)).eval(), torch.randn(4, IN)
    with torch.no_grad():
        model(x)
    assert model.layers[0].repacked
    apply(model, parse('target linear "**" { add low_rank(2)  post magnitude() }'))
    with pytest.raises(SurgeryError, match="no-gradient(.|\n)*load it anew"):
        model.train()(x.requires_grad_())


def test_the_whole_weight_is_read_in_slices_and_in_the_dtype_that_the_layer_takes():
    class Half(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float16:
                raise TypeError("expected float16")
            return super().forward(x.float()).half()

    layer = Half(2500, 3)
    assert_close(matrix(layer, torch.float32), layer.dequantised(), 1e-3)
    assert layer.rows == [1, 1, 1024, 1024, 452]
