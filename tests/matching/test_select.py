"""Which modules a spec takes, and what is said about the names that take none."""

import re
from functools import cache

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from surgery.diagnostics import SurgeryError
from surgery.language.library import library
from surgery.language.parser import parse_text
from surgery.language.tree import Pattern, Select, Spec, Target, pre
from surgery.layers.survey import Survey, sites
from surgery.matching.conflicts import tied
from surgery.matching.selection import select
from surgery.models.demo import DEMOS, load_demo
from surgery.planning.check import check
from surgery.planning.compile import compile as plan

demo = cache(load_demo)


def torch_encoder() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8)]), "out_proj": nn.Linear(4, 4),
                          "normed": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))})


def spec_of(header: str) -> Spec:
    """A spec of the given targets: each `{}` gets a step."""
    return parse_text("spec s()\n" + header.replace("{}", "{ pre diagonal() }"), "s.surg")


def run(model: str | nn.Module, header: str):
    spec = spec_of(header)
    return select(demo(model) if isinstance(model, str) else model, spec, library(spec).selects)


def taken(model, header: str) -> list[str]:
    return list(run(model, header).targets)


def failure(model, header: str) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        run(model, header)
    return caught.value


def short(names) -> list[str]:
    """The last two segments, without repeats."""
    return sorted({".".join(n.split(".")[-2:]) for n in names})


# ------------------------------------------------------------------------------------------------- what is taken

TAKEN = [
    ("llama", 'target linear "**.q_proj" {}', [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]),
    ("llama", 'target linear "**.layers.{-1}.**.{q,k}_proj" {}',
     ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"]),
    ("llama", 'target linear "**.layers.{1..2}.**.up_proj" {}', [f"model.layers.{i}.mlp.up_proj" for i in (1, 2)]),
    ("llama", 'target linear "**.q_proj" except "**.layers.{0..2}.**" {}', ["model.layers.3.self_attn.q_proj"]),
    ("llama", 'target linear "lm_head" {}', ["lm_head"]),
    ("llama", 'target embedding "**" {}', ["model.embed_tokens"]),
    ("llama", 'target any "**.embed_tokens", "lm_head" {}', ["model.embed_tokens", "lm_head"]),
    ("llama", 'target linear in LlamaMLP "**.layers.0.**" {}',
     [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]),
    ("mixtral", 'target linear "**.experts.*" {}',
     [f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")]),
    ("gpt2", 'target linear "**.h.{-1}.attn.*" {}', ["transformer.h.2.attn.c_attn", "transformer.h.2.attn.c_proj"]),
    ("gpt2", 'target embedding "**.wte" untie {}', ["transformer.wte"]),
    ("gpt2", 'target embedding "**.wpe" {}', ["transformer.wpe"]),
    ("vit", "target conv {}", ["vit.embeddings.patch_embeddings.projection"]),
    ("t5", 'target linear "encoder.**.SelfAttention.q" {}',
     [f"encoder.block.{i}.layer.0.SelfAttention.q" for i in (0, 1)]),
]


@pytest.mark.parametrize(("model", "header", "names"), TAKEN)
def test_taken(model, header, names):
    assert taken(model, header) == names


@pytest.mark.parametrize("model", [n for n in DEMOS if n != "resnet"])
def test_a_kind_alone_is_every_layer_of_it_but_the_head(model):
    expected = [s.name for s in sites(demo(model)) if s.kind == "linear" and not s.is_head]
    assert expected and taken(model, "target linear {}") == expected


def test_a_selection_names_its_sites_and_targets():
    chosen = run("llama", 'target linear "**.q_proj" {}\ntarget linear "**.k_proj" {}')
    site, index, target = chosen.targets["model.layers.2.self_attn.k_proj"]
    assert (site.layer, index, target.selectors[0].text) == (2, 1, "**.k_proj")
    assert list(chosen.targets) == [s.name for s in sites(demo("llama")) if s.name in chosen.targets]
    assert chosen.warnings == () and chosen.train == ()


def test_the_ancestor_may_be_a_base_class():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(2, 2)

    class Special(Block):
        pass

    model = nn.ModuleDict({"a": Block(), "b": Special(), "c": nn.Linear(2, 2)})
    assert taken(model, "target linear in Block {}") == ["a.up", "b.up"]
    assert taken(model, "target linear in Special {}") == ["b.up"]


def test_an_alias_of_a_module_names_it():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert taken(model, 'target linear "b" {}') == ["a"]


def test_a_spec_built_in_python_needs_no_places():
    spec = Spec("s", targets=[Target("**.q_porj", pre("diagonal")), Target(Pattern("**.k_proj"), pre("diagonal"))])
    with pytest.raises(SurgeryError, match=r'pattern "\*\*.q_porj" matches no layer of LlamaForCausalLM'):
        select(demo("llama"), spec, {})


def test_the_order_of_targets_does_not_count():
    lines = ['target linear "**.{q,k}_proj" {}', 'override target linear "**.layers.0.**.q_proj" {}',
             'target conv "**" {}']
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(2, 2),
                                                                   "k_proj": nn.Linear(2, 2)})
                                                    for _ in range(2)]), "c": nn.Conv1d(2, 2, 1)})
    owners = [{n: t.target.selectors for n, t in run(model, "\n".join(order)).targets.items()}
              for order in (lines, lines[::-1])]
    assert owners[0] == owners[1]


# ------------------------------------------------------------------------------------------- the selectors of std.surg

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**SMALL, "intermediate_size": 128}
LLAMA = (["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"],
         ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"])
BERT = (["output.dense", "self.key", "self.query", "self.value"], ["intermediate.dense", "output.dense"])
BLOOM = (["self_attention.dense", "self_attention.query_key_value"], ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"])
OUT = ["self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"]

ROLES = [
    (lambda: demo("llama"), *LLAMA),
    (lambda: demo("bert"), *BERT),
    (lambda: demo("gpt2"), ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    (lambda: demo("t5"), [f"{a}.{n}" for a in ("EncDecAttention", "SelfAttention") for n in "koqv"],
     ["DenseReluDense.wi", "DenseReluDense.wo"]),
    (lambda: demo("mixtral"), LLAMA[0], ["experts.down_proj", "experts.gate_up_proj"]),
    (lambda: demo("vit"), [f"attention.{n}_proj" for n in "koqv"], ["mlp.fc1", "mlp.fc2"]),
    (lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, head_dim=16)), *LLAMA),
    (lambda: RobertaForMaskedLM(RobertaConfig(**WIDE)), *BERT),
    (lambda: DistilBertForSequenceClassification(DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96,
                                                                  vocab_size=96)),
     ["attention.k_lin", "attention.out_lin", "attention.q_lin", "attention.v_lin"], ["ffn.lin1", "ffn.lin2"]),
    (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)), ["attention.dense", "attention.query_key_value"], BLOOM[1]),
    (lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=96)), OUT, ["0.fc1", "0.fc2", "1.fc1", "1.fc2"]),
    (lambda: PhiForCausalLM(PhiConfig(**WIDE)),
     ["self_attn.dense", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"], ["mlp.fc1", "mlp.fc2"]),
    (lambda: Phi3ForCausalLM(Phi3Config(**WIDE)), ["self_attn.o_proj", "self_attn.qkv_proj"],
     ["mlp.down_proj", "mlp.gate_up_proj"]),
    (lambda: FalconForCausalLM(FalconConfig(**SMALL)), *BLOOM),
    (lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)), *BLOOM),
    (lambda: BartForConditionalGeneration(BartConfig(
        d_model=64, vocab_size=96, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96)), sorted([n.replace("self", "encoder") for n in OUT] + OUT), ["0.fc1",
                                                                                                              "0.fc2"]),
]


@pytest.mark.parametrize(("build", "attention", "mlp"), ROLES)
def test_attention_and_mlp_take_the_right_modules(build, attention, mlp):
    with torch.device("meta"):
        model = build()
    by_role = {role: taken(model, f"target linear {role} {{}}") for role in ("attention", "mlp")}
    assert (short(by_role["attention"]), short(by_role["mlp"])) == (attention, mlp)
    assert not set(by_role["attention"]) & set(by_role["mlp"])
    layers = [s.name for s in sites(model) if s.kind == "linear" and s.layer is not None]
    assert sorted(by_role["attention"] + by_role["mlp"]) == sorted(layers)


def test_a_selector_may_name_selectors_and_be_dead_in_part():
    chosen = run("bert", 'select mine = "**.q_proj", attention\ntarget linear mine {}')
    assert len(chosen.targets) == 12 and chosen.warnings == ()


# ------------------------------------------------------------------------------------------------------ no match

# (model, header, code, the message's words, a note or a help's words)
FAILURES = [
    ("llama", 'target linear "**.q_porj" {}', "no-match",
     'pattern "**.q_porj" matches no linear layer of LlamaForCausalLM',
     'did you mean "**.q_proj" (4 layers)?'),
    ("llama", 'target linear "q_proj" {}', "no-match", 'pattern "q_proj"', 'did you mean "**.q_proj" (4 layers)?'),
    ("llama", 'target linear "*.q_proj" {}', "no-match", "matches no", 'did you mean "**.q_proj" (4 layers)?'),
    ("llama", 'target linear "{q,k}_proj" {}', "no-match", "matches no", 'did you mean "**.{q,k}_proj" (8 layers)?'),
    ("llama", 'target linear "layers.*.self_attn.q_proj" {}', "no-match", "matches no",
     '"**.layers.*.self_attn.q_proj"'),
    ("llama", 'target linear "model.layer.*.self_attn.q_proj" {}', "no-match", "matches no",
     '"model.layers.*.self_attn.q_proj" (4 layers)'),
    ("llama", 'target linear "model.layers.0.q_proj" {}', "no-match", "matches no",
     '"model.layers.0.**.q_proj" (1 layer)'),
    ("llama", 'target linear "**.q_proj.weight" {}', "no-match", "matches no", '"**.q_proj" (4 layers)'),
    ("llama", 'target linear "**.*_porj" {}', "no-match", "matches no", '"**.*_proj" (28 layers)'),
    ("llama", 'target linear "**.mlp" {}', "no-match", "matches no linear", "of class LlamaMLP"),
    ("llama", 'target linear "**.mlp" {}', "no-match", "matches no linear", '"**.mlp.*" (12 layers)'),
    ("llama", 'target linear "**.embed_tokens" {}', "no-match", "matches no linear", "`target embedding` takes it"),
    ("llama", 'target linear "**.layers.{4..9}.**" {}', "no-match", "matches no linear", "`model.layers` has 4 layers"),
    ("llama", 'target linear in LlamaMlp {}', "no-match", "no linear layer in a LlamaMlp", "did you mean `LlamaMLP`?"),
    ("llama", "target conv {}", "no-match", "LlamaForCausalLM has no convolution",
     "there are 29 linear layers: `target linear` takes them"),
    ("llama", "target embedding in LlamaMLP {}", "no-match", "has no embedding in a LlamaMLP",
     "in a LlamaMLP there are 12 linear layers: `target linear` takes them"),
    ("resnet", "target embedding {}", "no-match", "has no embedding", "there are 10 convolutions: `target conv` takes them"),
    ("llama", 'target linear "**.q_proj" except "**" {}', "no-match", "leaves all of them out", ""),
    ("resnet", "target linear {}", "no-match", "leaves the output head out", ""),
    ("resnet", "target linear attention {}", "no-match", "selector `attention` matches no linear", "std.surg"),
    ("bert", 'target linear "**.qurey" {}', "no-match", "matches no linear layer",
     'did you mean "**.query" (3 layers)?'),
    ("bert", 'target linear "**.xyzzy" {}', "no-match", "matches no linear layer",
     "BertForSequenceClassification has linear layers named query, key, value, dense, classifier"),
    ("gpt2", 'target linear "**.c_atn" {}', "no-match", "matches no linear layer", '"**.c_attn" (3 layers)'),
    ("llama", "target linear atention {}", "unknown-selector", "`atention`", "did you mean `attention`?"),
    ("llama", "target linear q_proj {}", "unknown-selector", "`q_proj`", 'in quotes: "**.q_proj"'),
    ("llama", 'select a = b\nselect b = a\ntarget linear a {}', "unknown-selector", "made of itself", ""),
    ("llama", 'target linear "**.q**" {}', "bad-pattern", "segment of its own", ""),
    ("llama", 'target any "**.norm" {}', "unsupported-module", "LlamaRMSNorm has no weight matrix",
     '`train "model.norm.*"`'),
    ("mixtral", 'target conv "**.mlp.gate" {}', "unsupported-module", "MixtralTopKRouter is not a linear layer", ""),
    ("gpt2", 'target embedding "**.wte" {}', "tied-weight", "`transformer.wte.weight` is tied to `lm_head.weight`",
     "`untie`"),
    ("gpt2", 'target linear "lm_head" {}', "tied-weight", "`lm_head.weight` is tied to `transformer.wte.weight`",
     "`untie`"),
    ("t5", 'target embedding "**.embed_tokens" {}', "tied-weight", "`shared.weight`", "`untie`"),
]


@pytest.mark.parametrize(("model", "header", "code", "words", "advice"), FAILURES)
def test_failures(model, header, code, words, advice):
    (found,) = failure(model, header).diagnostics
    assert found.code == code and words in found.message
    assert any(advice in line for line in (*found.notes, *found.helps, ""))
    assert found.span is not None and found.span.source.name == "s.surg"


def test_a_model_without_a_layer_of_a_known_kind_says_what_holds_its_numbers():
    (found,) = failure(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2, 2, 2)), 'target any "**" {}').diagnostics
    assert found.notes[0].startswith("`1`, of class ConvTranspose2d, is no layer of a known kind")


@pytest.mark.parametrize(("header", "words"), [
    ('target linear "**.self_attn.out_proj" {}', "nn.MultiheadAttention reads its weight directly"),
    ('target linear "**.out_proj" {}', "nn.MultiheadAttention reads its weight directly"),
    ('target linear "out_proj", "**.linear1" {}', "fast path"),
    ('target conv "normed" {}', "a parametrisation"),
    ('target any "**.self_attn" {}', "MultiheadAttention is not"),
])
def test_a_module_that_cannot_be_operated_on_and_is_named_is_an_error(header, words):
    (found,) = failure(torch_encoder(), header).diagnostics
    assert found.code == "unsupported-module" and words in found.message


def test_a_name_that_a_layer_and_a_foreign_module_share_takes_the_layer():
    model = nn.ModuleDict({"a": nn.ModuleDict({"gate": nn.Linear(2, 2)}), "b": nn.ModuleDict({"gate": nn.LSTM(2, 2)})})
    chosen = run(model, 'target linear "*.gate" {}')
    assert list(chosen.targets) == ["a.gate"] and "b.gate" in {name for name, _, site in chosen.left_out
                                                               if site is None}


def test_a_kind_of_which_all_are_refused_says_so():
    (found,) = failure(torch_encoder(), "target conv {}").diagnostics
    assert found.code == "no-match" and "that can be taken" in found.message and "a parametrisation" in found.notes[0]


@pytest.mark.parametrize("header",
                         ['target linear "**" {}', 'target any "**" {}', "target linear {}", 'target linear "*" {}'])
def test_one_that_is_only_covered_is_left_out_with_the_reason(header):
    chosen = run(torch_encoder(), header)
    assert list(chosen.targets) == ["out_proj"]
    left_out = {name: reason for name, reason, site in chosen.left_out}
    assert "reads its weight directly" in left_out["layers.0.self_attn.out_proj"] and "a parametrisation" in left_out["normed"]


def test_every_error_is_found_at_once():
    found = failure("llama", 'target linear "**.q_porj" {}\ntarget linear atention {}\ntarget linear "a..b" {}\n'
                    'target linear "**.k_proj" {}\ntarget linear "**.k_proj" {}').diagnostics
    assert sorted(d.code for d in found) == ["bad-pattern", "no-match", "overlap", "unknown-selector"]


def test_a_rendered_message():
    assert str(failure("llama", 'target linear "**.q_porj" {}')) == (
        'error[no-match]: pattern "**.q_porj" matches no linear layer of LlamaForCausalLM\n'
        "  --> s.surg:2:15\n"
        "   |\n"
        '2  | target linear "**.q_porj" { pre diagonal() }\n'
        "   |               ^^^^^^^^^^^\n"
        '   = help: did you mean "**.q_proj" (4 layers)?')


# ---------------------------------------------------------------------------------------------------- dead names

# (model, header, the text under the carets, words of the message or a help) of the one warning
WARNINGS = [
    ("llama", 'target linear "**.{q,kk}_proj" {}', "kk", 'did you mean "**.k_proj" (4 layers)?'),
    ("llama", 'target linear "**.q_proj", "**.kk_proj" {}', '"**.kk_proj"', 'did you mean "**.k_proj"'),
    ("llama", 'target linear "**.layers.{0..3,7}.**.q_proj" {}', "7", "`model.layers` has 4 layers"),
    ("llama", 'target linear "**.q_proj" except "**.layers.9.**" {}', '"**.layers.9.**"', "leaves out no linear layer"),
    ("llama", 'target linear "**.q_proj" except "**.layers.{0,9}.**" {}', "9", "matches no linear layer"),
    ("llama", 'target linear "**.q_proj" except "**.k_proj" {}', '"**.k_proj"', "leaves out no"),
    ("resnet", 'target any "**.convolution", attention {}', "attention", "selector `attention` matches no layer"),
    ("llama", 'target linear "**.q_proj" {}\ntrain "**.nrom.weight"', '"**.nrom.weight"',
     '"**.norm.weight" (1 parameter)'),
    ("bert", 'target linear "**.query" {}\ntrain "classifier"', '"classifier"',
     'did you mean "classifier.*" (2 parameters)?'),
    ("bert", 'target linear "**.query" {}\ntrain "classifier.{weight,bais}"', "bais",
     '"classifier.bias" (1 parameter)'),
]


@pytest.mark.parametrize(("model", "header", "place", "words"), WARNINGS)
def test_warnings(model, header, place, words):
    (found,) = run(model, header).warnings
    assert (found.code, found.severity) == ("dead-name", "warning")
    assert found.span.source.text[found.span.start:found.span.end] == place
    assert any(words in line for line in (found.message, *found.notes, *found.helps))


@pytest.mark.parametrize("header", [
    'target linear "**.{q,k}_proj" except "**.layers.{0,-1}.**" {}',
    "target linear attention {}",
    "target linear except attention {}",
    'target linear except "lm_head" {}',
    'target linear "**.{q,k}_proj" {}\ntrain "**.norm.weight", "lm_head.*"',
])
def test_no_warnings(header):
    assert run("llama", header).warnings == ()


# ------------------------------------------------------------------------------------------ overlaps and overrides


@pytest.mark.parametrize(("header", "help"), [
    ('target linear "**.q_proj" {}\ntarget linear "**.layers.0.**" {}', "`except`"),
    ('target linear "**.q_proj" {}\ntarget linear "**.layers.0.**.q_proj" {}',
     "`override target` lets the target at s.surg:3"),
    ('target linear "**.q_proj" {}\ntarget any "**.q_proj" {}', "`except`"),
])
def test_an_overlap_shows_both_lines(header, help):
    error = failure("llama", header)
    (found,) = error.diagnostics
    assert found.code == "overlap" and "`model.layers.0.self_attn.q_proj`" in found.message and help in found.helps[0]
    assert "s.surg:3:" in str(error) and "s.surg:2:" in str(error)


@pytest.mark.parametrize("header", ["target linear {}\ntarget linear attention {}",
                                    "target linear attention {}\ntarget linear {}"])
def test_an_overlap_of_targets_without_patterns(header):
    assert failure("llama", header).diagnostics[0].code == "overlap"


def _owners(header: str) -> dict[str, int]:
    return {name.removeprefix("model.layers."): t.number for name, t in run("llama", header).targets.items()}


def test_an_override_takes_a_strict_subset():
    assert _owners('target linear "**.q_proj" {}\noverride target linear "**.layers.{-1}.**.q_proj" {}') == {
        "0.self_attn.q_proj": 0, "1.self_attn.q_proj": 0, "2.self_attn.q_proj": 0, "3.self_attn.q_proj": 1}


def test_overrides_nest():
    assert list(_owners('override target linear "**.layers.0.**.q_proj" {}\ntarget linear "**.q_proj" {}\n'
                        'override target linear "**.layers.{0,1}.**.q_proj" {}').values()) == [0, 2, 1, 1]


@pytest.mark.parametrize(("header", "words"), [
    ('target linear "**.q_proj" {}\noverride target linear "**.q_proj" {}', "both take 4 modules"),
    ('target linear "**.q_proj" {}\noverride target linear "**.layers.0.self_attn.*" {}', "it also takes"),
    ('target linear "**.q_proj" {}\noverride target linear "**.k_proj" {}', "overrides nothing"),
    ('override target linear "**.k_proj" {}', "overrides nothing"),
    ('target linear "**.{q,k}_proj" {}\noverride target linear "**.layers.{0,1}.**.{q,k}_proj" {}\n'
     'override target linear "**.layers.{1,2}.**.{q,k}_proj" {}', "it also takes"),
    ('target linear "**.q_proj" {}\noverride target linear "**.layers.{0,1}.**.q_proj" {}\n'
     'override target linear "**.layers.{2,3}.**.q_proj" {}', "nothing is left of this target"),
])
def test_an_override_that_is_not_narrower(header, words):
    (found,) = failure("llama", header).diagnostics
    assert found.code == "not-narrower" and words in found.message


# ---------------------------------------------------------------------------------------------------- tied weights


def _tied(model: nn.Module) -> dict:
    return tied(Survey(model))


def test_tied_weights_are_found_by_storage():
    model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Linear(3, 4), "c": nn.Linear(3, 4)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    assert _tied(model) == {"a.weight": ("b.weight",), "b.weight": ("a.weight",)}
    assert failure(model, 'target linear "b" {}').diagnostics[0].code == "tied-weight"
    assert taken(model, 'target linear "b" untie {}') == ["b"] and taken(model, 'target linear "c" {}') == ["c"]


@pytest.mark.parametrize("view, is_tied", [
    (lambda w: w.T, True), (lambda w: w[:, :4], True), (lambda w: w[3:], True), (lambda w: w[::2], True),
    (lambda w: w.flatten()[5:29].view(4, 6), True), (lambda w: w[1:2].expand(3, 8), True),
    (lambda w: w[:, 5:], False), (lambda w: w[:, 5:7].T, False), (lambda w: w.clone(), False)])
def test_weights_are_tied_that_have_a_number_in_common(view, is_tied):
    """Whatever the shape in which each sees the memory; halves of a matrix's columns lie in turns and have none."""
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6)})
    whole = model["a"].weight.data
    model["a"].weight = nn.Parameter(whole[:, :5] if not is_tied else whole)
    model["b"].weight = nn.Parameter(view(whole))
    assert _tied(model) == ({"a.weight": ("b.weight",), "b.weight": ("a.weight",)} if is_tied else {})


def test_a_vector_that_weights_are_parts_of_is_tied_to_each():
    model, flat = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)}), nn.Parameter(torch.zeros(20))
    model["a"].weight, model["b"].weight = nn.Parameter(flat[:8].view(2, 4).data), nn.Parameter(flat.data[8:].view(3, 4))
    assert _tied(model) == {}
    model.register_parameter("flat", flat)
    assert _tied(model) == {"flat": ("a.weight", "b.weight"), "a.weight": ("flat",), "b.weight": ("flat",)}
    assert failure(model, 'target linear "b" { add low_rank(rank = 1) }\ntrain "flat"').diagnostics[0].code == "tied-weight"


def test_a_bias_that_two_layers_share_is_not_changed_at_one():
    """b' would stand in both once it is merged. What a head calls its bias beside its decoder's, as BERT's, is that one."""
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["a"].bias = model["b"].bias
    for steps in ("add shift()", "pre diagonal() with bias"):
        with pytest.raises(SurgeryError, match="tied-weight.: `a.bias` is tied to `b.bias`"):
            plan(model, spec_of(f'target linear "**" untie {{ {steps} }}'))
    assert len(plan(model, spec_of('target linear "**" { add low_rank(1)  pre diagonal() }')).placed) == 2
    head = nn.ModuleDict({"decoder": nn.Linear(3, 4)})
    head.register_parameter("bias", head["decoder"].bias)
    for root in (head, nn.ModuleDict({"cls": head})):
        assert len(plan(root, spec_of('target linear "**" { add shift() }')).placed) == 1


def test_tied_weights_on_the_meta_device():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Linear(3, 4), "c": nn.Linear(3, 4)})
    assert _tied(model) == {}
    model["b"].weight = model["a"].weight
    assert _tied(model) == {"a.weight": ("b.weight",), "b.weight": ("a.weight",)}


def test_a_skeleton_whose_config_ties_counts_as_tied():
    model = load_demo("gpt2").to("meta")
    model.lm_head.weight = nn.Parameter(torch.empty(256, 64, device="meta"))
    assert _tied(model)["lm_head.weight"] == ("transformer.wte.weight",)
    real = load_demo("gpt2")
    real.lm_head.weight = nn.Parameter(real.lm_head.weight.detach().clone())
    assert _tied(real) == {}


def test_one_module_at_two_names_is_not_tied():
    shared = nn.Linear(2, 2)
    assert _tied(nn.ModuleDict({"a": shared, "b": shared})) == {}


# ----------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(("model", "patterns", "names"), [
    ("llama", '"**.norm.weight"', ["model.norm.weight"]),
    ("bert", '"classifier.*"', ["classifier.weight", "classifier.bias"]),
    ("llama", '"**.layers.{-1}.*.weight", "model.norm.*"',
     ["model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight", "model.norm.weight"]),
    ("gpt2", '"lm_head.weight"', ["transformer.wte.weight"]),
    ("mixtral", '"**.layers.0.mlp.gate.weight"', ["model.layers.0.mlp.gate.weight"]),
])
def test_train_names_parameters(model, patterns, names):
    taken = '"**.layers.0.**.query", "**.layer.0.**.query"' if model == "bert" else "attention"
    assert list(run(model, f"target linear {taken} {{}}\ntrain {patterns}").train) == names


def test_a_targeted_weight_cannot_be_trained_too():
    (found,) = failure("llama", 'target linear "**.q_proj" {}\ntrain "**.layers.0.**"').diagnostics
    assert found.code == "overlap" and "`model.layers.0.self_attn.q_proj.weight`" in found.message


def test_train_alone_is_a_spec():
    assert run("llama", 'train "lm_head.weight"').train == ("lm_head.weight",)


# --------------------------------------------------------------------------------------------------------- explain

EXPLAINED = '''target linear "**.{q,k}_proj" except "**.layers.0.**" {}
override target linear "**.layers.3.**.q_proj" {}
target linear in LlamaMLP {}
train "**.norm.weight"'''


@pytest.mark.parametrize(("name", "words"), [
    ("model.layers.1.self_attn.q_proj", ["taken by the target at s.surg:2", 'pattern "**.{q,k}_proj" at s.surg:2:15']),
    ("model.layers.3.self_attn.q_proj", ["taken by the target at s.surg:3", "overrides the target at s.surg:2"]),
    ("model.layers.1.mlp.up_proj", ["taken by the target at s.surg:4", "no pattern"]),
    ("model.layers.0.self_attn.q_proj", ["not taken", 'the `except` of the target at s.surg:2', '"**.layers.0.**"']),
    ("model.layers.1.self_attn.v_proj", ["not taken", "no pattern of the target at s.surg:2", "`linear in LlamaMLP`"]),
    ("model.embed_tokens", ["not taken", "is for `linear`, and this is `embedding`"]),
    ("model.norm", ["cannot be taken", "LlamaRMSNorm has no weight matrix", "`train` unfreezes `model.norm.weight`"]),
    ("model.layers", ["cannot be taken", "ModuleList only holds other modules"]),
    ("model.norm.weight", ["is a parameter", "`train` unfreezes"]),
    ("lm_head.weight", ["is a parameter", "no `train` unfreezes it"]),
])
def test_explain(name, words):
    text = run("llama", EXPLAINED).explain(name)
    assert all(w in text for w in words)


def test_explain_the_head():
    assert "the output head" in run("llama", "target linear {}").explain("lm_head")


def test_explain_a_name_that_is_not_there():
    with pytest.raises(SurgeryError, match=re.escape("did you mean `model.layers.1.self_attn.q_proj`?")):
        run("llama", EXPLAINED).explain("model.layers.1.self_attn.q_porj")


@pytest.mark.parametrize(("name", "words"), [
    ("q_proj", "did you mean `model.layers.0.self_attn.q_proj`? So end `model.layers.{0..3}.self_attn.q_proj`"),
    ("layers.2.mlp", "did you mean `model.layers.2.mlp`?"), ("roj", "")])
def test_explain_a_name_that_others_end_with(name, words):
    with pytest.raises(SurgeryError) as caught:
        run("llama", EXPLAINED).explain(name)
    assert caught.value.diagnostics[0].helps == ((words,) if words else ())


def test_a_router_is_taken_by_a_pattern_that_names_it_alone():
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    for text in ('target linear "**.mlp.gate" {}', 'target any "**.{q_proj,gate}" {}'):
        found = run("mixtral", text)
        assert [name for name in found.targets if name.endswith("gate")] == gates
        assert not {name for name, *_ in found.left_out} & {*gates}
    assert "is taken by" in found.explain(gates[0])
    for text in ("target linear {}", 'target linear "**" {}', 'target any "**.mlp.*", "**.q_proj" {}'):
        found = run("mixtral", text)
        assert not {*found.targets} & {*gates} and {name for name, *_ in found.left_out} >= {*gates}


def test_left_out_says_why():
    left_out = {name: (reason, site) for name, reason, site in run("mixtral", "target linear {}").left_out}
    assert "output head" in left_out["lm_head"][0] and left_out["lm_head"][1].is_head
    assert left_out["model.embed_tokens"][0] == "no target asks for it"
    reason, site = left_out["model.layers.0.mlp.gate"]
    assert "MixtralTopKRouter" in reason and site is None
    assert "model.norm" not in left_out


# ----------------------------------------------------------------------------------------------------------- scale


def test_a_large_skeleton():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                         num_key_value_heads=8)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    chosen = run(model, 'target linear attention {}\ntarget linear mlp except "**.layers.{-4..-1}.**" {}')
    assert len(chosen.targets) == 4 * 80 + 3 * 76
    assert all(site.weight.is_meta for site, _, _ in chosen.targets.values())


def test_the_model_is_only_looked_at():
    model = load_demo("llama")
    before = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    run(model, 'target linear attention {}\ntrain "**.norm.weight"')
    assert before == {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}


def test_a_select_given_by_hand():
    spec = spec_of("target linear mine {}")
    chosen = select(demo("llama"), spec, {"mine": Select(name="mine", patterns=("**.q_proj", "**.nothing"))})
    assert len(chosen.targets) == 4


@pytest.mark.parametrize("pattern", ["all-linear", "all_linear", "Linear"])
def test_every_linear_layer_is_asked_for_without_a_pattern(pattern):
    spec = parse_text(f'target "{pattern}" {{ add low_rank() }}')
    found = check(spec, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert "`target linear { ... }`" in found[0].helps[0]
