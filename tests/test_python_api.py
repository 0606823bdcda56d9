"""What the command line does, Python users have as functions that give the same."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.models.demo import load_demo

WRONG = 'spec wrong\ntarget linear "**.nope" { add low_rank(4) }\n'


def command(*words: object) -> dict:
    """What a command prints as JSON."""
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    return json.loads(result.stdout)


def test_check_gives_all_that_is_wrong_and_raises_nothing(tmp_path: Path) -> None:
    assert surgery.check("lora") == []
    assert [d.code for d in surgery.check("no_such_spec")] == ["unknown-spec"]
    (tmp_path / "broken.surg").write_text("target linear { add low_rnk() }\n")
    assert [d.code for d in surgery.check(tmp_path / "broken.surg")] == ["unknown-definition"]
    spec = surgery.parse(WRONG)
    assert surgery.check(spec) == []
    (tmp_path / "wrong.surg").write_text(WRONG)
    of_model = [d.code for d in surgery.check(spec, load_demo("llama"))]
    told = command("check", tmp_path / "wrong.surg", "--model", "demo:llama")
    assert of_model == [d["code"] for d in told["diagnostics"]] and of_model


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "lm_head", "model.norm"])
def test_explain(name: str) -> None:
    assert surgery.explain(load_demo("llama"), "lora", name) == command("explain", "lora", "demo:llama", name)["text"]


@pytest.mark.parametrize("pattern", [None, "**.mlp.*"])
def test_modules(pattern: str | None) -> None:
    found = surgery.modules(load_demo("llama"), pattern)
    assert found == command("modules", "demo:llama", *filter(None, [pattern]))["modules"] and found
    with pytest.raises(surgery.SurgeryError, match="matches no module"):
        surgery.modules(load_demo("llama"), "**.nope")


def test_load_model() -> None:
    model = surgery.load_model("demo:llama", "bfloat16")
    assert type(model) is type(load_demo("llama")) and {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}


def test_bench_takes_files_names_and_specs() -> None:
    rows = surgery.bench(load_demo("llama"), ["lora", surgery.load("ia3")], tokens=(1, 4), repeat=1)
    assert [row["name"] for row in rows] == ["frozen", "lora", "ia3"] and all(row["step_ratio"] > 0 for row in rows)


def test_a_page_is_that_of_the_command(tmp_path: Path) -> None:
    surgeon = surgery.apply(load_demo("llama"), "lora")
    surgeon.save(tmp_path / "adapter", base_model="demo:llama")
    written = surgery.report_page(tmp_path / "adapter", tmp_path / "python.html")
    command("report", tmp_path / "adapter", "-o", tmp_path / "command.html")
    assert written.file.read_text() == (tmp_path / "command.html").read_text()
    assert len(written.spectra.rows) == len(surgeon.plan.placed)


@pytest.mark.parametrize("name", [name for name in surgery.__all__ if callable(getattr(surgery, name))])
def test_a_public_callable_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(surgery, name))


def test_dir_holds_the_public_names_and_no_more() -> None:
    assert dir(surgery) == sorted(surgery.__all__)


# ------------------------------------------------------------------------------------------------ objects show themselves


@pytest.fixture(scope="module")
def surgeon() -> surgery.Surgeon:
    return surgery.apply(load_demo("llama"), "dora")


def test_a_spec_is_its_text_and_briefly_what_it_holds() -> None:
    spec = surgery.load("dora")
    assert str(spec) == spec.to_surg() and surgery.parse(str(spec)) == spec
    assert repr(spec) == "<Spec dora(rank, alpha, dropout): target linear>"
    assert repr(surgery.Spec()) == "<Spec without a name(): empty>"
    ours = surgery.parse('target linear "**.q_proj", attention { add low_rank(8) }\ntrain "**.bias"\n'
                         'select attention = "**.k_proj"\nupdate u() { param v[out, in] = 0 return v }\n')
    assert repr(ours) == '<Spec without a name(): 1 definition; target linear "**.q_proj", attention; train "**.bias">'
    assert repr(ours.targets[0]) == '<target linear "**.q_proj", attention { add low_rank(8) }>'


@pytest.mark.parametrize("of", [lambda s: s, lambda s: s.plan, lambda s: s.report(), surgery.spectrum,
                                lambda s: surgery.spectrum(s).rows[0].spectrum])
def test_a_repr_is_one_short_line(of, surgeon: surgery.Surgeon) -> None:
    text = repr(of(surgeon))
    assert text.startswith("<") and "\n" not in text and len(text) < 200


def test_a_surgeon_says_its_mode() -> None:
    surgeon = surgery.apply(load_demo("llama"), "lora")
    assert "operated on, not merged" in repr(surgeon)
    surgeon.merge()
    assert "merged: 28 weights" in repr(surgeon)
    surgeon.remove()
    assert "given back" in repr(surgeon)


def test_an_adapter_shows_its_formula_and_shapes(surgeon: surgery.Surgeon) -> None:
    text = repr(surgeon.model.model.layers[0].self_attn.q_proj)
    assert "weight' = diag(m / detach(row_norm(W + 2 B A))) (W + 2 B A)" in text and "A [16, 64], B [64, 16]" in text


def test_a_formula_that_shares_parts_is_shown_in_bounds() -> None:
    """Written out, it would have 2^24 factors."""
    lines = [f"let x{i + 1} = x{i} * x{i}" for i in range(24)]
    body = "\n  ".join(["param x0[out, in] = 0", *lines, "return x24"])
    spec = surgery.parse(f"update u() {{\n  {body}\n}}\ntarget linear \"**.q_proj\" {{ add u() }}\n")
    surgeon = surgery.apply(load_demo("llama"), spec, check=False)
    assert len(repr(surgeon.adapters["model.layers.0.self_attn.q_proj"])) < 300


@pytest.mark.parametrize("of", [lambda s: s.plan, lambda s: s.report(), surgery.spectrum])
def test_a_notebook_shows_a_table(of, surgeon: surgery.Surgeon) -> None:
    html = of(surgeon)._repr_html_()
    assert html.count("<table>") == 1 and "<th" in html and html.endswith("</p>")


@pytest.mark.parametrize("name", surgery.shipped())
def test_the_python_of_a_spec_is_what_a_person_would_write(name: str) -> None:
    text = command("show", name, "--emit", "python")["text"]
    scope: dict = {}
    exec(text, scope)
    assert scope["spec"] == surgery.load(name)
    assert "Step(" not in text and "Call(" not in text and "'" not in text.replace("\\'", "")
