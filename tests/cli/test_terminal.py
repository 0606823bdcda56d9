"""What reaches a terminal, a spreadsheet or a program: no name's control characters, one JSON object, no question."""

import builtins
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from models import perturbed
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import module_tree_view
from surgery.cli import output as output_module
from surgery.cli.main import main
from surgery.cli.spectrum import _cell, _csv
from surgery.diagnostics import Diagnostic, Source, Span
from surgery.models.demo import load_demo
from surgery.text import plain, some, some_lines

pytestmark = pytest.mark.usefixtures("folder")

NAMES = {"colour": "a\x1b[31mb", "return": "a\rb", "line": "a\nb", "direction": "a\u202eb", "csi": "a\x9b31mb",
         "title": "a\x1b]0;b\x07", "null": "a\x7fb", "join": "a\u200db", "separator": "a\u2028b", "tag": "a\U000e0041b"}
name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def run(*arguments: str, status: int | None = None) -> Result:
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(main, arguments)
    assert "a bug in surgery" not in result.output and status in (None, result.exit_code), result.output
    return result


def assert_plain(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def test_of_many_the_first_are_told_and_how_many_more_there_are() -> None:
    assert some("abc") == "a, b, c" and some("abcde") == "a, b, c and 2 more"
    assert some_lines("ab", 2) == ["a", "b"] and some_lines("abc", 2) == ["a", "b", "and 1 more"]


@pytest.mark.parametrize("text, shown", [
    ("plain ‖ΔW‖ ₂ᵀ", "plain ‖ΔW‖ ₂ᵀ"), ("\x1b[1m", r"\u001b[1m"), ("\n", r"\u000a"), ("", ""),
    ("\U000e0041", r"\udb40\udc41"), ("\udcff", r"\udcff")])
def test_text_is_shown_and_does_nothing(text: str, shown: str) -> None:
    assert plain(text) == shown and (text.isascii() or json.loads(f'"{shown}"') == text)


# ------------------------------------------------------------------------------------------------------- diagnostics


@name
def test_a_diagnostic_has_its_own_lines_alone(name: str) -> None:
    source = Source(name, f"\ttarget {name} here" if "\n" not in name else "\ttarget here")
    start = len(source.text) - 4
    found = Diagnostic("syntax", name, Span(source, start, start + 4), name, (name,), (name,),
                       ((Span(source, 0, 1), name),))
    text = found.render()
    assert_plain(text.replace("\t", " "))
    assert text.count("\n") == 10
    line, carets = text.split("\n")[3:5]
    assert line.index("here") == carets.index("^^^^") and carets.startswith("   | \t")


COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "spec": lambda n: ("plan", n, "demo:llama"), "file": lambda n: ("check", f"{n}.surg"), "command": lambda n: (n,),
    "model": lambda n: ("plan", "lora", n), "demo": lambda n: ("plan", "lora", f"demo:{n}"),
    "package": lambda n: ("plan", "lora", f"package:{n}"), "option": lambda n: ("plan", f"--{n}"),
    "choice": lambda n: ("show", "lora", "--emit", n), "pair": lambda n: ("show", "lora", "--program", "--shape", n),
    "set": lambda n: ("plan", "lora", "demo:llama", "--set", n),
    "value": lambda n: ("plan", "lora", "demo:llama", "--set", f"rank={n}"),
    "pattern": lambda n: ("plan", "lora", "demo:llama", "--target", f"**.{n}"),
    "module": lambda n: ("modules", "demo:llama", n), "code": lambda n: ("check", "--explain", n),
    "folder": lambda n: ("merge", n, "-o", "out"), "import": lambda n: ("import", n, "-o", "out"),
    "fmt": lambda n: ("fmt", n), "out": lambda n: ("apply", "lora", "demo:llama", "-o", f"file/{n}"),
}


@pytest.mark.parametrize("name", ["a\x1b[31m\rb", "a\nb\u202e\x9b"], ids=["escape", "line"])
@pytest.mark.parametrize("of", COMMANDS)
def test_an_argument_that_is_no_text(of: str, name: str) -> None:
    Path("file").touch()
    result = run(*COMMANDS[of](name))
    assert result.exit_code
    assert_plain(result.output)
    found = run(*COMMANDS[of](name), "--json")
    json.loads(found.stdout)
    assert_plain(found.stdout)


@name
def test_a_spec_that_holds_what_is_no_text(name: str) -> None:
    line = name.replace("\n", "").replace("\r", "")
    Path("a.surg").write_text(f'# {line}\ntarget linear "**.q{line}", "{line}" {{\n  add low_rnk()\n}}\n')
    result = run("check", "a.surg", "--model", "demo:llama")
    assert result.exit_code
    assert_plain(result.output)


@name
def test_an_adapter_that_names_what_is_no_text(name: str) -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load("lora").retarget("**.q_proj"))
    surgeon.save("a", base_model="demo:llama")
    tensors = load_file("a/adapter.safetensors")
    save_file({**tensors, name: torch.zeros(1), f"{name}.x": torch.tensor([torch.nan])}, "a/adapter.safetensors")
    Path("a/meta.json").write_text(Path("a/meta.json").read_text().replace("1.0", json.dumps(name)[1:-1]))
    result = run("merge", "a", "-o", "out")
    assert result.stderr.count("error[bad-adapter]") == 2
    assert_plain(result.output)


# ---------------------------------------------------------------------------------------------------- other text


class Terminal(output_module.io.StringIO):
    def isatty(self) -> bool:
        return True


@name
def test_a_model_whose_modules_are_no_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.ModuleDict({name.replace(".", ""): torch.nn.Linear(2, 2)}))
    monkeypatch.setattr(sys, "stdout", Terminal())
    output = output_module.Output(color="never")
    output.say(module_tree_view.tree(model, {n for n, _ in model.named_modules()}, every=True))
    output.say("\n".join(output_module.aligned([["name", "size"], [name, "1"]])))
    output.raw(f"{name}\n")
    shown = sys.stdout.getvalue()
    assert_plain(shown)
    assert shown.count("\n") == 6 + 2 * name.count("\n")


@name
def test_progress_that_names_what_is_no_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(output_module, "_PATIENCE", 0.0)
    output = output_module.Output(color="never")
    with output.progress() as show:
        show(name)
    output.note(name)
    shown = sys.stderr.getvalue().replace("\r\x1b[2K", "")
    assert_plain(shown)


def test_a_file_that_is_piped_on_is_not_changed() -> None:
    text = "# a\x1b[31m\u202e\ntarget linear {\n  add low_rank()\n}\n"
    assert CliRunner().invoke(main, ["fmt", "-"], input=text).stdout == text


CELLS = ["=1+1", "+1", "-cmd", "@SUM(A1)", " =1", "\t=1", "\r=1", "=HYPERLINK(\"x\")"]


@pytest.mark.parametrize("cell", [*CELLS, *NAMES.values()])
def test_a_cell_is_no_formula(cell: str) -> None:
    shown = _cell(cell)
    assert_plain(shown)
    assert "\n" not in shown and not shown.lstrip().startswith(("=", "+", "-", "@"))
    assert _cell(-0.5) == -0.5 and _cell("layers.0") == "layers.0"


def test_the_csv_of_a_model_whose_modules_are_formulas() -> None:
    from surgery.analysis.spectra import spectrum

    layers = {"=cmd": torch.nn.Linear(4, 4), "x\x1b[31m\n": torch.nn.Linear(4, 4)}
    model = torch.nn.Sequential(torch.nn.ModuleDict(layers))
    found = spectrum(perturbed(model, surgery.parse('spec s\ntarget linear "**" { add low_rank(2) }')), top=0)
    text = _csv({"adapter": found})
    assert_plain(text)
    assert text.count("\n") == 3 and ",=" not in text and "\n=" not in text


# -------------------------------------------------------------------------------------------------------------- JSON


def object_of(result: Result) -> dict:
    """The one JSON object of a run; JSON has no NaN."""
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.mark.parametrize("error, status", [(None, 0), (KeyboardInterrupt(), 130), (OSError(5, "broken"), 2),
                                           (RuntimeError("odd"), 2), (MemoryError(), 2), (RecursionError("deep"), 2)])
def test_json_stays_json_whatever_else_is_printed(error: BaseException | None, status: int, monkeypatch) -> None:
    from surgery.models import loading

    real = loading.skeleton

    def loud(*arguments: object) -> object:
        print("Do you wish to run the custom code? [y/N]")
        sys.stdout.write("loading\r")
        if error:
            raise error
        return real(*arguments)

    monkeypatch.setattr(loading, "skeleton", loud)
    result = CliRunner().invoke(main, ["modules", "demo:llama", "--json"])
    assert result.exit_code == status and ("error" in object_of(result)) is bool(error)
    assert "Do you wish" in result.stderr
    assert "Do you wish" in CliRunner().invoke(main, ["modules", "demo:llama"]).stdout


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"a": (float("nan"),)}])
def test_json_has_no_nan(value: object, capsys) -> None:
    output_module.Output(as_json=True).data(value=value)
    text = capsys.readouterr().out
    assert "NaN" not in text and "Infinity" not in text and "null" in text


def test_json_on_a_stream_of_another_alphabet(tmp_path: Path) -> None:
    import subprocess

    Path("é\u202e.surg").write_text("target linear { add low_rank() }\n")
    result = subprocess.run([sys.executable, "-m", "surgery", "check", "é\u202e.surg", "--json"], capture_output=True,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert json.loads(result.stdout)["specs"] == [{"spec": "é\u202e.surg", "ok": True}]


def test_a_file_of_the_name_json() -> None:
    Path("--json").write_text("target linear {\n  add low_rank()\n}\n")
    assert run("check", "--", "--json", status=0).stdout == "--json: ok\n"


# ------------------------------------------------------------------------------------------- code in a model's folder


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder `own` with code in it; the file that exists once the code has run. A question is an error."""
    def asked(*arguments: object) -> str:
        raise AssertionError("a question")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "ran"
    load_demo("llama").save_pretrained("own")
    Path("own/own_code.py").write_text(CODE.format(marker=str(marker)))
    return marker


def config(change: dict) -> None:
    known = json.loads(Path("own/config.json").read_text())
    Path("own/config.json").write_text(json.dumps({**known, **change}))


OWN = {"model_type": "own", "architectures": ["OwnModel"],
       "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel",
                    "AutoModelForSequenceClassification": "own_code.OwnModel"}}
LOADERS = {
    "plan": ("plan", "lora", "own"), "modules": ("modules", "own"), "explain": ("explain", "lora", "own", "lm_head"),
    "check": ("check", "lora", "--model", "own"), "apply": ("apply", "lora", "own"),
    "spectrum": ("spectrum", "own", "own"), "merge": ("merge", "a", "own", "-o", "out"),
    "export": ("export", "a", "own", "--to", "peft", "-o", "out"), "import": ("import", "p", "own", "-o", "out"),
    "report": ("report", "a", "--base", "own"), "compare": ("compare", "lora", "--model", "own", "--data", "d.tsv"),
}


def saved() -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load("lora").retarget("**.q_proj"))
    surgeon.save("a")
    surgery.export_peft(surgeon, "p")
    Path("d.tsv").write_text("text\tlabel\n" + "".join(f"a{i}\t{i % 2}\n" for i in range(20)))


@pytest.mark.parametrize("command", LOADERS)
def test_no_code_of_a_models_folder_runs(command: str, ran: Path) -> None:
    config(OWN)
    saved()
    result = run(*LOADERS[command], status=2)
    assert "error[unknown-model]" in result.stderr and not ran.exists()
    assert "--trust-remote-code" in result.stderr or command == "compare"  # which fails over the tokenizer before
    assert object_of(run(*LOADERS[command], "--json"))["diagnostics"][0]["code"] == "unknown-model"


def test_it_runs_where_that_is_said(ran: Path) -> None:
    config(OWN)
    saved()
    assert "OwnModel" in run("modules", "own", "--trust-remote-code", status=0).stdout and ran.exists()
    for command in ("plan", "merge", "report"):
        run(*LOADERS[command], "--trust-remote-code", status=0)


def test_a_tokenizer_of_ones_own_does_not_run(ran: Path) -> None:
    Path("own/tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None],
                                                        "AutoProcessor": "own_code.OwnTokenizer"}}))
    run("apply", "lora", "own", "--merge", "-o", "out", status=0)
    assert not ran.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_from_elsewhere_does_not_run(field: str, ran: Path) -> None:
    config({field: "someone/kernel"})
    for command in ("modules", "apply"):
        result = run(*LOADERS[command], status=2)
        assert "code from elsewhere: someone/kernel" in result.stderr and "--trust-remote-code" in result.stderr


def test_a_class_that_transformers_has_not(ran: Path) -> None:
    config({"model_type": "llama", "architectures": ["Nope"]})
    run("modules", "own", status=0)  # the base model of its family
    config({"model_type": "encoder-decoder", "architectures": ["Nope"]})
    assert run("modules", "own").exit_code == 2 and not ran.exists()
