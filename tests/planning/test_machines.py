"""Which machine a program is chosen for: the numbers that were measured, and what becomes of a file that is broken."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import run
from torch import nn

from surgery.codegen.cost_model import CPU, Machine
from surgery.diagnostics import SurgeryError, SurgeryWarning
from surgery.experiments.calibration import keep
from surgery.language.library import parse
from surgery.planning import machines
from surgery.planning.fitness import estimated
from surgery.planning.machines import machine, measured, place, supposed
from surgery.runtime.apply import apply

SLOW = Machine(1e-6, 1e-12, 1e-12)  # its arithmetic takes long
AGILE = Machine(1e-15, 1e-12, 1e-3)  # starting an operation does


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache of its own; what a process has read is read again."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "ours"))
    for known in (measured, machine):
        known.cache_clear()
    yield tmp_path
    for known in (measured, machine):
        known.cache_clear()


def test_without_a_calibration_a_cpu_is_what_it_always_was():
    assert all(machine(device, dtype).measured == CPU.measured for device in ("cpu", "meta") for dtype in machines.DTYPES)
    # of narrow activations the set-up is rounded
    assert {dtype for dtype in machines.DTYPES if machine("cpu", dtype).rounds} == {"bfloat16", "float16"}
    assert all(machine("cpu", dtype).setup_flop in (None, CPU.flop) for dtype in machines.DTYPES)
    # FLOP, numbers and launches weigh 1 : 30 : 400,000, which chose the programs before there were machines
    assert (CPU.number / CPU.flop, CPU.launch / CPU.flop) == pytest.approx((30, 4e5))
    assert machine("cuda", "bfloat16").flop < machine("cuda", "float32").flop < CPU.flop
    assert not place().exists()


def test_what_was_measured_is_read_again(cache):
    written = keep("cpu", {"float32": SLOW})
    assert written == place() and written.is_relative_to(cache) and machine("cpu") == machine("meta") == SLOW
    keep("cuda", {"bfloat16": AGILE})
    assert machine("cpu") == SLOW and machine("cuda", "bfloat16").measured == AGILE.measured
    assert machine("cpu", "bfloat16").measured == CPU.measured and machine("cuda") == supposed("cuda", "float32")
    assert [path.name for path in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '{"format_version": "9"}', '{"format_version": "1.0", "devices": 3}',
    *(json.dumps({"format_version": "1.0", "devices": {"cpu": {"float32": numbers}}}) for numbers in (
        None, {}, {"flop": 1e-9}, {"flop": 1e-9, "number": 1e-9, "launch": -1e-6}, {"flop": 0.0, "number": 1e-9, "launch": 1e-6},
        {"flop": "1", "number": 1e-9, "launch": 1e-6}, {"flop": 1e-9, "number": 1e-9, "launch": 5.0},
        {"flop": True, "number": 1e-9, "launch": 1e-6}, {"flop": 1e-9, "number": 1e-9, "launch": 1e-6, "more": 1e-6}))])
def test_a_broken_file_is_told_and_changes_nothing(text):
    place().parent.mkdir()
    place().write_text(text)
    with pytest.warns(SurgeryWarning, match="is not used") as told:
        assert machine("cpu") == CPU and machine("cpu", "bfloat16").measured == CPU.measured
    assert len(told) == 1 and "--calibrate" in str(told[0].message)
    with warnings.catch_warnings():  # what is written takes its place
        warnings.simplefilter("error")
        keep("cpu", {"float32": SLOW})
        assert machine("cpu") == SLOW


def test_a_file_that_cannot_be_written_leaves_the_one_before(monkeypatch):
    keep("cpu", {"float32": SLOW})
    before = place().read_text()

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SurgeryError, match="No space left on device"):
        keep("cpu", {"float32": AGILE})
    assert place().read_text() == before and len(list(place().parent.iterdir())) == 1


# --------------------------------------------------------------------------------------------------------- choices


WIDE = parse('spec wide()\ntarget linear "**" {\n  add low_rank(24)\n}')


def test_a_program_is_chosen_by_the_numbers_of_its_device():
    compiled = apply(nn.Sequential(nn.Linear(48, 48)), WIDE).plan.placed[0].compiled
    strategies = [[compiled.candidates(tokens=tokens, machine=each)[0].strategy for tokens in (8, 100_000)]
                  for each in (SLOW, AGILE)]
    assert strategies[0] != strategies[1]
    for each in (CPU, SLOW, AGILE):  # the same on every asking, in any order
        assert compiled.program(machine=each).source == copy.deepcopy(compiled).program(machine=each).source
        assert {c.outputs for c in compiled.candidates(machine=each)} == {c.outputs for c in compiled.candidates()}


def test_an_adapter_runs_what_its_machine_is_best_at_and_saves_the_same(tmp_path):
    outputs, states = [], []
    for each in (SLOW, AGILE):
        keep("cpu", {"float32": each})
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 48))
        surgeon = apply(model, WIDE, seed=0)
        assert estimated(surgeon.plan.placed[0]).candidates[0] is surgeon.adapters["0"].programs()[True].plan
        outputs.append(model(torch.linspace(-1, 1, 96).view(2, 48)))
        surgeon.save(tmp_path / str(each.flop))
        states.append({path.name: path.read_bytes() for path in (tmp_path / str(each.flop)).iterdir()})
    assert states[0] == states[1]
    torch.testing.assert_close(*outputs)


def test_a_module_that_is_moved_is_chosen_for_anew():
    keep("cpu", {"float32": SLOW, "bfloat16": AGILE})
    model = nn.Sequential(nn.Linear(48, 48))
    adapter, x = apply(model, WIDE).adapters["0"], torch.randn(2, 48)
    wide, narrow = ("cpu", torch.float32), ("cpu", torch.bfloat16)
    first = adapter.programs()
    model(x)
    assert set(adapter._programs) == {wide} and adapter.programs(wide) is first
    model.to(torch.bfloat16)(x.bfloat16())
    assert set(adapter._programs) == {wide, narrow} and adapter.programs(narrow)[True].plan is not first[True].plan
    model.to(torch.float32)(x)
    assert adapter.programs(wide) is first
    assert copy.deepcopy(adapter).programs()[True].source == first[True].source


# ------------------------------------------------------------------------------------------------- the command line


def test_a_set_up_is_as_slow_as_float32_where_a_half_dtype_is_fast():
    """RandLoRA's bases make a product of matrices as large as the weight: in float32 that takes longer than to pass
    the tokens through both of them."""
    row = json.loads(run("show", "randlora", "--program", "--shape", "4096,4096", "--tokens", "8192", "--device", "cuda",
                         "--dtype", "bfloat16", "--json").stdout)["programs"][0]
    assert row["candidates"][0]["strategy"] == "activations"


def test_show_says_which_program_a_device_gets():
    plain = run("show", "dora", "--program").stdout
    assert run("show", "dora", "--program", "--device", "cpu").stdout == plain
    keep("cuda", {"bfloat16": AGILE})
    of_cuda = run("show", "vera", "--program", "--shape", "64,64", "--device", "cuda", "--dtype", "bfloat16", "--json")
    row = json.loads(of_cuda.stdout)["programs"][0]
    assert (row["device"], row["dtype"]) == ("cuda", "bfloat16")
    assert "a step of 1,024 tokens on cuda in bfloat16, by estimate" in json.loads(of_cuda.stdout)["text"]
    assert run("show", "dora", "--device", "cuda").exit_code == 2


def test_calibration_measures_keeps_and_says_where(monkeypatch):
    monkeypatch.setattr("surgery.experiments.calibration._TIME", 1e-4)
    monkeypatch.setattr("surgery.experiments.calibration._SIDES", (32, 64))
    monkeypatch.setattr("surgery.experiments.calibration._MOVED", 2**12)
    result = run("bench", "--calibrate", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["path"] == str(place()) and {"float32", "bfloat16"} <= set(found["machines"])
    assert machine("cpu", "bfloat16").measured == found["machines"]["bfloat16"]
    # a set-up computes in float32 whatever the layer's dtype
    assert machine("cpu", "bfloat16").setup_flop == machine("cpu").flop
    assert all(0 < number < 1e-2 for each in found["machines"].values() for number in each.values())


@pytest.mark.parametrize("arguments, says", [
    (("--calibrate", "lora"), "--calibrate measures a device"), (("lora",), "Missing option '--model'"),
    (("--model", "demo:llama"), "Missing argument 'SPEC...'"), (("--calibrate", "--device", "tpu9"), "no device `tpu9`")])
def test_what_is_wrong_is_said(arguments, says):
    result = run("bench", *arguments)
    assert result.exit_code == 2 - ("tpu9" in arguments) and says in result.stderr and not place().exists()
