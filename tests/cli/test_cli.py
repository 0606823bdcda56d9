"""The command line: what goes to which stream, exit statuses, JSON, help, formatting, options, streams that break."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from torch import nn

import surgery
from surgery.cli import output as output_module
from surgery.cli.main import main
from surgery.cli.options import opened_together
from surgery.codegen.compiled import STAGES
from surgery.diagnostics import SurgeryError
from surgery.language.library import load, shipped
from surgery.models.demo import demo_config
from surgery.planning.compile import compile

Q_PROJ = "model.layers.0.self_attn.q_proj"
BROKEN = "spec lora(\n"
UNTIDY = "spec  lora( )\n\n\ntarget linear { add low_rank( 8 ) }\n"
TIDY = "spec lora()\n\ntarget linear {\n  add low_rank(8)\n}\n"

# A run of each command that succeeds without a word on stderr.
DONE = {
    "check": ["check", "lora"], "specs": ["specs"], "show": ["show", "sora"],
    "modules": ["modules", "demo:llama", "**.mlp.*"], "explain": ["explain", "sora", "demo:llama", Q_PROJ],
    "help": ["help", "no-match"], "plan": ["plan", "sora", "demo:llama"], "apply": ["apply", "lora", "demo:llama"],
}
# Runs that fail: the arguments, the status, the code of the diagnostic.
FAILED = [
    (["check", "missing.surg"], 2, "missing-file"),
    (["check", "broken.surg"], 1, "syntax"),
    (["check", "lora", "--set", "rank"], 2, "bad-set"),
    (["check", "lora", "--set", "rank=true"], 1, "wrong-type"),
    (["check", "lora", "--model", "demo:resnet"], 1, "no-match"),
    (["fmt", "broken.surg"], 1, "syntax"),
    (["show", "nope"], 2, "unknown-spec"),
    (["modules", "demo:lama"], 2, "unknown-model"),
    (["modules", "demo:llama", "nope"], 1, "no-match"),
    (["explain", "lora", "demo:llama", "nope"], 1, "no-match"),
    (["plan", "lora", "demo:llama", "--target", "**.q_porj"], 1, "no-match"),
    (["apply", "lora", "demo:llama", "-o", "broken.surg"], 2, "bad-output"),
    (["apply", "lora", "demo:llama", "-o", ""], 2, "bad-output"),
    (["merge", "nowhere", "-o", "merged"], 2, "missing-file"),
]
EACH_FAILURE = pytest.mark.parametrize("arguments, status, code", FAILED,
                                       ids=lambda value: " ".join(value) if isinstance(value, list) else "")
WRONG_USE = [["apply"], ["apply", "lora"], ["nope"], ["apply", "--nope", "x"], ["check"],
             ["help"], ["help", "nope"], ["check", "lora", "--output-format", "x"], ["show", "lora", "--emit", "x"],
             ["apply", "lora", "demo:llama", "--merge"],
             ["apply", "lora", "demo:llama", "--dtype", "int8"],
             ["apply", "lora", "demo:llama", "--seed", "1" + "0" * 30], ["apply", "lora", "demo:llama", "--seed", "-1"]]


def run(*arguments: str, stdin: str | bytes = "", **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, arguments, input=stdin)


def process(*arguments: str, **how) -> subprocess.CompletedProcess:
    """The same as a process of its own."""
    return subprocess.run([sys.executable, "-m", "surgery", *arguments], timeout=120, **how)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    Path("broken.surg").write_text(BROKEN)
    return tmp_path


# ------------------------------------------------------------------------------------------------ streams and statuses


@pytest.mark.parametrize("arguments", DONE.values(), ids=DONE)
def test_results_are_on_stdout(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "") and result.stdout.strip()


@EACH_FAILURE
def test_diagnostics_are_on_stderr(arguments: list[str], status: int, code: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert result.stderr.startswith(f"error[{code}]: ") and "error[" not in result.stdout


@pytest.mark.parametrize("arguments", WRONG_USE, ids=" ".join)
def test_wrong_use(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("Usage: surgery")


def test_an_error_of_the_spec_outweighs_one_of_the_world() -> None:
    assert run("check", "broken.surg", "missing.surg").exit_code == 1


def test_a_file_that_a_spec_uses_is_the_spec_s_fault() -> None:
    Path("mine.surg").write_text('use "nowhere.surg"\n')
    assert run("check", "mine.surg").exit_code == 1


def test_a_warning_is_no_failure_but_under_strict() -> None:
    arguments = ["plan", "lora", "demo:llama", "--target", "**.{q,kk}_proj"]
    result, strict = run(*arguments), run(*arguments, "--strict")
    assert result.exit_code == 0 and result.stderr.startswith("warning[dead-name]")
    assert strict.exit_code == 1 and strict.stdout == ""


def test_quiet_leaves_out_all_but_results_and_errors() -> None:
    arguments = ["plan", "lora", "demo:llama", "--target", "**.{q,kk}_proj"]
    assert (run(*arguments, "-q").stdout, run(*arguments, "-q").stderr) == (run(*arguments).stdout, "")
    assert run("check", "broken.surg", "-q").stderr == run("check", "broken.surg").stderr
    assert run("fmt", "-", "-q", stdin=UNTIDY).stderr == ""


# ------------------------------------------------------------------------------------------------------------ JSON


def told(result: Result) -> dict:
    """The one object on stdout."""
    found = json.loads(result.stdout)
    assert found["format_version"] == "1.0"
    return found


@pytest.mark.parametrize("arguments", DONE.values(), ids=DONE)
def test_json_is_one_object(arguments: list[str]) -> None:
    after, before = run(*arguments, "--json"), run("--json", *arguments)
    assert (after.exit_code, after.stderr) == (0, "") and after.stdout == before.stdout
    assert told(after)["diagnostics"] == []


@EACH_FAILURE
def test_json_tells_a_failure(arguments: list[str], status: int, code: str) -> None:
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (status, "")
    assert [d["code"] for d in told(result)["diagnostics"]] == [code]


@pytest.mark.parametrize("arguments", WRONG_USE, ids=" ".join)
def test_json_tells_wrong_use(arguments: list[str]) -> None:
    result = run(*arguments, "--json")
    assert result.exit_code == 2 and told(result)["error"]


def test_json_gives_the_places_of_a_diagnostic() -> None:
    Path("mine.surg").write_text("update low_rank() {\n  return W\n}\n")
    (found,) = told(run("check", "mine.surg", "--json"))["diagnostics"]
    assert (found["severity"], found["file"], found["line"], found["column"]) == ("error", "mine.surg", 1, 8)
    assert [(place["file"], place["label"]) for place in found["related"]] == [("std.surg", "first defined here")]


def test_json_of_a_plan_counts() -> None:
    plan = told(run("plan", "lora", "demo:llama", "--set", "rank=3", "--target", "**.q_proj", "--json"))
    assert [m["name"] for m in plan["modules"]] == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert plan["trainable"] == 4 * 3 * (64 + 64) and plan["changes"] == 4
    assert plan["memory_bytes"]["adapter"] == 4 * plan["trainable"]


def test_a_plan_of_a_quantised_model_says_what_it_does_not_know(tmp_path: Path) -> None:
    config = demo_config("llama")
    for about, is_known in (({"quant_method": "of tomorrow"}, False),
                            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, True)):
        config.quantization_config = about
        config.save_pretrained(tmp_path)
        assert ("is planned with plain weights" in run("plan", "lora", str(tmp_path)).stderr) != is_known
    assert "quantised" not in run("plan", "lora", "demo:llama").stderr


def test_json_of_specs_and_show() -> None:
    assert [s["name"] for s in told(run("specs", "--json"))["specs"]] == list(shipped())
    assert told(run("show", "lora", "--json"))["spec"]["name"] == "lora"


# -------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", main.commands)
def test_help_has_an_example_that_can_be_typed(name: str) -> None:
    result = run(name, "--help")
    _, _, example = result.stdout.partition("Example:")
    program, command, *arguments = shlex.split(example)
    assert (result.exit_code, program, command) == (0, "surgery", name)
    main.commands[command].make_context(command, arguments)


@pytest.mark.parametrize("name", main.commands)
def test_help_shows_the_command_s_own_options_first(name: str) -> None:
    _, options, common = run(name, "--help").stdout.replace("Common options:", "Options:").split("Options:") \
        if "\nOptions:" in run(name, "--help").stdout else ("", "", run(name, "--help").stdout)
    own = [p for p in main.commands[name].params if isinstance(p, click.Option) and p.opts[0] not in common]
    assert all(f"  {p.opts[0]}" in options for p in own) and "--json" not in options and "--debug" in common


def test_help_groups_the_commands() -> None:
    said = run("--help").stdout
    assert said.index("Specs:") < said.index("  fmt ") < said.index("A spec on a model:") < said.index("  merge ")
    assert sorted(line.split()[0] for line in said.partition("Specs:")[2].splitlines()
                  if line.startswith("  ") and "Example" not in line) == sorted(main.commands)


def test_help_and_version() -> None:
    assert all(name in run("--help").stdout for name in main.commands)
    assert run("--version").stdout.startswith("surgery, version ")


def test_set_and_target() -> None:
    shown = run("show", "lora", "--set", "rank=4", "--set", "alpha=2*4").stdout
    assert shown.startswith("lora(rank: int = 4, alpha: float = 2 * 4")
    attention = told(run("plan", "lora", "demo:llama", "--target", "attention", "--json"))["modules"]
    assert len(attention) == 16 and all(".self_attn." in m["name"] for m in attention)


def test_target_of_several_and_among_several() -> None:
    """The other target of ia3 stays as it is; a spec that has no target is left alone among others that have."""
    modules = told(run("plan", "ia3", "demo:llama", "--target", "1=**.q_proj", "--json"))["modules"]
    assert {m["name"].rpartition(".")[2] for m in modules} == {"q_proj", "down_proj"}
    opened = opened_together(["lora", "bitfit"], (), ("**.q_proj",))
    assert opened["lora"] == surgery.load("lora").retarget("**.q_proj") and opened["bitfit"] == surgery.load("bitfit")
    with pytest.raises(SurgeryError, match="bitfit"):
        opened_together(["bitfit"], (), ("**.q_proj",))


@pytest.mark.parametrize("emit", ["formula", "spec", "json", "python", *STAGES])
def test_show(emit: str) -> None:
    result = run("show", "sora", "--emit", emit)
    assert result.exit_code == 0 and "sora" in result.stdout or emit in STAGES and " = matmul " in result.stdout


def test_each_stage_of_the_compiler_shows_what_it_is_to_make() -> None:
    ir, normal, cheapest, lowered = (run("show", "sora", "--emit", stage).stdout for stage in STAGES)
    assert "cayley" in ir and "cayley" in normal
    assert " = sub " in ir and " = sub " not in normal  # a sign is a multiple by -1
    assert "[1024, 4096]" in cheapest and "[out, in]" not in cheapest
    assert " = frozen " in lowered and "[tokens, 4096]" in lowered
    asked = run("show", "sora", "--emit", "ir", "--shape", "96,64").stdout
    assert "[96, 64]" in asked and "[out, in]" not in asked


def test_lines_of_a_stage_are_those_that_the_plan_has_for_a_layer_of_that_shape() -> None:
    (placed,) = compile(nn.Sequential(nn.Linear(64, 96, bias=False)), load("sora")).placed
    for stage in ("cheapest", "lowered"):
        shown = run("show", "sora", "--emit", stage, "--shape", "96,64").stdout.splitlines()
        assert shown[5:] == [f"  {line}" for line in placed.compiled.lines(stage)]


@pytest.mark.parametrize("shape", ["1024,4096", "96,64", "640,64", "5,4"])
def test_what_asks_for_heads_is_shown_with_as_many_as_fit_the_shape(shape: str) -> None:
    Path("heads.surg").write_text("""spec heads()
transform per_head(heads: int) on n : diagonal {
  param g[heads] = 1
  return diag(kron(g, ones(n / heads)))
}
target linear { pre per_head(heads) }
""")
    for how in (("--program",), ("--emit", "lowered")):
        shown = run("show", "heads.surg", *how, "--shape", shape)
        assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("target, shape", [
    ("linear { add third() }", "[2520, 2520]"), ("linear { pre of(dim) }", "[768, 768]"),
    ("norm { pre diagonal() }", "[1024, 1]")])
def test_what_does_not_fit_the_usual_shape_is_shown_at_one_that_it_fits(target: str, shape: str) -> None:
    Path("sizes.surg").write_text(f"""spec sizes(dim: int = 768)
update third() {{ param C[out / 3, in] = 0 return stacked(C, stacked(C, C)) }}
transform of(dim: int) on n {{ check n == dim param d[n] = 1 return diag(d) }}
target {target}
""")
    shown = run("show", "sizes.surg", "--program")
    assert f"weight {shape}, a step" in shown.stdout, shown.output
    if "third" in target:
        refused = run("show", "sizes.surg", "--program", "--shape", "64,64")
        assert refused.exit_code == 1 and "64/3" in refused.output


def test_explain() -> None:
    found = told(run("explain", "lora", "demo:llama", "lm_head", "--json"))
    assert found["taken"] is False and "output head" in found["text"]
    assert told(run("explain", "lora", "demo:llama", Q_PROJ, "--json"))["taken"] is True


def test_a_spec_comes_from_a_pipe_too() -> None:
    assert process("check", "/dev/stdin", input=TIDY, text=True, capture_output=True).stdout == "/dev/stdin: ok\n"


# ------------------------------------------------------------------------------------------------------ formatting


def test_fmt_in_place() -> None:
    file = Path("untidy.surg")
    file.write_text(UNTIDY)
    file.chmod(0o640)
    Path("link.surg").symlink_to(file)
    assert run("fmt", "link.surg").stderr == "1 file changed, 0 files left unchanged\n"
    assert (file.read_text(), file.stat().st_mode & 0o777, Path("link.surg").is_symlink()) == (TIDY, 0o640, True)
    assert run("fmt", "untidy.surg").stderr == "0 files changed, 1 file left unchanged\n"


@pytest.mark.parametrize("option, status", [("--check", 1), ("--diff", 0)])
def test_fmt_that_changes_nothing(option: str, status: int) -> None:
    Path("untidy.surg").write_text(UNTIDY)
    result = run("fmt", "untidy.surg", option)
    assert (result.exit_code, Path("untidy.surg").read_text()) == (status, UNTIDY)
    assert ("+  add low_rank(8)" if option == "--diff" else "untidy.surg would be changed") in result.stdout


def test_fmt_of_stdin() -> None:
    assert run("fmt", "-", stdin=UNTIDY).stdout == TIDY
    assert run("fmt", "-", stdin=b"\xff").stderr.startswith("error[missing-file]: cannot read <stdin>")


def test_fmt_leaves_a_broken_file_alone_and_does_the_others() -> None:
    Path("untidy.surg").write_text(UNTIDY)
    result = run("fmt", "broken.surg", "untidy.surg", "--json")
    assert (told(result)["changed"], told(result)["unchanged"], result.exit_code) == (["untidy.surg"], [], 1)
    assert (Path("broken.surg").read_text(), Path("untidy.surg").read_text()) == (BROKEN, TIDY)
    assert {p.name for p in Path().iterdir()} == {"broken.surg", "untidy.surg"}


def test_fmt_of_a_folder() -> None:
    """Every .surg file below it; not what lies in a hidden folder, and not the same file twice."""
    for name in ("specs/a.surg", "specs/deep/b.surg", "specs/.hidden/c.surg", "specs/d.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(UNTIDY)
    found = told(run("fmt", "specs", "specs/a.surg", "--json"))
    assert (found["changed"], found["unchanged"]) == (["specs/a.surg", "specs/deep/b.surg"], [])
    assert Path("specs/.hidden/c.surg").read_text() == UNTIDY == Path("specs/d.txt").read_text()


def test_check_of_a_folder() -> None:
    Path("specs/deep").mkdir(parents=True)
    Path("specs/good.surg").write_text(TIDY)
    Path("specs/deep/bad.surg").write_text(BROKEN)
    result = run("check", "specs")
    assert (result.exit_code, result.stdout) == (1, "specs/good.surg: ok\nspecs/deep/bad.surg: 1 error\n")
    Path("lora").mkdir()  # the name of a spec that ships outweighs it
    assert run("check", "lora").stdout == "lora: ok\n"


@pytest.mark.parametrize("command", ["check", "fmt"])
def test_a_folder_without_specs(command: str) -> None:
    Path("empty").mkdir()
    result = run(command, "empty")
    assert result.exit_code == 2 and result.stderr == "error[missing-file]: there is no .surg file below empty\n"


# ------------------------------------------------------------------------------------------------- forms of diagnostics

WRONG = "spec wrong(rank: int = 8)\n\ntarget linear {\n  add low_rank(r = rank)\n  add low_rank(0)\n}\n"


@pytest.fixture
def wrong(folder: Path) -> str:
    Path("my specs").mkdir()
    Path("my specs/wrong.surg").write_text(WRONG)
    return "my specs/wrong.surg"


def test_an_end_is_the_place_after_the_last_character(wrong: str) -> None:
    first, second = told(run("check", wrong, "--json"))["diagnostics"]
    assert [first[key] for key in ("line", "column", "end_line", "end_column")] == [4, 16, 4, 17]
    assert second["related"][0]["end_column"] == second["related"][0]["column"] + len("low_rank(0)")


def test_concise(wrong: str) -> None:
    result = run("check", wrong, "--output-format=concise")
    first, second = result.stdout.splitlines()
    assert first == ("my specs/wrong.surg:4:16: error[unknown-argument] low_rank has no argument `r` "
                     "(did you mean `rank`?)")
    assert second.startswith("std.surg:") and (result.exit_code, result.stderr) == (1, "")
    assert run("check", "lora", "--output-format", "concise").stdout == ""


def test_github(wrong: str) -> None:
    """A mistake in a shipped definition is annotated where the user's file places it."""
    first, second = run("check", wrong, "--output-format=github").stdout.splitlines()
    assert first == ("::error file=my specs/wrong.surg,line=4,endLine=4,col=16,endColumn=17,title=unknown-argument::"
                     "low_rank has no argument `r`%0Adid you mean `rank`?%0Alow_rank(rank: int = 8, alpha: float = 16) "
                     "is defined at std.surg:64")
    assert second.startswith("::error file=my specs/wrong.surg,line=5,endLine=5,col=7,endColumn=18,"
                             "title=check-failed::")
    Path("a,100%:b.surg").write_text("train 5")
    for name in ("a,100%:b.surg", str(Path("a,100%:b.surg").resolve())):
        assert run("check", name, "--output-format=github").stdout.startswith(
            "::error file=a%2C100%25%3Ab.surg,line=1,endLine=1,col=7,endColumn=8,title=syntax::expected")


def test_sarif(wrong: str) -> None:
    Path("100%.surg").write_text("train 5%%\n")
    result = run("check", wrong, "100%.surg", "--output-format", "sarif")
    log = json.loads(result.stdout)
    (run_,) = log["runs"]
    rules, results = run_["tool"]["driver"]["rules"], run_["results"]
    assert (log["version"], result.exit_code, result.stderr) == ("2.1.0", 1, "") and "sarif-2.1.0" in log["$schema"]
    assert [rule["id"] for rule in rules] == ["check-failed", "syntax", "unknown-argument"]
    assert all(rule[field]["text"] for rule in rules for field in ("shortDescription", "fullDescription", "help"))
    assert [(r["ruleId"], rules[r["ruleIndex"]]["id"], r["level"]) for r in results] == [
        (code, code, "error") for code in ("unknown-argument", "check-failed", "syntax")]
    places = [place["physicalLocation"] for r in results for place in r["locations"]]
    assert [place["artifactLocation"]["uri"] for place in places] == [
        "my%20specs/wrong.surg", "my%20specs/wrong.surg", "100%25.surg"]
    assert places[0]["region"] == {"startLine": 4, "startColumn": 16, "endLine": 4, "endColumn": 17}
    assert run_["invocations"][0]["executionSuccessful"] is True and run_["columnKind"] == "unicodeCodePoints"


def test_sarif_of_what_is_in_order_and_of_what_was_not_checked() -> None:
    (done,) = json.loads(run("check", "lora", "--output-format=sarif").stdout)["runs"]
    assert (done["results"], done["invocations"]) == ([], [{"executionSuccessful": True}])
    for arguments in (["lora", "--model", "demo:nope"], ["lora", "--nope"]):
        (failed,) = json.loads(run("check", *arguments, "--output-format=sarif").stdout)["runs"]
        assert failed["results"] == [] and failed["invocations"][0]["executionSuccessful"] is False
        assert "nope" in failed["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]


def test_json_by_either_name(wrong: str) -> None:
    assert run("check", wrong, "--output-format=json").stdout == run("check", wrong, "--json").stdout
    result = run("check", wrong, "--json", "--output-format=github")
    assert result.exit_code == 2 and "two forms" in told(result)["error"]


# ------------------------------------------------------------------------------------------------------- interruptions


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`surgery specs` then meets an error."""
    def fail() -> None:
        raise error

    monkeypatch.setattr("surgery.planning.shipped_specs.shipped", fail)


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("odd"), 2, "error: this is a bug in surgery: RuntimeError: odd"),
    (MemoryError(), 2, "error: not enough memory"),
    (RuntimeError("CUDA out of memory."), 2, "error: not enough memory"),
    (PermissionError(13, "Permission denied", "x"), 2, "error: Permission denied: x"),
])
def test_what_no_stage_foresaw(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str) -> None:
    failing(monkeypatch, error)
    result = run("specs")
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith(words) and "Traceback" not in result.stderr
    assert run("specs", "--json").exit_code == status


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("odd"))
    assert run("specs", "--debug").stderr.startswith("Traceback")
    assert told(run("specs", "--json"))["error"].startswith("error: this is a bug")


INTERRUPTED = """
import os, signal, sys
from types import SimpleNamespace
from surgery.cli.main import main
from surgery.cli.options import opened_together
from surgery.models.demo import demo_config
from surgery.diagnostics import SurgeryError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it
sys.stdin = SimpleNamespace(buffer=SimpleNamespace(read=lambda: os.kill(os.getpid(), signal.SIGINT) or signal.pause()))
main()
"""


def test_an_interrupt_while_it_waits() -> None:
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, "fmt", "-"], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize("command", ["show sora", "show lora --json", "show sora --emit spec"])
def test_a_pipe_that_nobody_reads(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = process(*command.split(), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert result.stderr == b"" and result.returncode != 0


def test_a_process_ends_with_the_status_of_its_command_and_says_no_more() -> None:
    """That it imported torch and transformers included: what they leave is nobody's business."""
    done = process("plan", "lora", "demo:llama", "--target", "**.nothing", capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error[no-match]") and "leak" not in done.stderr


def test_streams_that_are_closed_full_or_of_another_alphabet() -> None:
    assert subprocess.run(f"{sys.executable} -m surgery show lora >&- 2>&- <&-", shell=True).returncode == 0
    latin = process("show", "sora", capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert latin.returncode == 0 and rb"cayley(C D\u2082\u1d40" in latin.stdout


# ----------------------------------------------------------------------------------------------- colour and progress


class Terminal(io.StringIO):
    """What rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, color: str, **environment: str) -> str:
    """What a terminal gets of an error."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = output_module.Output(color=color)
    output.stderr.print(output_module.coloured("error[syntax]: no"))
    return sys.stderr.getvalue()


def test_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[1;31m" in shown(monkeypatch, "auto")
    assert shown(monkeypatch, "auto", NO_COLOR="1") == shown(monkeypatch, "never") == "error[syntax]: no\n"
    assert "\x1b[1;31m" in shown(monkeypatch, "always", NO_COLOR="1")
    assert "\x1b[" not in run("check", "broken.surg", NO_COLOR="").stderr
    assert "\x1b[1;31m" in run("check", "broken.surg", "--color", "always").stderr


def busy(monkeypatch: pytest.MonkeyPatch, patience: float, stream: io.StringIO, **how) -> str:
    """What is shown of work that goes on until something is shown, or half a second."""
    monkeypatch.setattr(output_module, "_PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with output_module.Output(**how).busy("planning"):
        end = time.monotonic() + 0.5
        while "planning" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    return stream.getvalue()


def test_a_bar_only_on_a_terminal_and_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "planning" in busy(monkeypatch, 0.0, Terminal())
    assert busy(monkeypatch, 60.0, Terminal()) == ""
    assert busy(monkeypatch, 0.0, io.StringIO()) == ""
    assert busy(monkeypatch, 0.0, Terminal(), verbosity=-1) == "" == busy(monkeypatch, 0.0, Terminal(), as_json=True)
    assert busy(monkeypatch, 0.0, io.StringIO(), verbosity=1) == "planning\n"


def test_every_command_has_the_common_options() -> None:
    wanted = {"--json", "--quiet", "--verbose", "--color", "--debug"}
    for command in main.commands.values():
        assert wanted <= {name for p in command.params if isinstance(p, click.Option) for name in p.opts}
