"""What authors have beside `check`: settings of a project, words mended, a spec to begin with, two compared, an eye on files."""

from __future__ import annotations

import json
import re
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from command import run
from safetensors.torch import load_file, save_file
from small_text import save_causal

import surgery
from surgery import files
from surgery.editor.document import Document
from surgery.editor.scaffold import scaffold
from surgery.language.formatter import format_text
from surgery.language.library import parse
from surgery.models.demo import load_demo
from surgery.models.loading import skeleton
from surgery.planning.check import check
from surgery.planning.fixes import fixed
from surgery.settings import Settings, settings

WRONG = '# Mine.\nspec mine(rank: int = 4)\ntarget linear "**.q_proj" {\n  add low_rnk(rnk, alpa = 8)\n}\n'
RIGHT = '# Mine.\nspec mine(rank: int = 4)\ntarget linear "**.q_proj" {\n  add low_rank(rank, alpha = 8)\n}\n'
UNUSED = 'spec s(rank: int = 4, more: int = 3)%s\ntarget linear { add low_rank(rank) }\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path):
    with chdir(tmp_path):
        yield tmp_path


# --------------------------------------------------------------------------------------------------------- fixes


def test_fix_writes_what_was_surely_meant(here: Path) -> None:
    (here / "mine.surg").write_bytes(("\ufeff" + WRONG.replace("\n", "\r\n")).encode())
    assert run("check", "mine.surg").exit_code == 1
    result = run("check", "mine.surg", "--fix")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "`low_rnk` is now `low_rank`" in result.stdout and "mine.surg:4:" in result.stdout
    assert (here / "mine.surg").read_bytes() == ("\ufeff" + RIGHT.replace("\n", "\r\n")).encode()
    assert run("check", "mine.surg", "--fix").stdout == "mine.surg: ok\n"


@pytest.mark.parametrize("text", [
    "spec s(rank1: int = 4, rank2: int = 4)\ncheck rank1 == rank2\ntarget linear { add low_rank(rank) }",  # which?
    "update u { param A[2, in] = 1 param B[out, 2] = 0 return B @ A + b }\ntarget linear { add u() }",  # or B?
    'use "halp.surg"\ntarget linear { add low_rank() }',  # a file is not guessed
    "update u { param A[rnk, in] = 1 return A }\ntarget linear { add u() }",  # nothing near
    "update u { param A[in, 2] = 1 param AA[2, out] = 0 return A @ aa }\ntarget linear { add u() }",  # then it is wrong
])
def test_fix_leaves_what_is_not_sure(here: Path, text: str) -> None:
    (here / "help.surg").write_text("")
    (here / "s.surg").write_text(text)
    assert run("check", "s.surg", "--fix").exit_code != 0
    assert (here / "s.surg").read_text() == text and fixed(text, "s.surg") == (text, [])


def test_two_that_are_as_near_are_both_named() -> None:
    text = "spec s(rank1: int = 4, rank2: int = 4)\ntarget linear { add low_rank(rank) add low_rank(rank1 + rank2) }"
    (told, *_) = check(parse(text))
    assert told.label == "did you mean `rank1` or `rank2`?" and not told.meant


def test_what_ships_is_not_mended() -> None:
    result = run("check", "lora", "--fix")
    assert result.exit_code == 1 and "surgery init mine --from lora" in result.stderr


# --------------------------------------------------------------------------------------------------------- allow


@pytest.mark.parametrize(("comment", "codes"), [
    ("", ["unused"]), ("  # surgery: allow[unused]", []), ("  # surgery: allow[fallback, unused]", []),
    ("  # surgery: allow[fallback]", ["unused"]), ("\n# surgery: allow[unused]", ["unused"]),
    ("  # surgery: allow[unsued]", ["unused", "bad-settings"]),
])
def test_a_line_allows_a_warning(comment: str, codes: list[str]) -> None:
    found = check(parse(UNUSED % comment))
    assert sorted(d.code for d in found) == sorted(codes)
    assert all(d.label == "did you mean `unused`?" for d in found if d.code == "bad-settings")


def test_a_comment_of_its_own_allows_what_stands_below() -> None:
    assert check(parse("# surgery: allow[unused]\n" + UNUSED % "")) == []
    assert check(parse("# surgery: allow[unused]\n\n" + UNUSED % "")) != []


def test_no_error_is_allowed() -> None:
    text = "target linear { add low_rnk() }  # surgery: allow[unknown-definition]"
    assert [d.code for d in check(parse(text))] == ["unknown-definition"]


# ------------------------------------------------------------------------------------------------------- settings


def test_a_project_says_what_is_checked(here: Path) -> None:
    (here / "surgery.toml").write_text('paths = ["mine"]\nmodel = "demo:llama"\n[severity]\nunused = "error"\n')
    (here / "mine").mkdir()
    (here / "mine" / "a.surg").write_text(UNUSED % "")
    (here / "mine" / "b.surg").write_text('target "**.nope" { add low_rank(4) }')
    result = run("check")
    assert result.exit_code == 1 and "error[unused]" in result.stderr and "error[no-match]" in result.stderr
    assert run("check", "--model", "", "mine/b.surg").exit_code == 0
    (here / "surgery.toml").write_text('[severity]\nunused = "off"\nno-match = "off"\n')
    assert run("check", "mine/a.surg").stdout == "mine/a.surg: ok\n"
    assert run("check", "--model", "demo:llama", "mine/b.surg").exit_code == 1  # an error is always one
    below = here / "mine" / "deep"
    below.mkdir()
    assert settings(below).severity == {"unused": "off", "no-match": "off"} and settings(below).paths == ()


# Every command that says what is wrong with a spec.
ON_A_MODEL = ["plan s.surg demo:llama", "apply s.surg demo:llama -o out", "bench s.surg --model demo:llama --repeat 1 --tokens 1,4",
              "train s.surg demo:llama --data a.csv -o out", "compare s.surg --model demo:llama --data a.csv"]


@pytest.mark.parametrize("command", ON_A_MODEL)
def test_what_a_project_takes_for_an_error_stops_every_command(here: Path, command: str) -> None:
    (here / "s.surg").write_text(UNUSED % "")
    (here / "surgery.toml").write_text('[severity]\nunused = "error"\n')
    result = run(*command.split())
    assert result.exit_code == 1 and "error[unused]" in result.stderr and not (here / "out").exists()


@pytest.mark.parametrize("command", ON_A_MODEL[:3])
def test_commands_tell_a_warning_that_nothing_allows(here: Path, command: str) -> None:
    (here / "s.surg").write_text(UNUSED % "")
    assert run(*command.split()).stderr.count("warning[unused]") == 1
    (here / "surgery.toml").write_text('[severity]\nunused = "off"\n')
    off = run(*command.split(), *["--force"] * ("-o" in command))
    (here / "surgery.toml").unlink()
    (here / "s.surg").write_text(UNUSED % "  # surgery: allow[unused]")
    allowed = run(*command.split(), *["--force"] * ("-o" in command))
    assert (off.exit_code, off.stderr, allowed.exit_code, allowed.stderr) == (0, "", 0, "")


def test_a_warning_that_comes_when_all_is_done_ends_in_status_1(here: Path) -> None:
    (here / "s.surg").write_text('target linear "**.q_proj" { add low_rank(2) }')
    assert run("apply", "s.surg", "demo:llama", "-o", "out").exit_code == 0
    path = here / "out" / "meta.json"
    path.write_text(re.sub(r'(q_proj.weight": "float32 ).{8}', r"\1AACAPwAA", path.read_text()))
    told = run("merge", "out", "-o", "told")
    assert told.exit_code == 0 and "warning[another-base]" in told.stderr, told.output
    (here / "surgery.toml").write_text('[severity]\nanother-base = "error"\n')
    result = run("merge", "out", "-o", "merged")
    assert result.exit_code == 1 and "error[another-base]" in result.stderr


def test_a_wrong_file_of_settings_is_explained(here: Path) -> None:
    (here / "surgery.toml").write_text("modle = 1")
    assert run("help", "bad-settings").exit_code == 0 and run("plan", "--help").exit_code == 0
    assert run("plan", "lora", "demo:llama").exit_code == 2


@pytest.mark.parametrize(("text", "place", "words"), [
    ("modle = 1", (1, 1), "did you mean `model`?"), ("\nmodel = 1", (2, 1), "is the name of a model"),
    ('paths = "a"', (1, 1), "is a list of texts"), ("severity = 3", (1, 1), "a line for each code"),
    ('[severity]\nunsed = "off"', (2, 1), "did you mean `unused`?"),
    ('[severity]\nunused = "loud"', (2, 1), "must be off, warning or error"), ("a = ", (1, 1), "is not TOML"),
])
def test_settings_that_are_none(here: Path, text: str, place: tuple[int, int], words: str) -> None:
    (here / "surgery.toml").write_text(text)
    result = run("check", "lora")
    assert result.exit_code == 2 and f"surgery.toml:{place[0]}:{place[1]}" in result.stderr and words in result.stderr


def test_an_editor_takes_the_settings_too(here: Path) -> None:
    server = pytest.importorskip("surgery.editor.server")
    document = Document(str(here / "mine.surg"), UNUSED % "")
    (here / "surgery.toml").write_text('model = "demo:llama"\n[severity]\nunused = "off"\n')
    assert server.server.model_named(document) == "demo:llama"
    assert server.project_of(document).applied(document.findings()) == [] != document.findings()
    (here / "surgery.toml").write_text("modle = 1")
    assert server.project_of(document) == Settings()


# ----------------------------------------------------------------------------------------------------------- watch


def test_watch_checks_again_when_a_file_changes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "used.surg").write_text("update mine() { param A[out, in] = 0 return A }\n")
    (here / "s.surg").write_text('use "used.surg"\ntarget linear { add mine() }\n')
    edits = iter([lambda: None, lambda: (here / "used.surg").write_text("update mine() { return W.T }\n"),
                  lambda: (here / "s.surg").write_text("target linear { add low_rank() }\n")])

    def interrupt() -> None:
        raise KeyboardInterrupt

    def sleep(seconds: float) -> None:
        next(edits, interrupt)()

    monkeypatch.setattr(files, "sleep", sleep)
    result = run("check", "s.surg", "--watch")
    assert [line for line in result.stdout.splitlines()] == ["s.surg: ok", "s.surg: 1 error", "s.surg: ok"]
    assert result.stderr.count("error[shape-mismatch]") == 1 and result.exit_code == 130
    assert run("check", "s.surg", "--watch", "--json").exit_code == 2


# ------------------------------------------------------------------------------------------------------------ init


@pytest.mark.parametrize("base", [None, "lora", "dora", "boft", "vera", "bitfit"])
def test_a_spec_to_begin_with_is_right(base: str | None) -> None:
    text = scaffold("mine", base, "demo:llama")
    assert format_text(text) == text
    spec = parse(text)
    assert spec.name == "mine" and "# surgery: model = demo:llama" in text
    assert [d for d in check(spec, skeleton("demo:llama")) if d.severity == "error"] == []
    assert "{q_proj,k_proj,v_proj,o_proj," in text or not any(t.kind in ("linear", "any") for t in spec.targets)
    assert "lm_head" not in text


def test_init_writes_a_file_once(here: Path) -> None:
    result = run("init", "mine", "--from", "lora")
    assert result.exit_code == 0 and run("check", "mine.surg").exit_code == 0
    before = (here / "mine.surg").read_text()
    assert before == scaffold("mine", "lora")
    again = run("init", "mine.surg")
    assert again.exit_code == 2 and "error[bad-output]" in again.stderr and (here / "mine.surg").read_text() == before
    assert run("init", "mine", "--force").exit_code == 0 and "update mine_update" in (here / "mine.surg").read_text()
    for wrong in ("my-spec", "target"):
        assert run("init", wrong).exit_code == 1
    assert "error[unknown-spec]" in run("init", "other", "--from", "lroa").stderr and not (here / "other.surg").exists()


# ------------------------------------------------------------------------------------------------------------ diff


@pytest.mark.parametrize("spec", ["lora", "dora", "vera"])
def test_an_adapter_of_pefts_is_compared_with_one_of_ours(here: Path, spec: str) -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load(spec).retarget("**.q_proj"))
    surgeon.save("ours", base_model="demo:llama")
    surgery.export_peft(surgeon, "theirs", base_model="demo:llama")
    assert surgery.diff("ours", "theirs", skeleton("demo:llama")).tensors == {} == surgery.diff("theirs", "ours").tensors
    path = here / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1." in name)
    save_file({**tensors, name: tensors[name] + 1}, path)
    (changed,) = surgery.diff("ours", "theirs").tensors
    assert "layers.1." in changed and changed in run("diff", "theirs", "ours").stdout
    assert run("diff", "theirs", "lora").exit_code == 1


def test_an_adapter_of_pefts_is_imported_onto_a_model_of_files(here: Path) -> None:
    save_causal(here / "model")
    surgeon = surgery.apply(surgery.load_model("model"), surgery.load("lora").retarget("**.q_proj"))
    surgery.export_peft(surgeon, "theirs", base_model="model")
    result = run("import", "theirs", "-o", "ours")
    assert result.exit_code == 0, result.output
    assert surgery.diff("ours", "theirs").tensors == {}


def test_an_adapter_of_pefts_that_names_no_model(here: Path) -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load("lora").retarget("**.q_proj"))
    surgery.export_peft(surgeon, "theirs")
    assert "error[unknown-model]" in run("diff", "theirs", "theirs").stderr
    assert run("diff", "theirs", "theirs", "--model", "demo:llama").stdout.endswith("no difference\n")


def test_two_specs_compared() -> None:
    assert str(surgery.diff("lora", "lora")) == "no difference"
    found = surgery.diff("lora", "dora", load_demo("llama"))
    assert any(line.startswith("- ") and "W' = W + 2 B A" in line for line in found.formulas)
    assert any(line.startswith("+ ") and "W' = M (W + 2 B A)" in line for line in found.formulas)
    assert found.parameters == {name: pair for name, pair in found.parameters.items() if pair[0] != pair[1]}
    texts = [f"spec s(a: float = {a}, b: int = {b})\ntarget linear {{ add low_rank(b, alpha = a) }}"
             for a, b in (("5%", 8), ("0.05", 8), ("0", 8), ("0%", 9))]
    assert surgery.diff(parse(texts[0]), parse(texts[1])).parameters == {}
    assert [*surgery.diff(parse(texts[2]), parse(texts[3])).parameters] == ["b"]  # 0 is 0%
    assert "trained parameters" in found.costs and found.modules == ([], [])
    assert found.modules == ([], []) and found.tensors == {}
    told = json.loads(run("diff", "lora", "dora", "--model", "demo:llama", "--json").stdout)
    assert told["formulas"] == found.formulas and told["costs"] == {k: list(v) for k, v in found.costs.items()}
    assert "formulas" in run("diff", "lora", "dora").stdout


def test_numbers_that_differ_in_their_last_digits_differ() -> None:
    near = (0.1, 0.1000000001)
    for text in ("return {} * A", "return {} * out * A", "return kron([[{}]], A)", "noise m ~ normal({}, 1)\n return m * A",
                 "param B[in] ~ normal(std = {})\n return A @ diag(B)", "param B[out, in] = 0 rate {}\n return A + B"):
        one, other = (parse(f"update u() {{\n param A[out, in] = 0\n {text.format(number)} }}\ntarget linear {{ add u() }}")
                      for number in near)
        assert str(surgery.diff(one, one)) == "no difference" and len(surgery.diff(one, other).formulas) >= 2, text


@pytest.mark.parametrize("one, other", [
    ("let x = rows(A, in)  return x", "let x = rows(A, out)  return x"),  # what stands in a name that an `if` says
    ("return if out > in then A else 2 * A", "return if out > in then A else 3 * A"),
])
def test_parts_of_a_condition_on_sizes_are_compared(one: str, other: str) -> None:
    """The condition is shown as it is written, where `diff` has to see what its names stand for."""
    text = "update u() {{ param A[max(out, in), in] = 0  {} }}\ntarget linear {{ add u() }}"
    first, second = (parse(text.format(each.replace("return x", "return if out > in then x else A")))
                     for each in (one, other))
    assert str(surgery.diff(first, first)) == "no difference" != str(surgery.diff(first, second))


def test_where_they_act(here: Path) -> None:
    spec = surgery.load("lora")
    found = surgery.diff(spec.retarget("**.q_proj"), spec.retarget("**.q_proj", "**.v_proj"), load_demo("llama"))
    only_a, only_b = found.modules
    assert only_a == [] and only_b and all(name.endswith("v_proj") for name in only_b)
    assert "weights of lora alone" in str(found)
    assert '+ target linear "**.{q,k}_proj"' in surgery.diff(spec, spec.retarget("**.{q,k}_proj")).formulas
    trained = [parse(f'{text}target linear {{ add low_rank(2) }}') for text in ("", 'train "**.norm.weight"\n')]
    assert surgery.diff(*trained).formulas == ['+ train "**.norm.weight"']


def test_two_adapters_compared(here: Path) -> None:
    model = load_demo("llama")
    surgeon = surgery.apply(model, surgery.load("lora", rank=2).retarget("**.q_proj"))
    surgeon.save("a")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("B")).fill_(1.0)
    surgeon.save("b")
    assert str(surgery.diff("a", "a")) == "no difference"
    (name,) = surgery.diff("a", "b").tensors
    assert name.endswith("add_low_rank.B") and name in run("diff", "a", "b").stdout
    assert run("diff", "a", "lora").exit_code == 1 and run("diff", "nope", "lora").exit_code == 2


def test_between_other_places_there_is_no_distance(here: Path) -> None:
    spec = surgery.load("curlora", rank=2).retarget("**.layers.0.**.q_proj")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        surgery.apply(load_demo("llama"), spec, seed=seed, check=False).save(name, self_contained=True)
    assert surgery.diff("a", "b").tensors == {}
    found = {name.rpartition(".")[2]: far for name, far in surgery.diff("a", "c").tensors.items()}
    assert found["i"] is None and found["j"] is None


def test_what_adapters_do_not_hold_is_compared(here: Path) -> None:
    """Frozen tensors that are made again at attach: two adapters may differ in these alone."""
    spec = surgery.load("vera", rank=2).retarget("**.layers.0.**.q_proj")
    for name, seed, whole in (("a", 0, False), ("b", 1, False), ("a whole", 0, True), ("b whole", 1, True)):
        surgery.apply(load_demo("llama"), spec, seed=seed, check=False).save(name, self_contained=whole)
    exact = surgery.diff("a whole", "b whole").tensors
    assert len(exact) == 2  # A and B
    for other in ("b", "b whole"):
        found = surgery.diff("a", other).tensors
        assert found.keys() == exact.keys()
        assert all(0.2 < found[name] / exact[name] < 5 for name in exact)
    assert surgery.diff("a", "a whole").tensors == {}
