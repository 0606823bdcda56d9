"""Long, deep and endless input: as much work as there is text, or a diagnostic, and never `a bug in surgery`.

On code that walks a shared formula without a memory, or matches by trying every way, the cases here take hours.
"""

import json
import pickle
import tempfile
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.diagnostics import Collector, Diagnostic, Source, Span, SurgeryError, fail
from surgery.ir.expression import DEEPEST_FORMULA, Expr
from surgery.ir.operations import make
from surgery.language.formatter import format_text
from surgery.language.library import library, parse
from surgery.language.parser import parse_expression
from surgery.matching.patterns import compile_pattern
from surgery.planning.check import check
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.evaluate import evaluate

# What each `let` makes of the one before it.
CHAINS = {
    "entrywise squares": "{x} * {x}", "sums": "{x} + {x}", "products": "{x} @ {x}.T @ {x}", "mixed": "{x} + g * {x}",
    "functions": "tanh({x}) - {x}", "extremes": "min({x}, abs({x}))", "transposes": "({x}.T * {x}.T).T",
    "norms": "{x} / (1 + norm({x} @ {x}.T))", "rows": "diag(1 + row_norm({x})) @ {x}",
}


def chain(step: str, length: int) -> str:
    lets = "".join(f"  let x{i} = {step.format(x=f'x{i - 1}')}\n" for i in range(1, length + 1))
    head = "update u {\n  param g[out, in] = 0\n  let x0 = g\n"
    return f"{head}{lets}  return x{length}\n}}\ntarget linear {{ add u() }}\n"


def run(*arguments: str, text: str = "", status: int = 0):
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("spec.surg").write_text(text, encoding="utf-8")
        result = CliRunner().invoke(main, arguments)
    assert "a bug in surgery" not in result.stderr, result.stderr[:500]
    assert result.exit_code == status, result.output[:500]
    return result


@pytest.mark.parametrize("step", CHAINS.values(), ids=CHAINS)
def test_a_formula_is_as_long_as_its_text(step):
    spec = parse(chain(step, 18))
    assert [d.code for d in check(spec) if d.severity == "error"] == []
    page = run("show", "spec.surg", text=chain(step, 18)).stdout
    assert len(page) < 6000
    assert len(run("show", "spec.surg", "--emit", "ir", text=chain(step, 18)).stdout) < 20_000
    assert len(run("show", "spec.surg", "--program", "--shape", "24,16", text=chain(step, 18)).stdout) < 60_000


def test_each_symbol_of_a_long_formula_is_explained_once():
    page = run("show", "spec.surg", text=chain("{x} * {x}", 30)).stdout
    lines = [line.split() for line in page.splitlines() if line.startswith("    S")]
    assert len({words[0] for words in lines}) == len(lines) >= 25
    assert all(words[1] == "=" for words in lines)


@pytest.mark.parametrize("step", [CHAINS["products"], CHAINS["rows"], CHAINS["mixed"]])
def test_a_large_formula_computes_what_it_says(step):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, dtype=torch.float64))
    surgeon = surgery.apply(model, parse(chain(step, 12)))
    x = torch.randn(5, 6, dtype=torch.float64)
    weight, bias = (p.detach().clone() for p in (model[0].weight, model[0].bias))
    (g,) = surgeon.parameters()
    with torch.no_grad():
        g.copy_(torch.linalg.qr(torch.randn(6, 4))[0].T * (1 if step == CHAINS["products"] else 0.001))
    value = g.double()
    for _ in range(12):
        value = {CHAINS["products"]: lambda v: v @ v.T @ v, CHAINS["mixed"]: lambda v: v + g.double() * v,
                 CHAINS["rows"]: lambda v: (1 + v.norm(dim=1, keepdim=True)) * v}[step](value)
    expected = x @ (weight + value).T + bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("text", [
    chain("{x} + g * {x}", 1000),
    "target linear {\n" + "  add low_rank(rank = 2)\n" * 1000 + "}\n",
    "target linear {\n" + "  pre diagonal()\n" * 1000 + "}\n",
], ids=["lets", "updates", "transforms"])
@pytest.mark.parametrize("verb", ["check", "show"])
def test_a_deep_formula_is_told_once(text, verb):
    result = run(verb, "spec.surg", text=text, status=1)
    assert result.stderr.count("error[") == result.stderr.count("error[too-large]") == 1


@pytest.mark.parametrize("step", ["  add low_rank(rank = 2) dropout(10%)\n", "  pre diagonal()\n",
                                  "  post orthogonal(rank = 1) on out with bias\n"])
def test_nearly_too_deep_is_computed(step):
    count = next(n for n in range(DEEPEST_FORMULA, 0, -1) if fits(step * n))
    assert count >= 30
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    surgeon = surgery.apply(model, parse("target linear {\n" + step * count + "}\n"))
    model(torch.randn(2, 6)).sum().backward()
    surgeon.merge()


def fits(steps: str) -> bool:
    spec, report = parse("target linear {\n" + steps + "}\n"), Collector()
    elaborate(spec.targets[0], Context(library(spec), {}), 4, 6, report)
    return not report.errors


@pytest.mark.parametrize("text", ["(" * 2000 + "A" + ")" * 2000, "abs(" * 2000 + "A" + ")" * 2000,
                                  "A" + " + A" * 2000, "-" * 2000 + "A"])
def test_a_deep_expression_is_a_diagnostic(text):
    result = run("fmt", "spec.surg", text=f"check {text} == 1\n", status=1)
    assert "nested more than" in result.stderr
    assert len(result.stderr) < 2000


def test_a_deep_expression_of_the_compiler_can_be_pickled_and_shown():
    node = Expr("param", (), "a.b", (2, 2))
    for _ in range(3000):
        node = make("add", node, make("exp", node))
    assert pickle.loads(pickle.dumps(node)) is node
    assert len(repr(node)) < 100


@pytest.mark.parametrize("text", [
    "let x0 = out + in", "let x0 = 2 * out", "let x0 = 1 / 3", "let x0 = min(out, in)", "let x0 = 1 + 1 / out"])
@pytest.mark.parametrize("step", ["{x} * {x}", "{x} * {x} / ({x} + 1)", "max({x}, {x} + {x})"])
def test_sizes_do_not_grow_without_end(text, step):
    lets = "".join(f"  let x{i} = {step.format(x=f'x{i - 1}')}\n" for i in range(1, 60))
    found = check(parse(f"update u {{\n  {text}\n{lets}  param g[out, in] = 0\n  return x59 * g\n}}\n"))
    assert all(len(d.render()) < 3000 for d in found)


# ------------------------------------------------------------------------------------------- many of one kind


def test_thousands_of_statements():
    text = "\n\n".join(f"# about {i}\nselect s{i} = \"**.a{i}\"  # beside" for i in range(2000))
    assert format_text(text).count("# about") == 2000


def test_comments_between_parameters_and_statements_stay():
    text = "spec t(\n" + "".join(f"  # above {i}\n  p{i}: int = 1,  # beside {i}\n" for i in range(1000)) + ")\n"
    assert format_text(text).count("#") == 2000


@pytest.mark.parametrize(("pattern", "name", "takes"), [
    ("**." * 40 + "zz", "a." * 40 + "z", False), ("**." * 40 + "z", "a." * 20 + "z", True),
    ("*." * 30 + "z", "a." * 30 + "z", True),

    ("**.*." * 20 + "z", "a." * 20 + "z", True), ("**.*." * 20 + "z", "a." * 19 + "z", False),
    ("*a" * 30, "a" * 60, True), ("*a" * 30 + "b", "a" * 4000, False), ("*{1..20}*a" * 8, "1a" * 100, True),
    ("*{1000..1001,0}?" * 5 + "*", "1000" * 30, True), ("a?*?*?*b", "axyb", False), ("a?*?*?*b", "axyzb", True),
    ("**.**", "a", True), ("**.a.**.b.**", "a.b", True), ("**.a.**.a.**", "x.a.y", False),
])
def test_a_pattern_tries_no_way_twice(pattern, name, takes):
    assert compile_pattern(pattern).matches(name, {}) is takes


def test_places_from_the_end_within_many_stars():
    glob = compile_pattern("**.h.**.{-2..-1}.*a*b*")
    assert glob.matches("m.h.3.xaxb", {"m.h": 4}) and not glob.matches("m.h.1.xaxb", {"m.h": 4})


def test_selects_of_selects():
    twice = "".join(f"select s{i} = s{i - 1}, s{i - 1}\n" for i in range(1, 60))
    deep = "".join(f"select s{i} = s{i - 1}\n" for i in range(1, 1500))
    for text, last in ((twice, 59), (deep, 1499)):
        assert check(parse(f'select s0 = "**.a"\n{text}target linear s{last} {{ add low_rank() }}')) == []
    (found,) = check(parse("select a = b\nselect b = a, a\ntarget linear a { add low_rank() }"))[:1]
    assert found.code == "unknown-selector" and "made of itself" in found.message


@pytest.mark.parametrize(("numbers", "divisor"), [("12", 3), ("12, 5", 4), ("12, 99", 12), ("13, 12", 1), ("1", 1),
                                                  ("36", 6), (f"{2**39}, {2**38 + 1}", 2**38)])
def test_divisors(numbers, divisor):
    assert evaluate(parse_expression(f"divisor({numbers})"), {}) == divisor


def test_a_divisor_that_takes_too_long_to_find():
    with pytest.raises(SurgeryError, match="too large"):
        evaluate(parse_expression(f"divisor({2**63 - 1})"), {})


def test_a_hundred_thousand_names():
    from surgery.peft.target_modules import named

    inner = {"q": torch.nn.Linear(2, 2), "v": torch.nn.Linear(2, 2)}
    model = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict(inner)})
    names = [f"x{i}.q" for i in range(100_000)]
    assert named({"target_modules": [*names, "q"]}, model) == ["inner.q"]
    assert named({"target_modules": [*names, "nner.q"]}, model) == []
    assert named({"target_modules": [*names, "inner.q"]}, model) == ["inner.q"]


# --------------------------------------------------------------------------------------------- never our mistake


@pytest.mark.parametrize("text", ['use "a\0b"', f'use "{"a" * 5000}"', f'use "{"a/" * 3000}b"', 'use ""', 'use "."',
                                  'target linear "**.a{99999999999}" { add low_rank() }',
                                  'target linear "**.{99999999999..99999999999}" { add low_rank() }', "\0",
                                  "\ufeff\ufeff"])
@pytest.mark.parametrize("verb", ["check", "show"])
def test_odd_text(text, verb):
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("spec.surg").write_text(text, encoding="utf-8")
        result = CliRunner().invoke(main, [verb, "spec.surg"])
    assert "a bug in surgery" not in result.stderr
    assert result.exit_code in (0, 1) and bool(result.exit_code) is ("error[" in result.stderr), result.stderr[:300]
    assert len(result.stderr) < 3000


@pytest.mark.parametrize("arguments", [
    ["show", "sora", "--program", "--shape", "1" * 5000 + ",3"], ["show", "sora", "--program", "--shape", "٣,٤x"],
    ["show", "sora", "--program", "--tokens", "9" * 5000], ["check", "sora", "--set", "rank=" + "9" * 5000],
    ["check", "a\0b"], ["check", "a" * 5000], ["check", "a" * 5000 + ".surg"], ["plan", "sora", "demo:" + "a" * 5000],
    ["modules", "demo:llama", "**.*." * 50 + "x"]])
def test_odd_arguments(arguments):
    result = CliRunner().invoke(main, arguments)
    assert "a bug in surgery" not in result.stderr
    assert result.exit_code in (1, 2)
    assert len(result.stderr) < 8000


@pytest.mark.parametrize("text", [
    "target linear { add low_rank(9223372036854775807) }", "target linear { add low_rank(1152921504606846977) }",
    "update u { return 0 * I(4611686018427387904) } target linear { add u() }",
    "update u { let many = ones(4294967296, 4294967296) return 0 * norm(many) * W } target linear { add u() }",
])
def test_more_numbers_than_there_can_be(text):
    found = check(parse(text))
    assert found and all(d.code == "bad-value" and "more numbers than there can be" in d.message for d in found)


@pytest.mark.parametrize("arguments", [["plan", "lora", "demo:llama", "--set", "rank=9223372036854775807"],
                                       ["plan", "lora", "demo:llama", "--set", f"rank={2**58}"]])
def test_a_plan_of_more_numbers_than_there_can_be(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error[bad-value]: a tensor [")


# ------------------------------------------------------------------------------------------------- diagnostics


def test_what_is_found_twice_is_counted_once():
    found = Collector()
    twice = Diagnostic("syntax", "one")
    found.add(twice, twice)
    found.add(twice)
    found.error("syntax", "one")
    assert found.found == [twice] and found.errors == [twice]


def test_a_label_without_a_place_is_a_help():
    assert "did you mean `rank`?" in str(fail("unknown-parameter", "no `rnk`", label="did you mean `rank`?"))
    with pytest.raises(SurgeryError, match="did you mean `rank`"):
        surgery.load("sora", rnk=3)


def test_the_place_in_a_long_line_is_shown_and_not_the_line():
    text = "a" * 5000 + "!" + "b" * 5000
    shown = Diagnostic("syntax", "odd", Span(Source("x", text), 5000, 5001), label="here").render()
    line, carets = shown.splitlines()[3:5]
    assert len(line) < 250 and line[carets.index("^")] == "!"
    json.dumps(Diagnostic("syntax", "odd", Span(Source("x", text), 5000, 5001)).to_json())


# -------------------------------------------------------------------------------------------------------- peft


def exported(folder: Path, rank: int | None = None) -> dict:
    from surgery.peft.export_adapter import export_peft

    torch.manual_seed(0)
    surgeon = surgery.apply(torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4)}), surgery.load("lora", rank=2))
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    export_peft(surgeon, folder, rank=rank)
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_rank_beyond_the_matrix_is_the_matrix(tmp_path):
    assert exported(tmp_path / "a", rank=10**20)["r"] == 4


def test_an_adapter_that_names_a_hundred_thousand_modules(tmp_path):
    from surgery.peft.folder import Folder
    from surgery.peft.import_adapter import read

    config = exported(tmp_path / "a")
    config["target_modules"] = [*(f"x{i}" for i in range(100_000)), "q"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    others = {f"other{i}": torch.nn.Identity() for i in range(2000)}
    found = read(torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4), **others}), Folder(tmp_path / "a"))
    assert sum(d.code == "dead-name" for d in found.warnings) == 100_000
