"""Nodes in network namespaces: one is cut off from all others and the store, and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from elastic.network import NetworkRefused, check_network
from tests.chaos.checks import check_like_calm
from tests.chaos.launcher import (
    ONE_PIECE,
    SMALL_JOB,
    Launch,
    Run,
    launch,
    pause,
    run_job,
    wait_until_gone,
)

CUT_AT, HEALED_AT = 10, 25
THREE_NODES = [
    "cluster.nodes=3",
    "cluster.devices_per_node=2",
    "parallel.tensor=2",
    "parallel.replicas=3",
    "train.global_batch_size=6",
    "train.micro_batch_size=1",
    "train.seq_length=16",
    "train.steps=75",
    "health.lease_seconds=2",
]


@pytest.fixture(autouse=True)
def network() -> None:
    """These tests need the right to make networks."""
    try:
        check_network()
    except NetworkRefused as refused:
        pytest.skip(str(refused))


def last_step_of_the_cut_off_side(run: Run, node: int) -> int:
    """What the node's agent says of its workers, once it knows that others went on without it."""
    log = (run.directory / "logs" / f"agent{node}.log").read_text()
    (told,) = re.findall(
        rf"node {node} was given up .* had committed was (-?\d+)$", log, re.MULTILINE
    )
    return int(told)


def test_a_node_that_is_cut_off_commits_nothing_and_comes_back(tmp_path: Path) -> None:
    # Neither the layout nor where the coordination state is kept changes anything.
    calm = run_job(tmp_path / "calm", overrides=[*THREE_NODES, *ONE_PIECE])
    faults = [
        {
            "at_step": CUT_AT,
            "kind": "partition",
            "target": {"node": 1},
            "heal_at_step": HEALED_AT,
        },
        # The job is not to be over before the node can be back, however fast this machine is.
        pause(HEALED_AT + 15, seconds=4),
    ]
    run = run_job(tmp_path / "cut", faults, [*THREE_NODES, "store.kind=etcd"])
    check_like_calm(run, calm, tolerance=1e-9, failures=2)
    assert {failure["kind"] for failure in run.summary["failures"]} == {"node_lost"}
    without = [step["step"] for step in run.steps if len(step["degrees"]) == 2]
    assert without[0] >= CUT_AT and without[-1] >= HEALED_AT, "the others did not go on"
    assert last_step_of_the_cut_off_side(run, 1) < without[0]
    assert run.steps[-1]["degrees"] == [[2], [2], [2]], "the node never came back"


def swallow(run: Launch, *, on: bool) -> None:
    """Let nothing pass between the nodes, which all reach the store, or let it pass again."""
    inside = ("nsenter", f"--net=/proc/{run.process.pid}/ns/net")
    for node in range(2):
        isolated = ("type", "bridge_slave", "isolated", "on" if on else "off")
        subprocess.run([*inside, "ip", "link", "set", f"node{node}", *isolated], check=True)


@pytest.mark.chaos
def test_workers_whose_words_get_lost_wait_for_each_other_only_until_all_nodes_say_so(
    tmp_path: Path,
) -> None:
    config, faults, run_dir = tmp_path / "job.yaml", tmp_path / "faults.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    # A fault that is never reached makes the network.
    never = {"at_step": 99999, "kind": "partition", "target": {"node": 1}}
    faults.write_text(yaml.safe_dump([never]))
    arguments = ["run", str(config), "--faults", str(faults), "--run-dir", str(run_dir)]
    two_nodes = ("cluster.nodes=2", "cluster.devices_per_node=1", "parallel.tensor=2")
    patience = ("health.progress_floor_seconds=4", "health.collective_timeout_seconds=300")
    # Of one replica all groups are inside: none may be kept for being healthy.
    job = ("parallel.replicas=1", "train.steps=100000", "store.kind=etcd")
    for override in (*two_nodes, *patience, *job):
        arguments += ["--set", override]
    with launch(arguments) as started:
        started.wait_for_line("step 20/")
        swallow(started, on=True)
        started.wait_for_line("stalled: everybody waits for others")
        swallow(started, on=False)
        started.wait_for_line("runs")
        started.wait_for_line("step ")
        started.process.send_signal(signal.SIGINT)
        started.output.read()
    journal = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    assert [entry for entry in journal if entry["event"] == "failure"] == []
    plans = [entry for entry in journal if entry["event"] == "plan"]
    assert plans[1]["kept_replicas"] == []
    assert [plan["lost_steps"] for plan in plans] == [0] * len(plans)


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_network_however_its_run_ends(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = interfaces()
    config, faults = tmp_path / "job.yaml", tmp_path / "faults.yaml"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    faults.write_text(
        yaml.safe_dump([{"at_step": CUT_AT, "kind": "partition", "target": {"node": 1}}])
    )
    arguments = ["run", str(config), "--faults", str(faults), "--run-dir", str(tmp_path / "run")]
    for override in (*THREE_NODES, "store.kind=etcd", "train.steps=100000"):
        arguments += ["--set", override]
    with launch(arguments) as started:
        started.wait_for_line("DROP_REPLICA")
        inside = started.descendants()
        os.kill(started.process.pid, number)
        assert wait_until_gone([started.process.pid, *inside], timeout_seconds=20) == []
        assert started.process.wait() == (130 if number is signal.SIGINT else -number)
        # A namespace without a name ends with the last process in it.
        assert started.left_over() == ()
    assert interfaces() == before


def interfaces() -> set[str]:
    """This machine's network interfaces and named networks."""
    places = (Path("/sys/class/net"), Path("/run/netns"))
    return {entry.name for place in places if place.exists() for entry in place.iterdir()}
