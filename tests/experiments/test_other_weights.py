"""A base model whose weights are replaced under the same name is another one: to a comparison, and to a run that goes
on."""

import json
from pathlib import Path

import pytest
import torch
from small_text import questions, save_causal

import surgery
from surgery.experiments import fine_tuning
from surgery.experiments.comparison import comparison_of
from surgery.experiments.comparison_files import RUNS, Run, finished, keep
from surgery.experiments.fine_tuning import Data, Training

FEW = surgery.parse('spec few\ntarget linear "**.q_proj" { add low_rank(2) }')
SHORT = Training(lr=1e-2, steps=3, batch=4, every=1, length=64)


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(20)))
    return save_causal(tmp_path / "base")


def replace_weights(base: str) -> None:
    other = surgery.load_model(base)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    other.save_pretrained(base)


def test_its_runs_are_none_of_the_new_weights(base: str, tmp_path: Path) -> None:
    def compared():
        return comparison_of({"few": FEW}, base, Data(str(tmp_path / "train.jsonl")), rates=(1e-2,), seeds=1, how=SHORT)

    (run,) = compared().runs(tmp_path / "out")
    assert compared().runs(tmp_path / "out") == [run] and run.weights
    replace_weights(base)
    with pytest.raises(surgery.SurgeryError, match="is a run of other weights than"):
        compared().runs(tmp_path / "out")
    before = Run(run.asked, None, None, 1, {}, 1.0, 1, "a machine")  # a file of before says nothing of them
    keep(tmp_path / "before", before)
    assert finished(tmp_path / "before", run.asked, lambda: "others") == before and (tmp_path / "out" / RUNS).is_dir()


def test_a_run_on_other_weights_does_not_go_on(base: str, tmp_path: Path, monkeypatch) -> None:
    def stops(self, args, state, control, **more) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    def run(**more):
        return surgery.train(FEW, base, str(tmp_path / "train.jsonl"), tmp_path / "half", setting=SHORT, **more)

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning.Progress, "on_step_end", stops)
        with pytest.raises(KeyboardInterrupt):
            run()
    replace_weights(base)
    with pytest.raises(surgery.SurgeryError, match="began on other weights"):
        run(resume=True)
