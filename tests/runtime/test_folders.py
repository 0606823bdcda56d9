"""Folders and files that are replaced: what is ours, what a killed run leaves, and several writers at once."""

import contextlib
import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from models import perturbed

import surgery
from surgery.cli.main import main
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.runtime import atomic_folders
from surgery.runtime.atomic_folders import MANIFEST, Kind, refuse_taken, replacing, replacing_file
from surgery.runtime.save import save_merged

THING = Kind("a thing")
NAMES = ("one.txt", "two.txt", "more/three.txt")


def put(folder: Path, text: str = "1", force: bool = True) -> None:
    """Write a thing: every file of it holds the same text."""
    with replacing(folder, THING, force) as new:
        (new / "more").mkdir()
        for name in NAMES:
            (new / name).write_text(text)


def text_of(folder: Path) -> str:
    """The text of a thing, which must be whole."""
    assert THING.foreign(folder) == [] and (folder / MANIFEST).is_file()
    (text,) = {(folder / name).read_text() for name in NAMES}
    return text


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(params=[True, False], ids=["exchange", "two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """File systems that can exchange two folders in one step, and those that cannot."""
    if not request.param:
        monkeypatch.setattr(atomic_folders, "_exchange", lambda one, other: False)
    return request.param


# ------------------------------------------------------------------------------------------------------ what is ours


def user_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")


USERS: dict[str, Callable[[Path], object]] = {
    "main.py": user_file, "notes.md": user_file, ".secrets.json": user_file, "model.safetensors": user_file,
    "more/notes.txt": user_file, "deep/er": user_file, "empty": Path.mkdir, "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to("one.txt"),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("force", [False, True])
def test_what_we_did_not_write_stays_and_is_named(name: str, force: bool, tmp_path: Path) -> None:
    put(tmp_path / "out")
    USERS[name](tmp_path / "out" / name)
    before = everything(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        put(tmp_path / "out", "2", force)
    assert caught.value.diagnostics[0].code == "bad-output" and name.partition("/")[0] in str(caught.value)
    assert everything(tmp_path) == before and (tmp_path / "out/one.txt").read_text() == "1"


@pytest.mark.parametrize("change", ids=["edited", "a link", "a folder", "another list"], argvalues=[
    lambda out: (out / "one.txt").write_text("mine"),
    lambda out: ((out / "one.txt").rename(out.parent / "x"), (out / "one.txt").symlink_to(out.parent / "x")),
    lambda out: ((out / "one.txt").unlink(), (out / "one.txt").mkdir()),
    lambda out: (out / MANIFEST).write_text('{"kind": "a saved model", "files": {}}')])
def test_what_has_changed_since_we_wrote_it_is_not_ours(change: Callable, tmp_path: Path) -> None:
    put(tmp_path / "out")
    change(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(SurgeryError, match="not a thing as surgery wrote it, .*(one.txt .changed since|more)"):
        put(tmp_path / "out", "2")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("settled, reads", [(0, 2), (10**10, 4)], ids=["long ago", "just now"])
def test_a_file_that_was_not_changed_is_read_once(settled: int, reads: int, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is looked at before it is replaced; and once as the new one. What was written just now may be
    changed within one tick of the file system's clock, and is read each time."""
    folder, seen, digest = tmp_path / "thing", [], atomic_folders.file_digest
    put(folder)
    time.sleep(0.05)
    monkeypatch.setattr(atomic_folders, "_read", {})
    monkeypatch.setattr(atomic_folders, "_SETTLED", settled)
    monkeypatch.setattr(atomic_folders, "file_digest", lambda file, how: seen.append(file.name) or digest(file, how))
    refuse_taken(folder, THING, force=True)
    put(folder, "2")
    assert [sum(name.endswith(each) for name in seen) for each in NAMES] == [reads] * 3
    assert text_of(folder) == "2"
    time.sleep(0.05)
    times = (folder / "one.txt").stat()
    (folder / "one.txt").write_text("3")  # as long as it was, and of the same time
    os.utime(folder / "one.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert THING.foreign(folder) == ["one.txt (changed since)"]


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "null", '{"kind": "a thing"}', '{"kind": "a thing", '
                                  '"files": 3}', '{"kind": "a thing", "files": [["one.txt", 1]]}', "\udcff"])
def test_a_list_that_cannot_be_read_lists_nothing(text: str, tmp_path: Path) -> None:
    put(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SurgeryError, match="bad-output"):
        put(tmp_path / "out", "2")
    assert (tmp_path / "out/one.txt").read_text() == "1"


def test_what_is_missing_of_ours_is_no_reason_to_stop(tmp_path: Path) -> None:
    put(tmp_path / "out")
    (tmp_path / "out/one.txt").unlink()
    put(tmp_path / "out", "2")
    assert text_of(tmp_path / "out") == "2" and everything(tmp_path / "out") == sorted([*NAMES, "more", MANIFEST])


def test_a_merged_model_never_takes_the_place_of_a_project(tmp_path: Path) -> None:
    """The one kind of folder whose names are those of many other folders."""
    project, surgeon = tmp_path / "project", perturbed(load_demo("llama"), "lora")
    project.mkdir()
    for name in ("config.json", "main.py", "notes.md", ".secrets.json", "model.safetensors"):
        (project / name).write_text("{}")
    before = everything(tmp_path)
    for force in (False, True):
        with pytest.raises(SurgeryError, match="not a saved model as surgery wrote it.*holds .secrets.json, config.js"):
            save_merged(surgeon, project, force=force)
    result = CliRunner().invoke(main, ["apply", "lora", "demo:llama", "--merge", "-o", str(project), "--force"])
    assert result.exit_code == 2 and "error[bad-output]" in result.stderr and everything(tmp_path) == before

    save_merged(surgeon, tmp_path / "merged")
    with pytest.raises(SurgeryError, match="exists already"):
        save_merged(surgeon, tmp_path / "merged")
    save_merged(surgeon, tmp_path / "merged", force=True)
    load_demo("llama").save_pretrained(tmp_path / "merged")  # as after training on: the same names, other numbers
    with pytest.raises(SurgeryError, match="model.safetensors .changed since"):
        save_merged(surgeon, tmp_path / "merged", force=True)


def test_an_adapter_that_peft_wrote_is_not_ours(tmp_path: Path) -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load("lora").retarget("**.q_proj"))
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / "theirs" / name).write_text("{}")
    with pytest.raises(SurgeryError, match="adapter_model.safetensors"):
        surgery.export_peft(surgeon, tmp_path / "theirs")
    surgery.export_peft(surgeon, tmp_path / "ours")
    surgery.export_peft(surgeon, tmp_path / "ours")
    with pytest.raises(SurgeryError, match="exists already"):
        surgery.export_peft(surgeon, tmp_path / "ours", force=False)


def test_an_adapter_of_an_earlier_version_has_no_list(tmp_path: Path) -> None:
    surgeon = surgery.apply(load_demo("llama"), surgery.load("lora").retarget("**.q_proj"))
    surgeon.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    surgeon.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    (tmp_path / "a" / "trainer_state.json").write_text("{}")
    with pytest.raises(SurgeryError, match="trainer_state.json"):
        surgeon.save(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------- permissions


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_of_what_is_replaced_are_kept(tmp_path: Path, exchange: bool) -> None:
    put(tmp_path / "out")
    modes = {"": 0o2770, "one.txt": 0o640, "more": 0o711, "more/three.txt": 0o604}
    for name, wanted in modes.items():
        (tmp_path / "out" / name).chmod(wanted)
    put(tmp_path / "out", "2")
    assert text_of(tmp_path / "out") == "2" and {n: mode(tmp_path / "out" / n) for n in modes} == modes


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_what_is_new_has_the_permissions_that_the_user_asks_for(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        put(tmp_path / "out")
        with replacing_file(tmp_path / "file.csv") as new:
            new.write_text("x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "out") == 0o777 & ~umask
    assert {mode(tmp_path / name) for name in ("out/one.txt", "out/more/three.txt", "file.csv")} == {0o666 & ~umask}


def test_permissions_of_a_file_that_is_replaced_are_kept(tmp_path: Path) -> None:
    file, spec = tmp_path / "table.csv", tmp_path / "a.surg"
    for path in (file, spec):
        path.write_text("target   linear { add low_rank() }\n")
        path.chmod(0o604)
    with replacing_file(file) as new:
        new.write_text("new")
    assert CliRunner().invoke(main, ["fmt", str(spec)]).exit_code == 0
    assert (file.read_text(), spec.read_text().split("\n")[0]) == ("new", "target linear {")
    assert mode(file) == mode(spec) == 0o604 and everything(tmp_path) == ["a.surg", "table.csv"]


def test_a_file_that_is_write_protected_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.csv").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, kind: os.path.isdir(path))  # as for a user who is not root
    with pytest.raises(SurgeryError, match="write-protected"), replacing_file(tmp_path / "table.csv") as new:
        new.write_text("new")


@pytest.mark.parametrize("name", ["lock", "new", "unlocked"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    with replacing_file(tmp_path / name) as new:
        new.write_text("x")
    assert everything(tmp_path) == [name]


# ------------------------------------------------------------------------------------------------ runs that are killed


def child(work: Callable[[], object]) -> int:
    """The number of a process that does the work and ends with 0, with 3 after a diagnostic, with 4 after another
    error."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    except SurgeryError as error:
        os.write(2, str(error).encode())
        os._exit(3)
    except BaseException as error:
        os.write(2, repr(error).encode())
    os._exit(4)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def test_a_killed_run_leaves_the_old_or_the_new_and_the_next_clears_up(tmp_path: Path, exchange: bool) -> None:
    """At random moments, most of them in the middle of some step."""
    draw, out = random.Random(0), tmp_path / "out"
    put(out, "0")

    def write() -> None:
        for i in range(10_000):
            put(out, str(i))

    left = 0
    for _ in range(25):
        number = child(write)
        time.sleep(draw.uniform(0.002, 0.03))
        os.kill(number, signal.SIGKILL)
        assert ended(number) == -signal.SIGKILL
        left += len([p for p in everything(tmp_path) if p.startswith(".surgery-")])
        if exchange:
            assert text_of(out).isdigit()  # also before a next run has put anything back
        put(tmp_path / "other")  # a run in the same folder that writes something else
        assert text_of(out).isdigit()
        assert [p for p in everything(tmp_path) if p.endswith(".txt")] == sorted(
            f"{folder}/{name}" for folder in ("other", "out") for name in NAMES)
    assert left


@pytest.mark.parametrize("step", ["mkdir", "flock", "rename", "fsync", "_put", "_exchange"])
def test_a_run_that_is_killed_at_a_step(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out", "old")
    owner = {"mkdir": Path, "flock": atomic_folders.fcntl, "rename": os, "fsync": os}.get(step, atomic_folders)
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, lambda *arguments, **more: os.kill(os.getpid(), signal.SIGKILL))
        assert ended(child(lambda: put(tmp_path / "out", "new"))) == -signal.SIGKILL
    assert text_of(tmp_path / "out") == "old"
    put(tmp_path / "out", "new")
    assert text_of(tmp_path / "out") == "new" and not list(tmp_path.glob(".surgery-*/new"))


def test_an_old_folder_that_was_away_when_the_run_was_killed_comes_back(tmp_path: Path, monkeypatch) -> None:
    put(tmp_path / "out", "old")
    real, count = Path.rename, iter((False, True))

    def second(path: Path, target: Path) -> object:
        return os.kill(os.getpid(), signal.SIGKILL) if next(count) else real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(atomic_folders, "_exchange", lambda one, other: False)
        patched.setattr(Path, "rename", second)
        assert ended(child(lambda: put(tmp_path / "out", "new"))) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    put(tmp_path / "other")
    assert text_of(tmp_path / "out") == "old" and everything(tmp_path)[0] == "other"


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "one", THING) as new:
        put(tmp_path / "two")
        assert ended(child(lambda: put(tmp_path / "two", "2"))) == 0
        assert new.is_dir() and text_of(tmp_path / "two") == "2"
    assert everything(tmp_path)[0] == "one"


@pytest.mark.parametrize("lock", [None, "", "mine", '{"surgery": "writes"}', '{"target": "x"}', "[" * 100_000, "pipe"])
def test_a_folder_that_only_looks_like_ours_is_left_alone(lock: str | None, tmp_path: Path) -> None:
    mine = tmp_path / ".surgery-notes"
    (mine / "old").mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    if lock == "pipe":
        os.mkfifo(mine / "lock")
    elif lock is not None:
        (mine / "lock").write_text(lock)
    put(tmp_path / "out")
    assert (mine / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ writers at one time


@pytest.mark.parametrize("force", [False, True])
def test_three_first_writers_at_once(force: bool, tmp_path: Path, exchange: bool, capfd) -> None:
    """All have looked, and found nothing, before the first one is done. One wins; with `force`, the last."""
    for turn in range(4):
        out, ready, (gate, opens) = tmp_path / f"out{turn}", tmp_path / f"ready{turn}", os.pipe()
        ready.mkdir()

        def write(text: str) -> None:
            with replacing(out, THING, force) as new:
                (new / "more").mkdir()
                for name in NAMES:
                    (new / name).write_text(text)
                (ready / text).touch()
                os.close(opens)
                os.read(gate, 1)  # until all are here

        numbers = [child(lambda text=text: write(text)) for text in "123"]
        while len(os.listdir(ready)) < 3:
            time.sleep(0.001)
        os.close(opens)
        assert sorted(map(ended, numbers)) == ([0, 0, 0] if force else [0, 3, 3])
        os.close(gate)
        assert text_of(out) in "123" and not list(tmp_path.glob(".surgery-*"))
    said = capfd.readouterr().err
    assert said.count("exists already") == said.count("error[") == (0 if force else 8)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_writer_comes_after_one_of_the_last_looks(after: int, tmp_path: Path, exchange: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes, what it has written stays."""
    out, real, looks = tmp_path / "out", Path.exists, []

    def exists(self: Path) -> bool:
        found = real(self)
        if self == out and not found:
            looks.append(self)
            if len(looks) == after:
                (tmp_path / "other").mkdir()
                (tmp_path / "other/one.txt").write_text("1")
                (tmp_path / "other").rename(out)
        return found

    monkeypatch.setattr(Path, "exists", exists)
    with contextlib.suppress(SurgeryError), replacing(out, THING, force=False) as new:
        (new / "one.txt").write_text("2")
    monkeypatch.undo()
    came = len(looks) >= after
    assert (out / "one.txt").read_text() == ("1" if came else "2") and not list(tmp_path.glob(".surgery-*"))


def test_writers_who_take_turns(tmp_path: Path, exchange: bool) -> None:
    def write(text: str) -> None:
        for _ in range(30):
            put(tmp_path / "out", text)

    numbers = [child(lambda text=text: write(text)) for text in "12"]
    assert [ended(number) for number in numbers] == [0, 0]
    assert text_of(tmp_path / "out") in "12" and everything(tmp_path)[0] == "out"


def test_a_file_of_the_users_that_comes_at_the_last_moment(tmp_path: Path) -> None:
    put(tmp_path / "out", "1")
    with pytest.raises(SurgeryError, match="holds notes.md"), replacing(tmp_path / "out", THING) as new:
        (new / "one.txt").write_text("2")
        (tmp_path / "out/notes.md").write_text("mine")
    assert (tmp_path / "out/notes.md").read_text() == "mine" and (tmp_path / "out/one.txt").read_text() == "1"
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["kind"] == "a thing"
