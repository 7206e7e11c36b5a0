"""Runs over etcd, each controller and agent a process of its own: what supervises may fail too.

A run survives the loss of its leader, of its store and of an agent, and ends like a calm one.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import SMALL_JOB, Run, launch, pause, run_job

ETCD = "store.kind=etcd"


def events(run: Run, name: str) -> list[dict[str, Any]]:
    return [entry for entry in run.journal if entry["event"] == name]


def test_a_standby_takes_over_from_a_killed_leader_and_training_does_not_pause(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    fault = {"at_step": 10, "kind": "sigkill", "target": {"component": "controller"}}
    run = run_job(tmp_path / "job", [fault, pause(20, seconds=4)], [ETCD])
    check_like_calm(run, calm_run("float64"), tolerance=0.0, failures=0)
    struck = [entry.get("component") for entry in events(run, "fault_injected")]
    assert struck == ["controller", None], "None is the worker that holds the job up"
    (taken_over,) = events(run, "took_over")
    assert taken_over["step"] < len(run.steps) - 1, "the job was over before anybody took over"
    assert run.summary["generations"] == 1 and run.summary["redone_steps"] == 0


def test_a_failure_while_etcd_is_down_is_dealt_with_after_it(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    faults = [
        {
            "at_step": 8,
            "kind": "sigkill",
            "target": {"component": "store"},
            "args": {"seconds": 10},
        },
        {
            "at_step": 12,
            "kind": "sigkill",
            "target": {"replica": 1, "slot": 2},
            "heal_at_step": 20,
        },
    ]
    run = run_job(tmp_path / "job", faults, [ETCD])
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    outage, kill = events(run, "fault_injected")
    (failure,) = events(run, "failure")
    # Training went on to the step of the kill, which was dealt with when etcd was back.
    assert kill["fired_at"] < outage["fired_at"] + 10 <= failure["at"]


def test_a_killed_agent_is_the_loss_of_its_node(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    fault = {"at_step": 10, "kind": "sigkill", "target": {"component": "agent", "node": 1}}
    run = run_job(tmp_path / "job", [fault], [ETCD])
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=4)
    assert {failure["kind"] for failure in run.summary["failures"]} == {"node_lost"}
    assert run.steps[-1]["degrees"] == [[4]]


def test_a_node_returns_with_its_agent_and_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    config, faults, target = tmp_path / "job.yaml", tmp_path / "faults.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    agent = {"component": "agent", "node": 1}
    faults.write_text(
        yaml.safe_dump([{"at_step": 5, "kind": "sigkill", "target": agent, "heal_at_step": 0}])
    )
    arguments = ["run", str(config), "--set", ETCD, "--set", "train.steps=100000"]
    arguments += ["--faults", str(faults), "--run-dir", str(target)]
    with launch(arguments) as started:
        started.wait_for_line("DROP_REPLICA")
        started.wait_for_line("GROW_TP")
        os.kill(started.process.pid, signal.SIGINT)
        output = started.output.read()
        assert started.process.wait() == 130, output
        assert started.left_over() == ()
    assert json.loads((target / "summary.json").read_text())["outcome"] == "interrupted"
