"""A second failure in the middle of the recovery from a first: real processes, real signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import LONGER, SHORT_QUARANTINE, Run, run_job


def fault(
    step: int, phase: str, place: tuple[int, int], heals: int, kind: str = "sigkill"
) -> dict[str, Any]:
    replica, slot = place
    target = {"replica": replica, "slot": slot}
    return {
        "at_step": step,
        "phase": phase,
        "target": target,
        "kind": kind,
        "heal_at_step": heals,
    }


def test_a_failure_in_the_middle_of_a_recovery_changes_nothing(
    tmp_path: Path, longer_calm_run: Run
) -> None:
    faults = [
        fault(3, "backward", (1, 2), 5),
        fault(3, "reshard", (0, 1), 5),
        fault(12, "vote", (0, 0), 0, "raise"),
        fault(12, "rebuild", (1, 1), 0, "exit"),
        fault(21, "forward", (1, 3), 24),
        fault(21, "rebuild", (0, 2), 24, "raise"),
        # The device returns, and fails as it does.
        fault(22, "reshard", (1, 3), 26),
        fault(34, "grad_sync", (0, 3), 0),
        fault(34, "rebuild", (1, 0), 0, "sigstop"),
        fault(42, "optimizer", (1, 0), 0),
        fault(42, "reshard", (0, 0), 0, "slow") | {"args": {"seconds": 0.3}},
    ]
    run = run_job(tmp_path / "job", faults, [LONGER, *SHORT_QUARANTINE])
    check_like_calm(run, longer_calm_run, tolerance=1e-9, failures=len(faults) - 1)
    struck = [entry for entry in run.journal if entry["event"] == "fault_injected"]
    assert sorted(entry["fault"] for entry in struck) == list(range(1, len(faults) + 1))
    phases = {entry["fault"]: entry["phase"] for entry in struck}
    assert [phases[number] for number in (2, 4, 6, 7, 9, 11)] == [
        "reshard", "rebuild", "rebuild", "reshard", "rebuild", "reshard",
    ]  # fmt: skip
