"""PEFT's layers as a second opinion: given the same parameters, PEFT's layer and ours give the same output and
gradients.

Parametrised over the rows of `surgery.peft.table.methods`: a new row needs its configurations in `CONFIGS` here and no
more.
"""

from __future__ import annotations

import peft
import pytest
import torch
from each import in_turns
from layers import assert_close
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import CONFIGS, EXACT, SINGLE, WRONG_IN_PEFT, cases
from peft_differences import DIFFERENCES
from peft_pair import LAYERS, One, Pair, adapted, compare, full, pair, perturb, place_of, resolve, run, spec_of
from peft_table import PAGE, README, SPEED, costs, peers
from torch import nn

from surgery.language.library import load, parse, retarget
from surgery.language.unsupported_methods import refusal
from surgery.peft.recognise import match
from surgery.peft.table.methods import METHODS, WITHOUT_ROW
from surgery.peft.tensor_mapping import Place
from surgery.planning.compile import compile
from surgery.runtime.apply import apply

BY_NAME = {m.name: m for m in METHODS}
GLORA = BY_NAME["glora"].family
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA builds sparse matrices


@pytest.fixture(scope="module", params=[
    pytest.param(row, id=f"{row[0].name}, {row[1]}, {row[2]}",
                 marks=[in_turns(2, together=True)] * (str(row[1]) != "linear")) for row in cases()])
def both(request) -> Pair:
    """One pair for the tests of a row, which run one after the other and take its parameters as they are."""
    return pair(*request.param)


def test_the_same_parameters_give_the_same_output_and_gradients(both):
    method, found = both.method, compare(both)
    assert found.actual.keys() == found.expected.keys()
    for name in found.actual.keys() - WRONG_IN_PEFT.get(method.name, set()):
        assert_close(found.actual[name], found.expected[name], SINGLE.get(method.name, EXACT), name)


def test_our_parameters_in_pefts_layer_give_the_same_output(both):
    both.take(both.map.to_ours({**both.again(), **both.saved()}, both.place))
    perturb(both.mine.parameters())
    both.give(both.map.to_peft({k: v.detach() for k, v in both.ours().items()}, both.place))
    assert_close(both.theirs(both.x), both.mine(both.x), SINGLE.get(both.method.name, EXACT))


def test_pefts_tensors_come_back_bit_for_bit(both):
    perturb(both.theirs.parameters())
    saved = {**both.again(), **{name: t.detach() for name, t in both.saved().items() if name not in both.method.derived}}
    ours = both.map.to_ours(saved, both.place)
    assert all(value.shape == both.ours()[key].shape for key, value in ours.items())
    back = both.map.to_peft(ours, both.place)
    assert back.keys() == saved.keys()
    assert all(back[name].dtype == saved[name].dtype and torch.equal(back[name], saved[name]) for name in saved)


def test_a_plan_is_told_by_its_formula(both):
    method, found = both.method, match(both.surgeon.plan)
    # Without a bias, the two rows of GLoRA are one formula.
    assert found.methods == {"layer": method} or not both.place.has_bias and found.family is method.family is GLORA
    said = resolve(method, getattr(peft, method.family.config_class)(**found.config))
    meant, told = (method.parameters.to_ours(c, both.place) for c in (both.config, said))
    assert meant == told


# --------------------------------------------------------------------------------------------------- several modules


class Three(nn.Module):
    """Layers of different sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(18, 12), nn.Linear(12, 12), nn.Linear(12, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("name", ["vera", "randlora", "tinylora", "unilora", "vblora", "fourierft", "waveft"])
def test_what_modules_share_is_shared(name):
    """PEFT keeps it once, as large as the largest module needs, or draws it for all modules in one go."""
    torch.manual_seed(0)
    method, model, x = BY_NAME[name], Three(), torch.randn(2, 3, 18)
    config = getattr(peft, method.family.config_class)(**CONFIGS[name][0], target_modules=["a", "b", "c"])
    theirs, plain = adapted(model, config), config.to_dict()
    perturb(theirs.parameters())
    surgeon = apply(model, retarget(method.given(plain, LAYERS[0].place), "a", "b", "c"))
    places = [Place.of(placed.site, number) for number, placed in enumerate(surgeon.plan.placed)]
    saved = peft.get_peft_model_state_dict(theirs)
    found = {}
    for module, place, again in zip("abc", places, method.again(plain, places)):
        own = {key.removeprefix(f"base_model.model.{module}."): tensor for key, tensor in saved.items()}
        ours = method.map(plain, place).to_ours({**again, **own}, place)
        found |= {f"{module}.weight_surgery.{key}": tensor for key, tensor in ours.items()}
    named = surgeon.as_named(found)
    surgeon.load({**surgeon.state(), **{key: t for key, t in named.items() if key in surgeon.named_tensors()}})
    assert_close(model(x), theirs(x), 1e-5)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.rms_norm = nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rms_norm(self.norm(self.layer(x)))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_trained_norms_are_pefts_copies_of_norms():
    model, x = Normed().double(), torch.randn(2, 6, dtype=torch.float64)
    theirs = adapted(model, peft.LNTuningConfig(target_modules=["norm", "rms_norm"]))
    surgeon = apply(model, load("ln_tuning"))
    perturb(theirs.parameters())
    saved, method = peft.get_peft_model_state_dict(theirs), BY_NAME["ln_tuning"]
    found = {}
    for module in ("norm", "rms_norm"):
        own = {key.removeprefix(f"base_model.model.{module}."): tensor for key, tensor in saved.items()}
        place = Place("trained", 0, 0, ())
        ours = method.map({}, place).to_ours(own, place)
        back = method.map({}, place).to_peft(ours, place)
        assert all(torch.equal(back[name], own[name]) for name in back) and len(back) == (2 if module == "norm" else 1)
        found |= {f"{module}.{name}": tensor for name, tensor in ours.items()}
    surgeon.load(found)
    _same_training(model, theirs, x, {f"base_model.model.{m}.ln_tuning_layers.default.{n}": f"{m}.{n}"
                                      for m, n in (("norm", "weight"), ("norm", "bias"), ("rms_norm", "weight"))})


def test_bitfit_is_what_pefts_bias_all_trains_beside_a_lora():
    """PEFT has no BitFit of its own."""
    model, x = Normed().double(), torch.randn(2, 6, dtype=torch.float64)
    theirs = adapted(model, peft.LoraConfig(r=1, target_modules=["layer"], bias="all"))
    apply(model, load("bitfit"))
    names = {"base_model.model.layer.base_layer.bias": "layer.bias", "base_model.model.norm.bias": "norm.bias"}
    assert set(_trained(model)) == set(names.values())
    assert {name for name in _trained(theirs) if "lora" not in name} == set(names)
    perturb(p for name, p in theirs.named_parameters() if name in names)
    with torch.no_grad():
        for name, own in names.items():
            model.get_parameter(own).copy_(theirs.get_parameter(name))
    _same_training(model, theirs, x, names)


def _same_training(mine: nn.Module, theirs: nn.Module, x: torch.Tensor, names: dict[str, str]) -> None:
    """The output and the gradients are the same; `names` gives ours for each parameter of PEFT's."""
    y, own = run(mine, x, _trained(mine))
    wanted, given = run(theirs, x, {name: theirs.get_parameter(name) for name in names})
    assert_close(y, wanted, EXACT)
    assert own.keys() == {*names.values(), "x"}
    for name, gradient in given.items():
        assert_close(own[names.get(name, name)], gradient, EXACT, name)


def test_what_peft_works_out_from_the_weight_is_said_by_the_row():
    """A frozen tensor that PEFT neither saves nor draws again it makes of W, and not as we do to the sign."""
    for method, layer, config in {method.name: (method, layer, config) for method, layer, config in cases()}.values():
        here = resolve(method, full(method, config))
        (placed,) = compile(One(layer.build()), spec_of(method, here, layer.build())).placed
        frozen = {leaf.key for leaf in placed.formula.leaves if leaf.frozen}
        mapped = {key for pair in method.map(here, layer.place).pairs for key in pair.ours}
        assert frozen <= mapped or method.rewrites or method.rebased, f"{method.name}: {frozen - mapped}"


def test_the_tables_have_a_line_for_every_method():
    """`python tests/peft_table.py` writes them."""
    page, speed, readme = (path.read_text(encoding="utf-8") for path in (PAGE, SPEED, README))
    assert [m.name for m in METHODS if f"| {m.name} |" not in page] == []
    assert [d.what for d in DIFFERENCES if f"| {d.method} | {d.what} | {d.of} |" not in page] == []
    assert "\n".join(["<!-- costs -->", *costs(), "<!-- end of costs -->"]) in speed
    for row in peers({}):  # but for what they measure
        lines, cost = row.split(" | ")[:3], row.split(" | ")[4:]
        assert any(line.split(" | ")[:3] == lines and line.split(" | ")[4:] == cost for line in readme.splitlines()), row
    assert [name for name, why in WITHOUT_ROW.items() if f"| `{name}` | {why} |" not in page] == []


def test_each_type_of_pefts_has_a_row_or_a_reason():
    """So that what docs/peft.md says first is true of the PEFT that is installed."""
    rows = {m.family.peft_type for m in METHODS}
    types = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert rows.isdisjoint(WITHOUT_ROW) and types == rows | {*WITHOUT_ROW} | {t for t in types if refusal(t)}


# --------------------------------------------------------------------------------------------- telling methods apart


@pytest.mark.parametrize("steps", [
    "add low_rank(rank, alpha) dropout(dropout)\n  post diagonal()",
    "add low_rank(rank, alpha)\n  pre diagonal() with bias"])
def test_a_spec_that_only_bears_a_name_is_no_match(steps):
    text = f'spec lora(rank: int = 2, alpha: float = 4, dropout: float = 0.0)\ntarget linear "layer" {{\n  {steps}\n}}'
    assert match(compile(One(nn.Linear(12, 12)), parse(text))) is None


def test_the_words_of_a_spec_do_not_count():
    text = 'spec mine(half: float = 2)\ntarget linear "layer" {\n  add low_rank(rank = 1 + 1, alpha = 2 * half)\n}'
    found = match(compile(One(nn.Linear(12, 12)), parse(text)))
    assert found.config == {"r": 2, "lora_alpha": 4, "lora_dropout": 0, "target_modules": ["layer"]}


def test_the_name_of_a_spec_does_not_count():
    text = """spec mine(rank: int = 2, alpha: float = 4, dropout: float = 0.1)
    target linear "layer" {
      add  low_rank(rank, alpha) dropout(dropout)
      post magnitude()
    }"""
    found = match(compile(One(nn.Linear(12, 12)), parse(text)))
    assert found.config == {"use_dora": True, "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["layer"]}


@pytest.mark.parametrize("left", ["shared", "frozen"])
def test_what_is_trained_and_what_is_shared_counts(left):
    text = load("vera").to_surg()
    assert match(compile(One(nn.Linear(12, 12)), parse(text))).methods == {"layer": BY_NAME["vera"]}
    changed = parse(text.replace("frozen shared param A", f"{left} param A"))
    assert match(compile(One(nn.Linear(12, 12)), changed)) is None


def test_modules_of_two_rows_of_one_family_are_one_configuration():
    model = nn.ModuleDict({"k_proj": nn.Linear(12, 12), "down_proj": nn.Linear(12, 12)})
    found = match(compile(model, load("ia3")))
    assert {name: m.name for name, m in found.methods.items()} == {"k_proj": "ia3", "down_proj": "ia3 on inputs"}
    assert found.config == {"feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "down_proj"]}


def test_a_configuration_with_an_unknown_switch_fits_no_row():
    plain = peft.LoraConfig(r=2).to_dict()
    assert [m.name for m in METHODS if m.fits(plain)] == ["lora"]
    for switch in ({"use_qalora": True}, {"init_lora_weights": "pissa_niter_4"}, {"bias": "all"},
                   {"use_rslora": True, "lora_bias": True}):
        assert not any(m.fits({**plain, **switch}) for m in METHODS)


def test_a_rotation_that_is_none_has_a_row_of_its_own():
    assert [m.name for m in METHODS if m.fits(peft.OFTConfig().to_dict())] == ["oft, Cayley-Neumann"]
    assert not any(m.fits(peft.OFTConfig(num_cayley_neumann_terms=4).to_dict()) for m in METHODS)


@pytest.mark.parametrize("fields", [{"dilation": 2}, {"kernel_size": (3, 1)}, {"stride": (1, 2)}], ids=str)
def test_what_peft_does_not_read_of_a_convolution_is_refused(fields):
    layer = nn.Conv2d(4, 12, **{"kernel_size": 3, **fields})
    config = resolve(BY_NAME["hra"], full(BY_NAME["hra"], {"r": 2}))
    assert not any(m.fits(config) and m.is_on(config, place_of(layer)) for m in METHODS)


@pytest.mark.parametrize("method", [m for m in METHODS if "convolution" in m.tensors], ids=lambda m: m.name)
def test_an_update_that_peft_pads_with_zeros_is_no_row_of_a_layer_that_pads_otherwise(method):
    """PEFT's layer is then another map than its own merge; IA3's gains stand around the layer's own padding."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer = nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    configs = [(full(method, c), resolve(method, full(method, c))) for c in CONFIGS[method.name]]
    fitting = [c for c, here in configs if method.is_on(here, place_of(nn.Conv2d(4, 12, 3, padding=1)))]
    for config in fitting[:1]:
        here = resolve(method, config)
        assert method.is_on(here, place_of(layer)) == method.pads_as_layer
        theirs = adapted(One(layer), config).double().eval()
        perturb(theirs.parameters())
        with torch.no_grad():
            y, merged = theirs(x), theirs.merge_and_unload()(x)
        assert ((y - merged).norm() / merged.norm() < 1e-6) == method.pads_as_layer


@pytest.mark.parametrize("padding", [{"padding": 0, "padding_mode": "reflect"}, {"padding": "same"},
                                     {"padding": "valid", "padding_mode": "circular"}], ids=str)
def test_where_nothing_or_zeros_are_padded_pefts_update_is_ours(padding):
    config = resolve(BY_NAME["lora"], full(BY_NAME["lora"], {"r": 2}))
    assert BY_NAME["lora"].is_on(config, place_of(nn.Conv2d(4, 12, 3, **padding)))


@pytest.mark.parametrize("even_first", [True, False])
def test_each_convolution_is_asked_by_itself(even_first):
    """Two of one shape, of which PEFT reads one otherwise."""
    pair_of = [nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, dilation=2)]
    model = nn.Sequential(*(pair_of if even_first else reversed(pair_of)))
    spec = parse("spec mine(rank: int = 2) target conv { pre householder(count = rank / 2) on in }")
    assert match(compile(model, spec)) is None
    assert match(compile(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), spec)) is not None


# ---------------------------------------------------------------------------------- where PEFT is not the method's map


@pytest.mark.parametrize("difference", DIFFERENCES, ids=str)
def test_pefts_layer_is_not_the_papers(difference):
    assert difference.measure() > 1e-3


@pytest.mark.parametrize("block", [3, 6])
def test_our_gradient_of_c3as_input_is_that_of_pefts_map(block):
    """Its own is not: see the differences."""
    both = pair(BY_NAME["c3a"], LAYERS[0], {"block_size": block})
    found = compare(both)
    weight = both.theirs(torch.eye(18, dtype=torch.float64)) - both.theirs(torch.zeros(1, 18, dtype=torch.float64))
    direction = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert_close(found.actual["x"], direction @ weight.T, 1e-6)


def test_coft_projects_as_peft_does():
    """Where the parameter is outside of the ball PEFT overwrites it; the map is the same."""
    method, config = BY_NAME["coft"], {"oft_block_size": 6, "r": 0, "eps": 0.5}
    both = pair(method, LAYERS[0], config)
    perturb(both.theirs.parameters())
    both.take(both.map.to_ours(both.saved(), both.place))
    mine, wanted = both.mine(both.x), both.theirs(both.x)
    assert_close(mine, wanted, 1e-6)  # PEFT's radius is in float32
    both.take({key: t / 9 for key, t in both.ours().items()})
    assert not torch.allclose(both.mine(both.x), mine)
