"""What a comparison keeps, and what its rows say: runs found again, a rate chosen on one part, scores of another."""

from dataclasses import replace
from pathlib import Path

import pytest

import surgery
from surgery.cli.compare import _edges
from surgery.experiments.comparison_files import Layer, Run, Steps, finished, keep, keep_steps, known_steps, place_of
from surgery.experiments.comparison_table import Mean, bearing, differences, entropy, rows

# ------------------------------------------------------------------------------------------------------------ files


def run(method: str = "lora", rate: float = 1e-3, seed: int = 0, validation: float | None = 0.5,
        test: float = 0.5) -> Run:
    asked, costs = {"method": method, "rate": rate, "seed": seed}, (0.1, 100, "a machine")
    if validation is None:
        return Run(asked, None, None, 10, {}, *costs)
    layer = Layer(0, {"entropy": 1.0, "condition_number": None}, (1.0,), (0.5,))
    return Run(asked, {"accuracy": validation}, {"t": {"accuracy": test}}, 10, {"entropy": 1.0 + seed}, *costs,
               {"t": 0.25}, (layer,))


def test_a_run_is_kept_and_found_again(tmp_path: Path) -> None:
    assert finished(tmp_path / "runs", run().asked) is None
    keep(tmp_path / "runs", run())
    keep(tmp_path / "runs", run(seed=1, validation=None))
    assert finished(tmp_path / "runs", run().asked) == run()
    assert finished(tmp_path / "runs", run(seed=1).asked) == run(seed=1, validation=None)
    assert finished(tmp_path / "runs", run(seed=2).asked) is None
    assert all(p.suffix == ".json" for p in (tmp_path / "runs").iterdir())


def test_a_comment_of_a_spec_makes_no_other_run(tmp_path: Path) -> None:
    """Only what is in the spec does, and a pattern may hold what begins a comment."""
    target = 'target linear "a#b" {\n  add low_rank(2)\n}\n'
    first = f"# LoRA\nspec lora\n\n{target}"
    kept = replace(run(), asked={**run().asked, "spec": first})
    keep(tmp_path, kept)
    keep_steps(tmp_path / "steps.json", steps := Steps({"specs": {"lora": first}}, {"lora": [1.0]}, "a machine"))
    for text in (first, f"# another\n# word\nspec lora  # here too\n\n{target}", f"spec lora\n\n{target}"):
        assert finished(tmp_path, {**kept.asked, "spec": text}) == kept
        assert known_steps(tmp_path / "steps.json", {"specs": {"lora": text}}) == steps
    for text in (first.replace("a#b", "a#c"), first.replace("2", "3"), None):
        assert finished(tmp_path, {**kept.asked, "spec": text}) is None
        assert known_steps(tmp_path / "steps.json", {"specs": {"lora": text}}) is None


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
    assert row.scores["t"]["accuracy"] == Mean(pytest.approx(0.6), pytest.approx(0.1))
    assert row.entropy == Mean(1.5, pytest.approx(0.5))


def test_one_seed_has_no_standard_error() -> None:
    first, second = rows([run("lora"), run("dora")])
    assert (first.method, second.method) == ("lora", "dora") and first.scores["t"]["accuracy"] == Mean(0.5, None)


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


# ------------------------------------------------------------------------------------------------------ differences


def test_methods_are_compared_seed_by_seed() -> None:
    """Seeds differ by a lot and methods by little: their means do not tell them apart, and the pairs do."""
    noise, gains = (0.1, 0.7, 0.4, 0.9), (0.05, 0.06, 0.05, 0.04)
    runs = [run(method, seed=seed, test=noise[seed] + (gains[seed] if method == "dora" else 0.0))
            for seed in range(4) for method in ("lora", "dora")]
    found, = differences(runs)
    assert (found.method, found.other, found.test, found.apart) == ("dora", "lora", "t", True)
    assert found.mean == Mean(pytest.approx(0.05), pytest.approx(0.00408, rel=1e-3))
    assert Mean.of(noise).error > 3 * found.mean.value
    back, = differences(runs, against="dora")
    assert (back.method, back.mean.value) == ("lora", -found.mean.value)
    same, = differences(runs, of=entropy)
    assert same.test == "entropy of ΔW" and same.mean == Mean(0.0, 0.0) and not same.apart
    said = bearing(runs, [found], {"t": 30})
    assert said[0].startswith("1 of 1 differences from lora are told apart") and "dora on t" in said[0]
    assert "the same 30 items of t: a score of one model has a standard error of 0.2500" in said[1]


def test_many_comparisons_are_held_to_more() -> None:
    """t = 4 of three degrees of freedom: apart alone (2-sided limit 3.18), and not among five (5.84)."""
    spread = (0.01, -0.01, 0.01, -0.01)  # a standard error of 0.02 / 12^½

    def of(methods: int) -> list[bool]:
        runs = [run(f"m{i}", seed=seed, test=0.5 + (i > 0) * (4 * 0.02 / 12**0.5 + spread[seed]))
                for seed in range(4) for i in range(methods + 1)]
        return [each.apart for each in differences(runs)]

    assert of(1) == [True] and of(5) == [False] * 5


def test_what_has_no_spread_is_not_told_apart() -> None:
    """One seed; and two seeds that differ by the same one item of a few."""
    one = [run("lora", test=0.5), run("dora", test=0.9)]
    two = [run(m, seed=seed, test=t) for seed in (0, 1) for m, t in (("lora", 0.5), ("dora", 0.75))]
    assert not differences(one)[0].apart and not differences(two)[0].apart
    assert "One seed has no standard error" in bearing(one, differences(one), {})[0]


def test_a_method_that_diverged_is_not_compared_and_less_is_better_for_losses() -> None:
    diverged = [run("lora"), replace(run("dora"), validation=None, tests=None), run("oft")]
    assert [each.method for each in differences(diverged)] == ["oft"]
    low, high = (replace(run(rate=rate), validation={"loss": loss}) for rate, loss in ((1e-3, 0.5), (1e-2, 0.7)))
    assert rows([low, high])[0].rate == 1e-3
