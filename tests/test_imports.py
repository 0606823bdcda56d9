"""The pipeline of imports: a stage knows those before it and none after it; what needs no torch imports none."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import house
import pytest
from house import trees

import surgery

ROOT = Path(surgery.__file__).parent
# The stages in order, each with its modules and packages; what is not listed is a study of operated models.
PIPELINE = {
    "package": "",
    "text": "text",
    "files": "files",
    "html": "html",
    "diagnostics": "diagnostics given",
    "settings": "settings",
    "extras": "extras",
    "ir": "ir",
    "layers": "layers",
    "language": "language",
    "models": "models",
    "rewrite": "rewrite",
    "semantics": "semantics",
    "matching": "matching",
    "codegen": "codegen",
    "planning": "planning",
    "runtime": "runtime",
    "analysis": "analysis",
    "peft": "peft",
    "experiments": "experiments",
    "editor": "editor",
    "cli": "cli",
    "__main__": "__main__",
}
RANK = {module: rank for rank, modules in enumerate(PIPELINE.values()) for module in modules.split(" ")}
# Steps back that a function takes when it is called, each for a reason.
LAZY = {
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def stage(module: str) -> int:
    return RANK[house.folder(module)]


def imported(node: ast.AST) -> list[str]:
    """The modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in MODULES]
    if not isinstance(node, ast.ImportFrom) or node.module not in MODULES:
        return []
    return [inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names]


def imports(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[str, bool]]:
    """Each module that a tree imports, and whether that happens when the tree is imported itself."""
    for node in ast.iter_child_nodes(tree):
        yield from ((name, at_once) for name in imported(node))
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        yield from imports(node, at_once and not later)


@cache
def graph() -> dict[str, set[tuple[str, bool]]]:
    return {name: set(imports(tree)) for name, tree in trees().items()}


def test_the_stages_name_what_exists() -> None:
    assert set(RANK) <= set(map(house.folder, MODULES))


def test_no_import_steps_back() -> None:
    assert [(name, other) for name, found in graph().items() for other, at_once in found if at_once
            and stage(other) > stage(name)] == []


def test_a_function_steps_back_only_where_it_is_argued() -> None:
    back = {(name, other) for name, found in graph().items() for other, at_once in found
            if not at_once and stage(other) > stage(name) and name != "surgery"}  # which finds its names when asked
    assert back == {(f"surgery.{name}", f"surgery.{other}") for name, other in LAZY}


def test_imports_run_in_no_circle() -> None:
    left = {name: {other for other, at_once in found if at_once and other != name} for name, found in graph().items()}
    while ready := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert left == {}


def test_imports_run_in_no_circle_when_functions_run() -> None:
    """An import inside a function counts as well; only what a type checker alone reads does not."""
    edges = {name: house.imported(tree) - {name} for name, tree in trees().items()}
    assert house.circles(edges) == []


def test_relative_imports_are_not_used() -> None:
    found = {name: [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)] for name, tree in trees().items()}
    assert [name for name, nodes in found.items() if any(n.level for n in nodes)] == []


# --------------------------------------------------------------------------------------------- what needs no torch


WITHOUT_TORCH = ["--help", "apply --help", "--version", "specs", "fmt lora.surg", "show sora",
                 "show sora --emit python", "show sora --emit ir",
                 "show sora --emit lowered", "show sora --program", "check lora", "check lora.surg --json",
                 "check --explain overlap", "check broken.surg", "diff lora dora", "init mine --from lora",
                 # a mistake in a spec is told before a model is thought of
                 "plan broken.surg demo:llama", "apply broken.surg demo:llama -o out",
                 "train broken.surg demo:llama --data a.csv -o out",
                 "bench lora broken.surg --model demo:llama", "compare broken.surg --model demo:llama --data a.csv",
                 "check gate.surg",  # which runs dense, as it warns
                 "from surgery.matching import patterns, suggestions", "import surgery.models.demo as d; d.DEMOS"]

# Libraries are imported for good, and looked through for garbage at no time; where a folder is missing they are not. A stub
# stands for transformers.
FOR_GOOD = ("import gc, sys; sys.path.insert(0, 'stub'); from surgery.cli.options import Output, import_libraries; "
            "import_libraries(Output(), 'nowhere'); early = 'transformers' in sys.modules; import_libraries(Output(), 'stub'); "
            "import transformers.modeling_utils as stub; sys.modules.pop('transformers'); "
            "sys.exit(early or stub.collects or not gc.isenabled() or not gc.get_freeze_count())")

# Each command, and what Python runs, runs in a fork of a process that has read a spec, which takes longer than most of them.
EACH_IN_A_FORK = """
import json, os, sys
from surgery.cli.main import main
from surgery.language.library import load

def heavy():
    return [name for name in ("torch", "transformers", "numpy") if name in sys.modules]

load("lora")
assert heavy() == []
commands, found = json.loads(sys.argv[1]), open("found", "w")
for command in commands:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    sys.argv[1:] = command.split()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        exec(command) if "import " in command else main()
        print(json.dumps([command, 0, heavy()]), file=found, flush=True)
    except SystemExit as ended:
        print(json.dumps([command, ended.code or 0, heavy()]), file=found, flush=True)
    finally:
        os._exit(0)
"""


@pytest.fixture(scope="module")
def imported_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Of each command its status, and what it imported."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "lora.surg").write_text("target linear { add low_rank() }\n")
    (folder / "broken.surg").write_text("target linear { add low_rnk() }\n")
    (folder / "gate.surg").write_text(
        "update own() { param G[out, in] = 0  return W * G }\ntarget linear { add own() }\n")
    stub = folder / "stub/transformers"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "modeling_utils.py").write_text("import gc\ncollects = gc.isenabled()\n")
    (stub / "utils.py").write_text("class logging:\n    set_verbosity_error = disable_progress_bar = staticmethod(int)\n")
    subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, json.dumps([*WITHOUT_TORCH, FOR_GOOD])], cwd=folder, check=True,
                   capture_output=True)
    rows = map(json.loads, (folder / "found").read_text().splitlines())
    return {command: rest for command, *rest in rows}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that can fork is needed")
@pytest.mark.parametrize("command", [*WITHOUT_TORCH, FOR_GOOD])
def test_what_needs_no_torch_imports_none(imported_by: dict[str, list], command: str) -> None:
    assert imported_by[command] == [int("broken" in command), []]


HEAVY = {"transformers", "accelerate", "peft", "matplotlib", "scipy", "sklearn", "pandas", "numpy", "safetensors"}
PLAN = ["surgery.cli.plan", "surgery.models.loading", "surgery.planning.compile", "surgery.planning.figures",
        "surgery.planning.quantised_sizes"]  # what `surgery plan` begins with, or imports when it runs


@pytest.mark.parametrize("names", [["surgery.layers.layouts", "surgery.layers.survey"], PLAN], ids=["layouts", "plan"])
def test_what_is_imported_at_once(names: list[str]) -> None:
    """Neither transformers, which models alone need and which takes longer than all else, nor what only measures or draws:
    not by these modules, nor by the packages that they are in, nor by what those import."""
    left, reached = [*names], set()
    while left:
        if (name := left.pop()) in MODULES and name not in reached:
            reached.add(name)
            left += [name.rpartition(".")[0], *(other for other, at_once in graph()[name] if at_once)]
    assert {"surgery", "surgery.layers", "surgery.layers.kinds"} <= reached
    at_once = {word for name in reached for node in trees()[name].body for word in re.findall(
        r"^(?:import|from) (\w+)", ast.unparse(node), re.MULTILINE)}
    assert "torch" in at_once and at_once.isdisjoint(HEAVY)
    assert {house.folder(name) for name in reached}.isdisjoint({"runtime", "analysis", "peft", "experiments", "editor"})


def test_the_package_alone_imports_no_torch() -> None:
    # `--help` and `--version` need the command line alone, which reads no spec and computes nothing.
    code = ("import sys, surgery.cli.main; read = {'lark', 'pydantic', 'rich', 'surgery.language', 'surgery.ir'} & {*sys.modules}; "
            "assert not read, read; dir(surgery); surgery.Spec, surgery.load, surgery.SurgeryError; "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------------------- public names


def test_what_a_type_checker_reads_is_what_python_finds() -> None:
    tree = next(node for node in ast.parse(MODULES["surgery"].read_text(encoding="utf-8")).body
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.asname or alias.name: (node.module, alias.name) for node in tree.body
             for alias in node.names if isinstance(node, ast.ImportFrom)}
    homes = {name: (f"surgery.{home}", surgery._SPELT.get(name, name)) for name, home in surgery._HOMES.items()}
    assert typed == homes and set(surgery.__all__) == {"__version__", *homes}


@pytest.mark.parametrize("name", surgery.__all__)
def test_a_public_name(name: str) -> None:
    found = getattr(surgery, name)
    assert found is getattr(surgery, name) and name in dir(surgery)
    assert isinstance(found, str) or found.__doc__


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        surgery.nope


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_document_names_are_there(name: str) -> None:
    text = (ROOT.parent / name).read_text(encoding="utf-8")
    named = re.findall(r"[`(]((?:surgery|tests|docs|specs|examples|grammar)/[\w./*-]*)[`)]", text)
    # the architecture names modules from the package on: `runtime/apply.apply`
    modules = re.findall(r"`((?:%s)/\w+)[.`]" % "|".join(map(house.folder, MODULES)), text)
    named += [f"surgery/{module}.py" for module in modules]
    assert named and [path for path in named if not list(ROOT.parent.glob(path.rstrip("/")))] == []
