"""`surgery report`: one page that needs nothing else, says what the figures say, and holds whatever it is given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from models import perturbed
from torch import nn

import surgery
from surgery.analysis.page import charts, training_curves
from surgery.analysis.spectra.curves import Curve
from surgery.cli.main import main
from surgery.html import Markup, table, tag
from surgery.layers.survey import Survey
from surgery.matching.module_tree import outline
from surgery.models.demo import load_demo

STATE = {"global_step": 20, "log_history": [
    {"step": 10, "epoch": 1.0, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": float("nan")},
    {"step": 10, "epoch": 1.0, "eval_loss": 2.4, "eval_accuracy": 0.5, "eval_runtime": 1.0,
     "eval_samples_per_second": 9.0},
    {"step": 20, "epoch": 2.0, "loss": 2.0, "learning_rate": 0.0, "grad_norm": 1.0},
    {"step": 20, "epoch": 2.0, "eval_loss": 2.2, "eval_accuracy": 0.75, "eval_runtime": 1.0},
    {"step": 20, "epoch": 2.0, "train_loss": 2.2, "train_runtime": 3.0, "total_flos": 1e9},
]}


class Strict(HTMLParser):
    """Keeps every tag and text; a tag that is not closed, or not opened, is an error."""

    VOID = {"meta"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def report(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["report", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moved SORA on demo:llama, and the state of a training beside it."""
    folder = tmp_path_factory.mktemp("run")
    perturbed(load_demo("llama"), "sora").save(folder / "adapter", base_model="demo:llama")
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    return folder / "adapter"


@pytest.fixture(scope="module")
def page(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "report.html"
    assert f"saved     {file}" in report(adapter, "-o", file)
    return file.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ page


def test_it_needs_nothing_else(page: str) -> None:
    found = parsed(page)
    assert {name for name, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "base", "a"})
    assert not {key for _, attributes in found.tags for key in attributes} & {"src", "href", "srcset", "onclick",
                                                                              "onload"}
    assert not re.search(r"url\(|@import|https?:", page)
    policies = [a["content"] for name, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page


def test_it_says_what_the_figures_say(page: str, adapter: Path) -> None:
    text = " ".join(parsed(page).texts)
    surgeon = surgery.attach(load_demo("llama"), adapter)
    spectra, found = surgery.spectrum(surgeon), surgeon.report()
    for words in ("W' = P (D W + 2 B A)", "post orthogonal(rank = skew_rank), orthogonal", "{0..3}",
                  "LlamaDecoderLayer",
                  f"{found.trainable:,}", f"{len(found.rows)}", "706.2 KiB", "no target asks for it", "learning rate"):
        assert words in text, words
    for row in spectra.rows:
        assert row.name in text and f"{row.spectrum.entropy:.2f}" in text
    assert f"{spectra.total.means['stable_rank']:.1f}" in text and str(adapter.parent) not in page


def test_the_same_adapter_gives_the_same_page(page: str, adapter: Path, tmp_path: Path) -> None:
    report(adapter, "-o", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_what_a_spec_says_is_text_and_no_html(tmp_path: Path) -> None:
    text = ('# <script>alert(1)</script> & "more"\nspec s()\n'
            'target linear "**.q_proj" { add low_rank(2) }\ntrain "**.norm.weight"')
    surgeon = perturbed(load_demo("llama"), surgery.parse(text))
    surgeon.save(tmp_path / "a&b", base_model="demo:llama")
    report(tmp_path / "a&b", "-o", tmp_path / "r.html")
    found = parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "script" not in {name for name, _ in found.tags}
    assert '<script>alert(1)</script> & "more"' in found.texts and "a&b" in found.texts
    assert "trained" in found.texts


@pytest.mark.parametrize("name, spec", [("mixtral", "dora"), ("gpt2", "lora"), ("t5", "sora")])
def test_other_families(name: str, spec: str, tmp_path: Path) -> None:
    perturbed(load_demo(name), spec).save(tmp_path / "a", base_model=f"demo:{name}")
    report(tmp_path / "a", "-o", tmp_path / "r.html", "--squared")
    text = parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "σ² / Σ σ²" in " ".join(text.texts) and "Training" not in text.texts


def test_a_fresh_adapter(tmp_path: Path) -> None:
    surgery.apply(load_demo("llama"), "lora").save(tmp_path / "a", base_model="demo:llama")
    assert "none of them changed" in report(tmp_path / "a", "-o", tmp_path / "r.html")
    assert "Nothing yet" in " ".join(parsed((tmp_path / "r.html").read_text(encoding="utf-8")).texts)


def test_faults_come_before_the_work(adapter: Path, tmp_path: Path) -> None:
    assert "is a folder" in report(adapter, "-o", tmp_path, code=2)
    assert "error[bad-adapter]" in report(tmp_path, code=1)
    found = json.loads(report(adapter, "-o", tmp_path / "r.html", "--json"))
    assert found["training"].endswith("trainer_state.json") and len(found["modules"]) == 28


def test_colours_can_be_read() -> None:
    """WCAG 2.2: text has a contrast of at least 4.5, a curve of at least 3, in light and dark."""
    style = Path(charts.__file__).with_name("style.css").read_text(encoding="utf-8")
    for theme in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ground in ("paper", "panel"):
            assert all(contrast(colours[ink], colours[ground]) >= 4.5 for ink in ("ink", "soft"))
            assert all(contrast(colours[f"c{i}"], colours[ground]) >= 3 for i in range(charts.COLOURS))
        assert all(contrast(colours["ink"], colours[ground]) >= 4.5 for ground in ("mark", "trained"))


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# -------------------------------------------------------------------------------------------------------- training


def test_the_curves_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    assert training_curves.charts(tmp_path / "trainer_state.json") == {
        "loss": [Curve("training", (10, 20), (2.5, 2.0)), Curve("evaluation", (10, 20), (2.4, 2.2))],
        "accuracy": [Curve("evaluation", (10, 20), (0.5, 0.75))],
        "learning rate": [Curve("training", (10, 20), (1e-3, 0.0))]}


def test_the_nearest_state_of_the_longest_run(tmp_path: Path) -> None:
    def state(folder: Path, step: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
        return folder / "trainer_state.json"

    folder = tmp_path / "run" / "a [1]"
    folder.mkdir(parents=True)
    assert training_curves.found_state(folder) is None
    state(tmp_path / "run" / "checkpoint-5", 5)
    beside = state(tmp_path / "run" / "checkpoint-10", 10)
    assert training_curves.found_state(folder) == beside
    inside = state(folder, 3)
    assert training_curves.found_state(folder) == inside


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"log_history": [{"loss": 1}]}',
                                  '{"log_history": [{"step": "x"}]}'])
def test_a_state_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(surgery.SurgeryError, match=r"bad-data\]: cannot read .*trainer_state.json"):
        training_curves.found_state(tmp_path)


# ---------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("values", [(0.0, 1.0), (5.0,), (0.0,), (-3.0, -2.9), (1e-9, 2e-9), (0.0, 1e7), (2.2, 3.1)])
@pytest.mark.parametrize("whole", [False, True])
def test_an_axis_holds_its_values_and_has_ticks(values, whole) -> None:
    axis = charts.Axis.around(values, 50, 400, whole=whole)
    assert all(50 < axis.at(v) < 400 for v in values)
    ticks = axis.ticks()
    assert all(50 <= axis.at(t) <= 400 for t in ticks) and len(ticks) <= 8
    assert whole or len(ticks) >= 2
    assert not whole or all(float(t).is_integer() for t in ticks)


@pytest.mark.parametrize("values", [(1.0,), (1.0, 384.0), (1e-7, 0.4), (3.0, 4.0)])
def test_a_logarithmic_axis(values) -> None:
    axis = charts.Axis.around(values, 270, 26, is_log=True)
    assert all(26 <= axis.at(v) <= 270 for v in (*values, *axis.ticks())) and axis.ticks()
    if len(values) > 1:
        middle = (values[0] * values[1]) ** 0.5
        assert axis.at(middle) == pytest.approx((axis.at(values[0]) + axis.at(values[1])) / 2)


def test_a_chart_has_a_line_and_dots_for_each_curve() -> None:
    curves = [Curve("b <i>", (0, 1, 2), (1, 2, 3)), Curve("a", (1,), (2,))]
    found = parsed(charts.chart("a title", curves, "layer", labels=["a", "b <i>"]))
    groups = [a["class"] for name, a in found.tags if name == "g"]
    assert groups == ["curve c1", "curve c0"] and sum(name == "circle" for name, _ in found.tags) == 4
    assert "b <i>: 2 at 1" in found.texts
    long = Curve("a", tuple(range(500)), tuple(range(500)))
    assert "circle" not in {name for name, _ in parsed(charts.chart("t", [long], "x")).tags}
    assert charts.colour(9) == "curve c1 d1"


def test_elements_escape_what_is_not_markup() -> None:
    assert tag("p", "<", Markup("<b>"), None, class_="a\"b", aria_label=None) == '<p class="a&quot;b">&lt;<b></p>'
    assert "<th scope=\"row\">&amp;</th><td>1</td>" in table(["x", "y"], [("&", 1)])


# ------------------------------------------------------------------------------------------------- tree and costs


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "resnet"])
def test_an_outline_names_every_module_once(name: str) -> None:
    model = load_demo(name)
    wanted = {site.name for site in Survey(model).sites}
    found = [n for node in outline(model, wanted).walk() for n in node.names if n in wanted]
    assert sorted(found) == sorted(wanted)
    assert all(len(node.names) == 1 for node in outline(model, wanted, every=True).walk())


def test_layers_are_joined_where_they_and_their_marks_agree() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3))
    names = list(map(str, range(5)))
    assert [node.step for node in outline(model, names).children] == ["{0..1}", "{2..4}"]
    marked = outline(model, names, mark=lambda name: name == "3")
    assert [node.names for node in marked.children] == [("0", "1"), ("2",), ("3",), ("4",)]


def test_the_cost_of_a_target_is_that_of_its_weights() -> None:
    text = ('spec s\ntarget linear "**.q_proj" { add low_rank(2) }\n'
            'target linear "**.k_proj" { add low_rank(8) post orthogonal(2) }')
    found = surgery.apply(load_demo("llama"), surgery.parse(text)).report()
    cheap, dear = map(found.step_ratio_of, found.plan.spec.targets)
    assert 1 < cheap < found.step_ratio < dear
    only = surgery.parse('spec s\ntarget linear "**.q_proj" { add low_rank(2) }')
    assert surgery.apply(load_demo("llama"), only).report().step_ratio == cheap


def test_memory_counts_the_base_model_alone() -> None:
    model = load_demo("llama")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert surgery.apply(model, "lora").report().memory["base"] == size
