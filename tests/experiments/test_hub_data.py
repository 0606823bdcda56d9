"""Data sets by name, through a stand-in of the library `datasets` that reads a folder."""

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.experiments.fine_tuning import Data
from surgery.experiments.tasks import Choice, read_task
from surgery.experiments.training_record import digest_of

CLASSES = ["entailment", "not_entailment"]
TEXTS = [{"sentence1": "a b", "sentence2": "c", "label": 1, "idx": 0}, {"sentence1": "d", "sentence2": "e", "label": 0, "idx": 1}]


class Refused(Exception):
    """Of the stand-in's."""


class Rows(list):
    """What the library's data sets are of, here."""

    def __init__(self, rows: list[dict]):
        super().__init__(rows)
        self.column_names = list(rows[0]) if rows else []
        self.features = {name: SimpleNamespace(names=CLASSES) if name == "label" else object() for name in self.column_names}


def splits(path: str, config_name: str | None, revision: str | None) -> list[str]:
    if not (Path(path) / (config_name or "")).is_dir():
        raise FileNotFoundError(f"Dataset {path!r} doesn't exist on the Hub or cannot be accessed.\nmore")
    return sorted(file.stem for file in (Path(path) / (config_name or "")).iterdir())


def load(path: str, name: str | None, split: str, revision: str | None) -> Rows:
    if split not in splits(path, name, revision):
        raise ValueError(f"Unknown split {split!r}. Should be one of {splits(path, name, revision)}.")
    return Rows([json.loads(line) for line in (Path(path) / (name or "") / f"{split}.jsonl").read_text().splitlines()])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    """In the place of the library, whether it is installed or not."""
    module = ModuleType("datasets")
    module.load_dataset, module.get_dataset_split_names = load, splits
    module.exceptions = SimpleNamespace(DatasetsError=Refused)
    module.__spec__ = ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", module)


def written(folder: Path, **files: list[dict]) -> str:
    folder.mkdir(parents=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_data_set_is_read_as_its_file_would_be(tmp_path: Path) -> None:
    """With the names of classes, of the configuration and the split that are asked for."""
    written(tmp_path / "glue/rte", train=TEXTS, validation=TEXTS[:1] + TEXTS)
    name = f"hub:{tmp_path}/glue:rte"
    found = read_task(name)
    assert (found.classes, found.labels, found.seconds) == (tuple(CLASSES), (1.0, 0.0), ("c", "e"))
    assert found.name == name.removeprefix("hub:") and len(read_task(f"{name}#validation")) == 3
    learned, dev, tests = Data(name, f"{name}#validation", (f"{name}@main#train", f"{name}#validation")).read()
    assert len(learned) == 2 and dev and len(dev) == 3 and len({test.name for test in tests}) == 2
    questions = written(tmp_path / "arc", test=[{"question": "q", "choices": ["a", "b"], "answer": 1}])
    assert read_task(f"hub:{questions}").items == (Choice("q", ("a", "b"), 1),)
    assert digest_of(name) != digest_of(f"{name}#validation") and digest_of(name) == digest_of(name)


@pytest.mark.parametrize(("name", "said"), [
    ("hub:", "is not of the form hub:ID:CONFIGURATION@REVISION#SPLIT"), ("hub:a:b:c", "is not of the form"),
    ("hub:nobody/nothing", "cannot read hub:nobody/nothing: Dataset 'nobody/nothing' doesn't exist"),
    ("hub:{}/glue:rte#test", "Unknown split 'test'"), ("hub:{}/empty#train", "holds no row"),
    ("hub:{}/unlabelled", "hub:{}/unlabelled:2 has no `label` that is a text"),
])
def test_what_cannot_be_read_is_told(name: str, said: str, tmp_path: Path) -> None:
    written(tmp_path / "glue/rte", train=TEXTS)
    written(tmp_path / "empty", train=[])
    written(tmp_path / "unlabelled", train=[TEXTS[0], {**TEXTS[1], "label": -1}])
    result = CliRunner().invoke(main, ["train", "lora", "demo:bert", "--data", name.format(tmp_path), "-o", str(tmp_path / "o")])
    assert result.exit_code and said.format(tmp_path) in " ".join(result.stderr.split()) and not (tmp_path / "o").exists()


def test_without_the_library_what_to_install_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.extras.importlib.util.find_spec", lambda name: None if name == "datasets" else find_spec(name))
    with pytest.raises(surgery.SurgeryError, match=r"needs datasets, which is not installed[^$]*surgery\[hub\]"):
        read_task("hub:nyu-mll/glue:rte")
