"""What others wrote: hostile or broken folders and files get one diagnostic each, and the model is untouched."""

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import perturbed
from safetensors.torch import load_file, save_file

import surgery
from surgery.analysis.page.training_curves import charts, found_state
from surgery.analysis.spectra.checkpoint import of_folder
from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.peft.folder import Folder
from surgery.peft.target_modules import named
from surgery.runtime.saved_format import FILES, META, SPEC, TENSORS, Saved

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_demo("llama:num_hidden_layers=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """An adapter as we save it and as PEFT has it: the files of each."""
    where = tmp_path_factory.mktemp("made")
    surgeon = perturbed(load_demo("llama:num_hidden_layers=1"), surgery.load("lora").retarget("**.q_proj"))
    surgeon.save(where / "ours", base_model="demo:llama:num_hidden_layers=1")
    surgery.export_peft(surgeon, where / "theirs", base_model="demo:llama:num_hidden_layers=1")
    return {kind: {p.name: p.read_bytes() for p in (where / kind).iterdir()} for kind in ("ours", "theirs")}


@pytest.fixture
def folder(made: dict, tmp_path: Path) -> Callable[[str], Path]:
    def put(kind: str) -> Path:
        (tmp_path / kind).mkdir()
        for name, data in made[kind].items():
            (tmp_path / kind / name).write_bytes(data)
        return tmp_path / kind

    return put


def told(model: torch.nn.Module, read: Callable, path: Path) -> str:
    """What is said of a folder. The model must be as it was, and take a surgery afterwards."""
    before, kinds = {n: t.clone() for n, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SurgeryError) as caught:
        read(model, path)
    assert kinds == [type(m) for m in model.modules()] and required == [p.requires_grad for p in model.parameters()]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- what is no file


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "/dev/null", "loop"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_not_read(name: str, kind: str, folder: Callable, model) -> None:
    path = folder("ours")
    special(path / name, name if kind == "loop" else kind)
    said = told(model, surgery.attach, path)
    assert f"cannot read {name}: " in said and said.count("error[") == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero"])
@pytest.mark.parametrize("name", [CONFIG, "adapter_model.safetensors"])
def test_nor_of_an_adapter_of_pefts(name: str, kind: str, folder: Callable, model) -> None:
    path = folder("theirs")
    special(path / name, kind)
    assert name in told(model, surgery.import_peft, path)


def test_a_link_to_a_file_is_read(folder: Callable, tmp_path: Path) -> None:
    """The hub's cache holds nothing else."""
    path = folder("ours")
    for name in FILES:
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
    surgery.attach(load_demo("llama:num_hidden_layers=1"), path)


@pytest.mark.parametrize("kind, read, of, step", [("ours", surgery.attach, Saved, "_tensors"),
                                                  ("theirs", surgery.import_peft, Folder, "_config")])
def test_a_folder_that_is_written_while_it_is_read(kind: str, read: Callable, of: type, step: str, folder: Callable, model,
                                                   monkeypatch) -> None:
    """The numbers of one adapter with the formula of another (of another alpha, say) would be an adapter of nobody's."""
    path, own = folder(kind), getattr(of, step)

    def meanwhile(self: Any) -> Any:
        value = own(self)
        for file in path.iterdir():  # as a save does: other files come in their places
            (path / "new").write_bytes(file.read_bytes())
            (path / "new").replace(file)
        return value

    monkeypatch.setattr(of, step, meanwhile)
    said = told(model, read, path)
    assert "wrote there while it was read" in said and said.count("error[") == 1
    monkeypatch.undo()
    read(load_demo("llama:num_hidden_layers=1"), path)


@pytest.mark.parametrize("name, size", [(SPEC, 1 << 20), (META, 1 << 26)])
def test_a_file_that_is_too_large(name: str, size: int, folder: Callable, model) -> None:
    path = folder("ours")
    with (path / name).open("ab") as file:
        file.truncate(size + 1)
    assert "it has more than" in told(model, surgery.attach, path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "/dev/null"])
def test_a_spec_uses_regular_files_alone(kind: str, tmp_path: Path) -> None:
    special(tmp_path / "other.surg", kind)
    (tmp_path / "a.surg").write_text('use "other.surg"\ntarget linear { add low_rank() }\n')
    result = CliRunner().invoke(main, ["check", str(tmp_path / "a.surg")])
    assert result.exit_code and re.search(r"error\[missing-file\]: cannot read .*other.surg: it is a", result.stderr)


def test_a_device_that_never_ends(tmp_path: Path) -> None:
    for command in ("check", "fmt"):
        result = CliRunner().invoke(main, [command, "/dev/zero"])
        assert result.exit_code and "cannot read /dev/zero: it has more than 1 MiB" in result.stderr


@pytest.mark.parametrize("used", ["/dev/zero", "other.surg", "../../secrets.surg", "pipe"])
def test_a_saved_spec_uses_no_files(used: str, folder: Callable, model) -> None:
    path = folder("ours")
    os.mkfifo(path / "pipe")
    (path / "other.surg").write_text("update twice() {\n  param A[out, in] = 0\n  return A\n}\n")
    (path / SPEC).write_text(f'use "{used}"\n{(path / SPEC).read_text()}')
    said = told(model, surgery.attach, path)
    assert "a saved spec stands on its own" in said and f'use "{used}"' in said and said.count("error[") == 1


# ------------------------------------------------------------------------------------------------- values and tensors


def reworded(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


BAD_META: dict[str, Any] = {
    "seed": [True, 1.5, "1", None, 10**30, -(10**30), []], "dtype": ["float8_e4m3fn", "int8", "float", 3, None],
    "tensors": [None, [], {"x": None}, {"x": {"shape": [1.5], "dtype": "float32"}}, {"x": {"shape": [-1], "dtype":
                "float32"}}, {"x": {"shape": 3, "dtype": "float32"}}, {"x": {"shape": [True], "dtype": "float32"}}],
    "base_model": [3, [], "a\x1b[31mb", "a\nb", "a\0b"], "model_class": [3, {}], "revision": [1, "\u202e"],
    "peft": [3, [], "x"],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD_META.items() for v in values])
def test_a_field_of_a_wrong_type(field: str, value: Any, folder: Callable, model) -> None:
    path = folder("ours")
    reworded(path / META, **{field: value})
    said = told(model, surgery.attach, path)
    assert said.endswith(f"meta.json lacks, or has wrongly: {field}") and said.count("error[") == 1
    assert "\x1b" not in said


DEEP = b"[" * 100_000
BAD_JSON = [b"", b"{", b"\xff", DEEP, b'{"a":' * 100_000, b"null", b"[]", b"3", b"1" * 5000, b'{"seed": NaN}', b"NaN",
            b'{"seed": -Infinity}', b'"x"', b"\x00", b"{}" * 3]


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: repr(text[:12]))
def test_json_that_is_none(text: bytes, folder: Callable, model, tmp_path: Path) -> None:
    ours, theirs = folder("ours"), folder("theirs")
    (ours / META).write_bytes(text)
    (theirs / CONFIG).write_bytes(text)
    assert told(model, surgery.attach, ours).count("error[") == 1
    assert told(model, surgery.import_peft, theirs).count("error[") == 1
    (tmp_path / "trainer_state.json").write_bytes(text)
    with pytest.raises(SurgeryError, match="bad-data"):
        found_state(tmp_path)


BAD_CONFIG: dict[str, Any] = {
    "r": [None, True, "8", [], {}, 1e999, 10**400], "lora_alpha": [True, "x"], "task_type": [3, [], {}],
    "base_model_name_or_path": [3, ["a"], "a\x1bb", "a\nb"], "revision": [[]], "target_modules": [3, [3], {}],
    "modules_to_save": ["x", [3], {}], "layers_to_transform": ["1", [1.5], True], "layers_pattern": [3],
    "rank_pattern": [3, [], {"q": "x"}, {"q": None}, {"q": True}, {"q": []}], "alpha_pattern": ["x", {"q": {}}],
    "auto_mapping": [3, {"base_model_class": 3}], "bias": [3, []], "exclude_modules": [True],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD_CONFIG.items() for v in values], ids=str)
def test_a_field_of_pefts_of_a_wrong_type(field: str, value: Any, folder: Callable, model) -> None:
    path = folder("theirs")
    text = json.dumps({**json.loads((path / CONFIG).read_text()), field: value}).replace("Infinity", "1e999")
    (path / CONFIG).write_text(text)
    said = told(model, surgery.import_peft, path)
    assert said.endswith(f"adapter_config.json has what cannot stand there as {field}") and said.count("error[") == 1


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn,
          torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_a_dtype_that_no_adapter_has(dtype: torch.dtype, folder: Callable, model) -> None:
    ours, theirs = folder("ours"), folder("theirs")
    for file in (ours / TENSORS, theirs / "adapter_model.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
    listed = json.loads((ours / META).read_text())["tensors"]
    reworded(ours / META, tensors={n: {**form, "dtype": str(dtype)[6:]} for n, form in listed.items()})
    assert re.search("wrongly: tensors|whole numbers where real ones", told(model, surgery.attach, ours))
    assert re.search("dtype", told(model, surgery.import_peft, theirs))


def test_a_spec_that_asks_for_more_than_was_saved(folder: Callable, model) -> None:
    """It is told before a tensor of that size is made."""
    path = folder("ours")
    (path / SPEC).write_text(re.sub(r"rank: int = \d+", "rank: int = 4000000000", (path / SPEC).read_text()))
    assert re.search(r"the spec asks for [\d,]{13,} numbers", told(model, surgery.attach, path))
    theirs = folder("theirs")
    reworded(theirs / CONFIG, r=4_000_000_000)
    assert re.search(r"the spec asks for [\d,]{13,} numbers", told(model, surgery.import_peft, theirs))


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = [header({"x": F32}), *(header(tensors, bytes(8)) for tensors in (
            {"x": {**F32, "shape": [3]}}, {"x": {**F32, "data_offsets": [8, 0]}}, {"x": F32, "y": F32}, {"x": 3},
            {"x": {**F32, "shape": [1 << 40, 1 << 40]}}, {"x": {**F32, "dtype": "F99"}}, {"x": {**F32, "shape": [-1]}},
            {"\x1b[31m\nx": F32})),
        struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 100_000) + DEEP, b"\x80\x04.", b"PK\x03\x04"]


@pytest.mark.parametrize("data", LIES, ids=range(len(LIES)))
def test_a_header_that_lies(data: bytes, folder: Callable, model) -> None:
    ours, theirs = folder("ours"), folder("theirs")
    (ours / TENSORS).write_bytes(data)
    (theirs / "adapter_model.safetensors").write_bytes(data)
    for said in (told(model, surgery.attach, ours), told(model, surgery.import_peft, theirs)):
        assert "error[bad-adapter]" in said and "\x1b" not in said and "\nx" not in said


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, a part cut out or doubled, or the end lost."""
    found, (a, b) = bytearray(data), sorted(draw.randrange(len(data)) for _ in "ab")
    kind = draw.randrange(4)
    if kind == 0:
        for _ in range(draw.choice([1, 3, 20])):
            found[draw.randrange(min(len(found), draw.choice([200, 1 << 30])))] = draw.randrange(256)
    elif kind == 1:
        del found[a:b]
    elif kind == 2:
        found[a:a] = found[a : min(b, a + 50)]
    else:
        del found[a:]
    return bytes(found)


def test_damaged_folders(made: dict, folder: Callable, model) -> None:
    """Whatever it is, it is read as it stands, or told: no other error, and no change of the model."""
    draw, outcomes = random.Random(0), set()
    for kind, read in (("ours", surgery.attach), ("theirs", surgery.import_peft)):
        path = folder(kind)
        for _ in range(60):
            name = draw.choice([n for n in made[kind] if n != "surgery-manifest.json"])
            (path / name).write_bytes(damaged(made[kind][name], draw))
            try:
                surgeon = read(model, path)
                surgeon.remove()
                model.requires_grad_(True)
                outcomes.add("read")
            except SurgeryError:
                told(model, read, path)
                outcomes.add("told")
            (path / name).write_bytes(made[kind][name])
    assert outcomes == {"read", "told"}


# ----------------------------------------------------------------------------------------------- regular expressions


HANGS = [r"(([a-z._0-9])+)+!", r"(.*)*\.(.*)*!", r"(?=(([a-z._0-9]+)+)!).*", r"(.+)+(.+)+(.+)+[^a-z._0-9]",
         r"^(?!(([a-z._0-9]|[a-z])+)+!).*(.)\1\1\1"]
NONE = [r"((a{500}){500}){500}", "a{99999999999}", "a{" + "1" * 5000 + "}", "(?:" * 3000 + ")" * 3000, "q{e}",
        "[[:alpha:]]_proj", "q_(proj", "(?<=a*)b", "x" * (1 << 19)]


@pytest.mark.parametrize("field, whole", [("target_modules", lambda p: p), ("exclude_modules", lambda p: p),
                                          ("rank_pattern", lambda p: {p: 4}), ("modules_to_save", lambda p: [p])])
@pytest.mark.parametrize("pattern", [*HANGS, *NONE], ids=lambda p: p[:24])
def test_a_pattern_that_would_hang_or_is_none(pattern: str, field: str, whole: Callable, folder: Callable, model,
                                              monkeypatch) -> None:
    """It is refused, or decided in time, which then says that it matches nothing."""
    monkeypatch.setattr("surgery.peft.target_modules._PATIENCE", 0.2)
    path = folder("theirs")
    reworded(path / CONFIG, **{"target_modules": ["q_proj"], field: whole(pattern)})
    try:
        surgery.import_peft(model, path).remove()
        model.requires_grad_(True)
        assert pattern in HANGS and field != "target_modules"
    except SurgeryError as error:
        said = "takes too long|no-match" if pattern in HANGS else "is no regular expression"
        assert re.search(said, str(error)) and len(str(error)) < 2000


def test_many_patterns_have_one_bound(model, monkeypatch) -> None:
    """Each of them takes a small part of it."""
    monkeypatch.setattr("surgery.peft.target_modules._PATIENCE", 0.3)
    from surgery.peft.target_modules import _Regular, in_time

    def all_of_them() -> None:
        for i in range(10_000):
            _Regular(rf"((a|b|ab)+)+(c|d){{{i % 5 + 1}}}").fullmatch("ab" * 5)

    with in_time(), pytest.raises(SurgeryError, match="takes too long"):
        all_of_them()


PLAIN = [r".*\.q_proj", r"^(?!.*layers\.1).*(q|k)_proj$", r"model\.layers\.\d+\.self_attn\.[qk]_proj", r"(?i).*Q_PROJ",
         r".*(?<!up)_proj", r"(?P<x>.).*(?P=x)", r"model\.layers\.[0-1]{1,2}\..*", r"[^\W\d_]+", r"a||b|.*k_proj",
         r".*\x71_proj", r"(.*\.)?(?:q|v)_proj\Z", r".*[q\]]_proj", r"\{.*|.*\.v_proj"]


@pytest.mark.parametrize("pattern", PLAIN)
def test_patterns_mean_what_they_mean_to_peft(pattern: str) -> None:
    model = load_demo("llama")
    names = [name for name, _ in model.named_modules() if name]
    assert named({"target_modules": pattern}, model) == [n for n in names if re.fullmatch(pattern, n)]


# ------------------------------------------------------------------------------------------------ a training's state


@pytest.mark.parametrize("step", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "true", "null", '"3"'])
def test_a_step_that_is_no_number(step: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(f'{{"log_history": [{{"step": {step}, "loss": 1.0}}]}}')
    with pytest.raises(SurgeryError, match=r"bad-data\]: cannot read .*: a step of its log is no finite number"):
        found_state(tmp_path)


def test_values_that_a_curve_cannot_show_are_left_out(tmp_path: Path) -> None:
    """A loss of NaN is what the Trainer writes of a run that diverged."""
    values = ["NaN", "1.5", "-Infinity", "1" + "0" * 400, "1e999", "null", '"x"', "true", "2.5"]
    log = ", ".join(f'{{"step": {i}, "loss": {value}}}' for i, value in enumerate(values))
    (tmp_path / "trainer_state.json").write_text(f'{{"log_history": [{log}]}}')
    assert [c.y for c in charts(tmp_path / "trainer_state.json")["loss"]] == [(1.5, 2.5)]


def test_a_state_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trainer_state.json")
    with pytest.raises(SurgeryError, match="bad-data.*a device or a pipe"):
        found_state(tmp_path)


# ------------------------------------------------------------------------------------------------- a model's own files


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": ["x"]}', '{"weight_map": {"a": 3}}',
                                  '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "pipe"}}',
                                  '{"weight_map": {"a": "lost.safetensors"}}', "[" * 100_000])
def test_a_list_of_a_models_files_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    os.mkfifo(tmp_path / "m/pipe")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(text)
    with pytest.raises(SurgeryError, match=r"unknown-model\]: cannot read .*index.json"):
        of_folder(tmp_path / "m")


def test_readers_agree_that_the_folders_are_sound(folder: Callable) -> None:
    assert Saved(folder("ours")).meta["seed"] == 0 and Folder(folder("theirs")).config["peft_type"] == "LORA"
