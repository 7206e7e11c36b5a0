"""A worker is killed, and nothing of the job changes: real processes, real signals.

``make test`` runs one job in which a worker dies in every phase once; ``make chaos`` kills each of
the eight workers in each of the five phases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checks import check_like_calm, check_survived
from tests.chaos.launcher import LONGER, ONE_PIECE, Run, run_job

PHASES = ("forward", "backward", "grad_sync", "vote", "optimizer")
WORKERS = tuple((replica, slot) for replica in range(2) for slot in range(4))
FIRST_KILL, STEPS_BETWEEN = 3, 5


def kills(places: list[tuple[tuple[int, int], str]]) -> list[dict[str, Any]]:
    """A faults file that kills at each place in turn, each device returning one step later."""
    return [
        {
            "at_step": FIRST_KILL + index * STEPS_BETWEEN,
            "phase": phase,
            "target": {"replica": replica, "slot": slot},
            "kind": "sigkill",
            "heal_at_step": FIRST_KILL + index * STEPS_BETWEEN + 1,
        }
        for index, ((replica, slot), phase) in enumerate(places)
    ]


def test_a_kill_in_each_phase_changes_nothing(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    places = list(zip(((1, 2), (0, 0), (1, 0), (0, 3), (1, 1)), PHASES, strict=True))
    run = run_job(tmp_path / "killed", kills(places))
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=len(places))
    phases = {entry["phase"] for entry in run.journal if entry["event"] == "phase_done"}
    assert phases == {"quiesce", "rebuild", "reshard", "resume"}


def test_reports_that_die_with_their_worker_cost_no_step(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    # Without digests nobody waits for the reports of most workers, and these keep them for a while.
    places = list(zip(((1, 1), (0, 1), (1, 3)), ("optimizer", "vote", "forward"), strict=True))
    run = run_job(tmp_path / "killed", kills(places), ["train.weights_digest_every=0"])
    check_survived(run, calm_run("float64"), tolerance=1e-9, failures=len(places))
    assert len(run.summary["failures"]) == len(places)


def test_a_healthy_replica_keeps_the_gradients_of_the_step_in_flight(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    (kill,) = kills([((1, 2), "forward")])
    # So that the healthy replica still computes when it hears of the kill.
    slow = {**kill, "target": {"replica": 0, "slot": 0}, "kind": "slow", "args": {"seconds": 2.0}}
    del slow["heal_at_step"]
    run = run_job(tmp_path / "killed", [kill, slow])
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    (plan,) = [each for each in run.journal if each["event"] == "plan" and each["redone"]]
    assert (plan["resume_step"], plan["kept_samples"], plan["redone_samples"]) == (3, 4, 4)
    assert (run.summary["redone_steps"], run.summary["redone_samples"]) == (1, 4)


@pytest.mark.chaos
def test_float32_stays_close(tmp_path: Path, calm_run: Callable[[str], Run]) -> None:
    run = run_job(
        tmp_path / "killed", kills([((0, 1), "backward")]), overrides=["train.dtype=float32"]
    )
    check_like_calm(run, calm_run("float32"), tolerance=1e-4, failures=1)


@pytest.mark.chaos
def test_a_process_that_raises_is_replaced_at_once(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    fault = {
        "at_step": 5,
        "phase": "forward",
        "target": {"replica": 0, "slot": 2},
        "kind": "raise",
        "heal_at_step": 0,
    }
    run = run_job(tmp_path / "raised", [fault])
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    (failure,) = run.summary["failures"]
    assert "InjectedFault" in next(e for e in run.journal if e["event"] == "failure")["evidence"]
    assert failure["kind"] == "process_exit"


@pytest.mark.chaos
def test_losing_a_whole_node_drops_its_replica_until_it_returns(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    fault = {
        "at_step": 10,
        "phase": "backward",
        "target": {"node": 1},
        "kind": "sigkill",
        "heal_at_step": 15,
    }
    run = run_job(tmp_path / "node", [fault])
    assert run.exit_code == 0, run.output
    assert run.summary["lost_steps"] == 0
    assert run.summary["replicas_bitwise_equal"] is True
    degrees = [step["degrees"] for step in run.steps]
    assert [[4]] in degrees, "the job never ran on one replica"
    assert degrees[-1] == [[4], [4]], "the replica never came back"


@pytest.mark.chaos
def test_two_kills_in_one_step(tmp_path: Path, calm_run: Callable[[str], Run]) -> None:
    places = [((1, 2), "forward"), ((0, 1), "backward"), ((1, 0), "vote"), ((1, 3), "vote")]
    faults = kills(places)
    for first, second in ((0, 1), (2, 3)):
        faults[second]["at_step"] = faults[first]["at_step"]
    run = run_job(tmp_path / "killed", faults)
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=len(places))


def test_kills_in_both_stages_of_a_pipeline(tmp_path: Path) -> None:
    job = [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence_parallel=true",
        "model.untie_embeddings_and_output_weights=false",
        "model.recompute_granularity=full",
        "train.global_batch_size=7",
        "train.seq_length=33",
        "train.steps=24",
    ]
    calm = run_job(tmp_path / "calm", overrides=[*job, *ONE_PIECE])
    places = [((1, 0), "backward"), ((0, 1), "grad_sync"), ((0, 1), "vote"), ((1, 1), "forward")]
    faults = kills(places)
    for fault, stage in zip(faults, (1, 0, 1, 0), strict=True):
        fault["target"]["stage"] = stage
    run = run_job(tmp_path / "killed", faults, overrides=job)
    check_like_calm(run, calm, tolerance=1e-9, failures=len(faults))
    assert [[2, 2], [1, 1]] in [step["degrees"] for step in run.steps], "a slot outlived a stage"
    # A healthy replica keeps its groups, unless one of its ranks, which hears of the failure, has
    # not left the vote of the step before.
    told = {e["generation"]: e["workers"] for e in run.journal if e["event"] == "groups_not_kept"}
    reduced = [e for e in run.journal if e["event"] == "plan" and e["action"] == "REDUCE_TP"]
    for plan in (reduced[0], reduced[-1]):
        in_vote = [who for who in told.get(plan["generation"], ()) if " in the vote of " in who]
        assert plan["kept_replicas"] == [0] or in_vote, (plan, told)
    assert [0] in [plan["kept_replicas"] for plan in (reduced[0], reduced[-1])], told


@pytest.mark.chaos
@pytest.mark.parametrize("phase", PHASES)
def test_every_worker_in(phase: str, tmp_path: Path, longer_calm_run: Run) -> None:
    places = [(worker, phase) for worker in WORKERS]
    run = run_job(tmp_path / phase, kills(places), [LONGER])
    check_like_calm(run, longer_calm_run, tolerance=1e-9, failures=len(places))
