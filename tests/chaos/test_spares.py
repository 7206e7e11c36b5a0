"""A spare device takes the place of a lost one, and the replica stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import Run, run_job

NINE_DEVICES = ["cluster.nodes=1", "cluster.devices_per_node=9", "cluster.spare_devices=1"]


def test_a_spare_takes_the_place_of_a_lost_device(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    fault = {"at_step": 10, "kind": "sigkill", "target": {"replica": 1, "slot": 2}}
    run = run_job(tmp_path / "job", [fault], NINE_DEVICES)
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    assert run.summary["failures"][0]["action"] == "SWAP_SPARE"
    assert {str(step["degrees"]) for step in run.steps} == {"[[4], [4]]"}
