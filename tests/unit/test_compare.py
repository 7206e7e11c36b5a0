"""Runs are equal by steps, samples and losses; damaged evidence is refused by file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic.compare import CompareError, Comparison, compare_runs, render


def step_lines(count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "generation": 0,
            "loss": 5.0 - step / 10,
            "sample_digest": f"{step:028x}",
            "weights_digest": f"w{step}",
        }
        for step in range(count)
    ]


def write(folder: Path, steps: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "summary.json").write_text(json.dumps({"outcome": "completed"}))
    return folder


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write(tmp_path / "a", step_lines())


def against(first: Path, steps: list[dict[str, Any]], tolerance: float = 1e-6) -> Comparison:
    return compare_runs(first, write(first.parent / "b", steps), tolerance)


def printed(comparison: Comparison) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(comparison))
    return captured.get()


def test_the_same_run_is_equal(first: Path) -> None:
    comparison = against(first, step_lines(), tolerance=0.0)
    assert comparison.equal
    assert (comparison.steps_a, comparison.steps_b) == (5, 5)
    assert (comparison.max_loss_difference, comparison.max_loss_step) == (0.0, 0)
    assert comparison.weights_compared == 5
    assert comparison.outcome_a == comparison.outcome_b == "completed"
    assert "The runs are equal" in printed(comparison)


def test_losses_within_the_tolerance_are_equal_and_beyond_are_not(first: Path) -> None:
    steps = step_lines()
    steps[2]["loss"] += 0.25
    steps[4]["loss"] += 0.5
    comparison = against(first, steps, tolerance=0.3)
    assert not comparison.equal
    assert comparison.max_loss_difference == pytest.approx(0.5)
    assert comparison.max_loss_step == 4
    assert comparison.first_loss_step == 4
    assert compare_runs(first, first.parent / "b", 0.6).equal
    assert compare_runs(first, first.parent / "b", 0.1).first_loss_step == 2
    assert "beyond 0.3 since step 4" in printed(comparison)


def test_another_sample_decides(first: Path) -> None:
    steps = step_lines()
    steps[3]["sample_digest"] = "other"
    comparison = against(first, steps)
    assert not comparison.equal
    assert comparison.first_sample_step == 3
    assert "different, first at step 3" in printed(comparison)


def test_weights_inform_but_do_not_decide(first: Path) -> None:
    steps = step_lines()
    steps[1]["weights_digest"] = None
    steps[2]["weights_digest"] = "other"
    del steps[4]["weights_digest"]
    comparison = against(first, steps)
    assert comparison.equal
    assert comparison.weights_compared == 3
    assert comparison.first_weights_step == 2


def test_a_missing_step_decides(first: Path) -> None:
    comparison = against(first, step_lines(3))
    assert not comparison.equal
    assert (comparison.steps_a, comparison.steps_b) == (5, 3)
    assert comparison.first_missing_step == 3


def test_other_steps_of_the_same_count_decide(first: Path) -> None:
    comparison = against(first, step_lines(6)[1:])
    assert (comparison.steps_a, comparison.steps_b) == (5, 5)
    assert comparison.first_missing_step == 0
    assert not comparison.equal


@pytest.mark.parametrize("nan", [None, math.nan])
def test_a_nan_on_one_side_decides_and_on_both_does_not(first: Path, nan: float | None) -> None:
    steps = step_lines()
    steps[1]["loss"] = nan
    comparison = against(first, steps)
    assert not comparison.equal
    assert comparison.first_nan_step == 1
    assert comparison.max_loss_difference == 0.0
    assert compare_runs(first.parent / "b", first.parent / "b", 0.0).equal


def test_an_infinite_loss_on_one_side_decides(first: Path) -> None:
    steps = step_lines()
    steps[1]["loss"] = math.inf
    comparison = against(first, steps)
    assert comparison.first_loss_step == 1
    assert not comparison.equal
    assert compare_runs(first.parent / "b", first.parent / "b", 0.0).equal


def test_a_step_taken_again_in_a_later_generation_counts_once(first: Path) -> None:
    steps = step_lines()
    steps.insert(3, steps[2] | {"generation": 0, "loss": 99.0})
    steps[3], steps[2] = steps[2] | {"generation": 1}, steps[3]
    assert against(first, steps).equal


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 5', "not JSON"),
        ("", "not JSON"),
        ("[1]", "holds a list, not an object"),
        (json.dumps(step_lines()[2]), "step 2 of generation 0 was already committed"),
        ('{"step": true}', "field step must be int, found True"),
        ('{"step": 5}', "field generation must be int, found nothing"),
        ('{"step": 5, "generation": 0}', "field loss must be int or float, found nothing"),
        (
            '{"step": 5, "generation": 0, "loss": 1.0, "sample_digest": null}',
            "field sample_digest must be str or int, found None",
        ),
    ],
)
def test_a_damaged_line_is_named(first: Path, line: str, message: str) -> None:
    path = first / "steps.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CompareError) as caught:
        compare_runs(first, first, 0.0)
    assert str(caught.value).startswith(f"{path}, line 6: {message}")


def test_missing_and_empty_files_are_named(first: Path, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"none.steps\.jsonl: cannot be read"):
        compare_runs(first, tmp_path / "none", 0.0)
    (first / "summary.json").write_text("{}")
    with pytest.raises(CompareError, match=r"summary\.json: field outcome must be str"):
        compare_runs(first, first, 0.0)
    (first / "summary.json").unlink()
    with pytest.raises(CompareError, match=r"summary\.json: cannot be read"):
        compare_runs(first, first, 0.0)
    (first / "steps.jsonl").write_text("")
    with pytest.raises(CompareError, match="holds no committed step"):
        compare_runs(first, first, 0.0)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_an_unusable_tolerance_is_refused(first: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance is"):
        compare_runs(first, first, tolerance)
