"""SIGTERM to an agent: its node hands its work over and leaves, and nothing is redone for it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import SMALL_JOB, TOKEN, Launch, Run, launch, pause, wait_until_gone

HANDED_OVER = "node1 left: its work was handed over"


def arguments(tmp_path: Path, *overrides: str) -> list[str]:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    settings = [part for each in ("store.kind=etcd", *overrides) for part in ("--set", each)]
    return ["run", str(config), *settings, "--run-dir", str(tmp_path / "run")]


def agent_of_node_1(started: Launch) -> tuple[int, list[str]]:
    """Its process id and its command."""
    for pid in started.descendants():
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        if "agent" in command and command[command.index("--node") + 1] == "1":
            return pid, command
    raise AssertionError("no agent serves node 1")


def drain(started: Launch, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    assert wait_until_gone([pid], timeout_seconds=20) == []


def test_a_drained_node_costs_no_step(tmp_path: Path, calm_run: Callable[[str], Run]) -> None:
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump([pause(20, seconds=2)]))
    with launch([*arguments(tmp_path), "--faults", str(tmp_path / "faults.yaml")]) as started:
        started.wait_for_line("step 10/")
        drain(started, agent_of_node_1(started)[0])
        output = started.output.read()
        exit_code = started.process.wait()
        run = Run(tmp_path / "run", exit_code, output, started.left_over())
    check_like_calm(run, calm_run("float64"), tolerance=1e-9, failures=0)
    assert run.summary["failures"] == [] and run.summary["redone_steps"] == 0
    assert run.steps[-1]["degrees"] == [[4]], "nobody left"
    assert HANDED_OVER in (run.directory / "logs" / "agent1.log").read_text()


@pytest.mark.chaos
def test_a_drained_node_may_come_back_and_drain_again(tmp_path: Path) -> None:
    with launch(arguments(tmp_path, "train.steps=100000")) as started:
        started.wait_for_line("generation 1 runs")
        pid, command = agent_of_node_1(started)
        drain(started, pid)
        started.wait_for_line("DROP_REPLICA")
        environment = {**os.environ, TOKEN: started.token}
        agent = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        started.wait_for_line("GROW_TP")
        started.wait_for_line("generation 3 runs")
        agent.terminate()
        assert HANDED_OVER in agent.communicate()[0]
        assert agent.returncode == 0
        os.kill(started.process.pid, signal.SIGINT)
        output = started.output.read()
        assert started.process.wait() == 130, output
        assert started.left_over() == ()
