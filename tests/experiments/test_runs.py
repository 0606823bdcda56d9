"""What a comparison keeps, and what its rows say: runs found again, a rate chosen on one part, scores of another."""

from dataclasses import replace
from pathlib import Path

import pytest

import surgery
from surgery.cli.compare import _edges
from surgery.experiments.comparison_files import Run, Steps, finished, keep, keep_steps, known_steps, place_of
from surgery.experiments.comparison_table import Mean, rows

# ------------------------------------------------------------------------------------------------------------ files


def run(method: str = "lora", rate: float = 1e-3, seed: int = 0, validation: float | None = 0.5,
        test: float = 0.5) -> Run:
    asked, costs = {"method": method, "rate": rate, "seed": seed}, (0.1, 100, "a machine")
    if validation is None:
        return Run(asked, None, None, 10, {}, *costs)
    return Run(asked, {"accuracy": validation}, {"accuracy": test}, 10, {"entropy": 1.0 + seed}, *costs)


def test_a_run_is_kept_and_found_again(tmp_path: Path) -> None:
    assert finished(tmp_path / "runs", run().asked) is None
    keep(tmp_path / "runs", run())
    keep(tmp_path / "runs", run(seed=1, validation=None))
    assert finished(tmp_path / "runs", run().asked) == run()
    assert finished(tmp_path / "runs", run(seed=1).asked) == run(seed=1, validation=None)
    assert finished(tmp_path / "runs", run(seed=2).asked) is None
    assert all(p.suffix == ".json" for p in (tmp_path / "runs").iterdir())


def test_times_are_kept_for_the_methods_in_their_order(tmp_path: Path) -> None:
    steps = Steps({"specs": {"full": None, "lora": "text"}}, {"full": [2.0], "lora": [1.0]}, "a machine")
    assert known_steps(tmp_path / "steps.json", steps.asked) is None
    keep_steps(tmp_path / "steps.json", steps)
    assert known_steps(tmp_path / "steps.json", steps.asked) == steps
    assert known_steps(tmp_path / "steps.json", {"specs": {"lora": "text", "full": None}}) is None


@pytest.mark.parametrize("text", ['{"half', "[]", "{}", '{"asked": {}}'])
def test_a_file_that_is_no_run_is_told(text: str, tmp_path: Path) -> None:
    keep(tmp_path, run())
    place_of(tmp_path, run().asked).write_text(text)
    with pytest.raises(surgery.SurgeryError, match="is not finished"):
        finished(tmp_path, run().asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(surgery.SurgeryError, match="bad-output"):
        keep(tmp_path / "file", run())


# ------------------------------------------------------------------------------------------------------------- rows


def test_the_rate_is_chosen_on_the_validation_part_and_the_score_taken_on_the_test_part() -> None:
    runs = [run(rate=1e-3, seed=0, validation=0.6, test=0.9), run(rate=1e-3, seed=1, validation=0.6, test=0.9),
            run(rate=1e-2, seed=0, validation=0.9, test=0.5), run(rate=1e-2, seed=1, validation=0.5, test=0.7),
            run(rate=1e-1, seed=0, validation=None), run(rate=1e-1, seed=1, validation=1.0)]
    row, = rows(runs)
    assert (row.rate, row.seeds) == (1e-2, 2)
    assert row.scores["accuracy"] == Mean(pytest.approx(0.6), pytest.approx(0.1))
    assert row.entropy == Mean(1.5, pytest.approx(0.5))


def test_one_seed_has_no_standard_error() -> None:
    first, second = rows([run("lora"), run("dora")])
    assert (first.method, second.method) == ("lora", "dora") and first.scores["accuracy"] == Mean(0.5, None)


@pytest.mark.parametrize(("best", "edge"), [(1e-4, "bottom"), (1e-3, None), (1e-2, "top")])
def test_a_rate_at_the_end_of_the_grid_is_said(best: float, edge: str | None) -> None:
    rates = (1e-3, 1e-4, 1e-2)
    row, = rows([run(rate=rate, validation=0.9 if rate == best else 0.5) for rate in rates])
    assert (row.rate, row.edge) == (best, edge)
    said = _edges([row, replace(row, method="dora")])
    assert said == ([] if edge is None else [f"lora, dora: {best:g} is the {edge} of the grid: try "
                                             + ("higher" if edge == "top" else "lower")])


def test_one_rate_is_no_grid_and_none_is_chosen_among_those_that_diverge() -> None:
    assert rows([run()])[0].edge is None
    assert rows([run(rate=rate, validation=None) for rate in (1e-3, 1e-2)])[0].edge is None


def test_times_are_compared_within_a_round() -> None:
    """The second round was slow for all."""
    steps = Steps({}, {"lora": [1.0, 10.0, 2.0], "dora": [1.5, 15.0, 3.0]}, "a machine")
    lora, dora = rows([run("lora"), run("dora")], steps)
    assert (lora.step_seconds, lora.step_ratio, dora.step_seconds, dora.step_ratio) == (2.0, 1.0, 3.0, 1.5)
