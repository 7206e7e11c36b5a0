"""Signals from outside, which no hook announced: a kill, and a process that just stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import SMALL_JOB, Run, launch


def run_with_signal(directory: Path, number: signal.Signals) -> Run:
    """Run the small job and send `number` to the worker in replica 1, slot 2, at step 10."""
    config = directory / "job.yaml"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    arguments = ["run", str(config), "--run-dir", str(directory / "run")]
    with launch(arguments) as started:
        started.wait_for_line("step 10/")
        os.kill(started.worker(node=1, index=2), number)
        output = started.output.read()
        exit_code = started.process.wait()
        return Run(directory / "run", exit_code, output, started.left_over())


def test_a_kill_from_outside_is_replaced_on_the_same_device(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    run = run_with_signal(tmp_path, signal.SIGKILL)
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    (failure,) = run.summary["failures"]
    assert failure["kind"] == "process_exit"
    assert run.steps[-1]["degrees"] == [[4], [4]], "the replacement never joined"


def test_a_stopped_worker_is_fenced_and_nobody_else_is(
    tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    run = run_with_signal(tmp_path, signal.SIGSTOP)
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=1)
    (failure,) = run.summary["failures"]
    assert failure["kind"] == "hang"
    assert failure["device"] == "node1/2"
    # Long before a collective timed out, and whoever waited for it is not blamed.
    (entry,) = [entry for entry in run.journal if entry["event"] == "failure"]
    assert "stopped (state T)" in entry["evidence"]
