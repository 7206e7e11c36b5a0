"""The summary follows from journal and steps alone."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.summary import summarize

PLAN = {
    "event": "plan",
    "lost_steps": 0,
    "redone": False,
    "redone_samples": 0,
    "action": "CONTINUE",
    "reason": "start",
}


def plan(generation: int, **changes: Any) -> dict[str, Any]:
    return PLAN | {"generation": generation} | changes


def failure(**changes: Any) -> dict[str, Any]:
    return {
        "event": "failure",
        "id": "node0/1#1",
        "kind": "process_exit",
        "device": "node0/1",
        "at_step": 2,
        "phase": "running",
        "fault_phase": "backward",
        "fault_at": 12.0,
        "detected_at": 12.25,
        "generation": 1,
        "placed": True,
        "evidence": "killed",
    } | changes


def step(number: int, generation: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "step": number,
        "generation": generation,
        "loss": 3.0 - number,
        "seconds": 1.0,
        "weights_digest": None,
    } | changes


def resumed(generation: int, at: float) -> dict[str, Any]:
    return {"event": "resumed", "generation": generation, "step": 0, "at": at}


def test_an_empty_run_has_a_summary_that_claims_nothing() -> None:
    assert summarize("job", [], [], "interrupted") == {
        "job": "job",
        "committed_steps": 0,
        "lost_steps": 0,
        "redone_steps": 0,
        "redone_samples": 0,
        "generations": 0,
        "failures": [],
        "final_loss": None,
        "final_weights_digest": None,
        "replicas_bitwise_equal": None,
        "goodput": None,
        "outcome": "interrupted",
    }


def test_a_failure_is_answered_by_the_next_plan_and_over_with_its_first_step() -> None:
    journal = [
        plan(1),
        resumed(1, 10.0),
        failure(),
        plan(2, action="REDUCE_TP", reason="slot 1", redone=True, redone_samples=5),
        resumed(2, 13.5),
    ]
    steps = [step(0), step(1), step(2, generation=2, seconds=2.5)]
    summary = summarize("job", journal, steps, "completed")
    assert summary["failures"] == [
        {
            "id": "node0/1#1",
            "kind": "process_exit",
            "device": "node0/1",
            "at_step": 2,
            "phase": "backward",
            "action": "REDUCE_TP",
            "detect_seconds": 0.25,
            "recover_seconds": 1.5,
            "reason": "slot 1",
        }
    ]
    assert (summary["redone_steps"], summary["lost_steps"], summary["generations"]) == (1, 0, 2)
    assert summary["redone_samples"] == 5
    assert summary["final_loss"] == 1.0


def test_a_failure_without_an_injected_fault_is_timed_from_its_detection() -> None:
    journal = [plan(1), failure(fault_at=None, fault_phase=None), plan(2), resumed(2, 14.25)]
    (entry,) = summarize("job", journal, [step(2, 2)], "completed")["failures"]
    assert (entry["phase"], entry["detect_seconds"], entry["recover_seconds"]) == (
        "running",
        None,
        2.0,
    )


@pytest.mark.parametrize(
    ("journal", "reason"),
    [
        ([plan(1), resumed(1, 10.0), failure()], "killed"),
        ([plan(1), failure(placed=False), plan(2), resumed(2, 15.0)], "start"),
    ],
)
def test_a_failure_that_nothing_answered_or_nobody_missed_has_no_recovery(
    journal: list[dict[str, Any]], reason: str
) -> None:
    (entry,) = summarize("job", journal, [step(0)], "halted")["failures"]
    assert entry["recover_seconds"] is None and entry["reason"] == reason


def test_an_overtaken_generation_does_not_end_the_recovery() -> None:
    journal = [plan(1), failure(), plan(2), failure(id="node0/2#1", generation=2), plan(3)]
    summary = summarize("job", [*journal, resumed(3, 15.0)], [step(2, 3)], "completed")
    assert [entry["recover_seconds"] for entry in summary["failures"]] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("digests", "differ", "expected"),
    [([None, None], [], None), (["aa", None], [], True), (["aa", "bb"], [1], False)],
)
def test_replicas_are_equal_where_every_known_comparison_says_so(
    digests: list[str | None], differ: list[int], expected: bool | None
) -> None:
    steps = [step(i, weights_digest=each) for i, each in enumerate(digests)]
    journal = [{"event": "replicas_differ", "step": number} for number in differ]
    summary = summarize("job", journal, steps, "completed")
    assert summary["replicas_bitwise_equal"] is expected


def test_the_last_digest_known_is_the_final_one() -> None:
    steps = [step(0, weights_digest="aa"), step(1)]
    assert summarize("job", [], steps, "completed")["final_weights_digest"] == "aa"


@pytest.mark.parametrize(
    ("seconds", "goodput"), [([1.0] * 4, 1.0), ([1.0, 1.0, 1.0, 5.0], 0.5), ([0.0], None)]
)
def test_goodput_is_the_time_at_the_median_over_the_time_it_took(
    seconds: list[float], goodput: float | None
) -> None:
    steps = [step(i, seconds=each) for i, each in enumerate(seconds)]
    assert summarize("job", [], steps, "completed")["goodput"] == goodput
