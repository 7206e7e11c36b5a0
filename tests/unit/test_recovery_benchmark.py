"""The recovery benchmark's own judgement: what counts as a step, and what a cell says."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common import EverstepRun
from benchmarks.everstep_recovery import _recoveries
from benchmarks.peers.offspring import no_offspring
from benchmarks.peers.told import Progress, Teller, Told, listen
from benchmarks.strikes import Missing, Recovery, cell_text, median_seconds

DETACHES = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(int(sys.argv[1]), b"%d" % os.getpid())
        signal.pause()
    os._exit(0)
os.wait()
"""
"""Leaves a process behind that is nobody's child, in a session of its own."""


def told(replica: int, slot: int, step: int, attempt: int = 1) -> Told:
    """A step that a rank has done."""
    return Told(replica, slot, attempt, step, at=0.0, pid=100 * replica + slot)


def test_a_step_is_complete_once_all_slots_of_a_replica_told_it_in_one_attempt() -> None:
    progress = Progress(degree=2)
    assert not progress.take(told(0, 0, step=3))
    assert not progress.take(told(1, 1, step=3))
    assert not progress.take(told(0, 1, step=3, attempt=2))
    assert not progress.take(told(0, 1, step=4))
    last = told(0, 1, step=3)
    assert progress.take(last)
    assert progress.replicas_done(last) == 1
    assert progress.take(told(1, 0, step=3))
    assert progress.replicas_done(last) == 2
    assert progress.pids == {(0, 0): 0, (0, 1): 1, (1, 0): 100, (1, 1): 101}


@given(st.permutations([(replica, slot) for replica in range(2) for slot in range(3)]))
def test_each_replica_completes_a_step_once_in_any_order(order: list[tuple[int, int]]) -> None:
    progress = Progress(degree=3)
    completions = [progress.take(told(replica, slot, step=0)) for replica, slot in order]
    assert sum(completions) == 2
    assert completions[-1]


def test_what_ranks_tell_is_heard_line_by_line(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        teller = Teller(fifo, replica=1, slot=2)
        teller.tell(attempt=7, step=5)
        teller.tell(attempt=7, step=6, raised=True)
        heard = listen(descriptor, seconds=60)
        first, second = next(heard), next(heard)
    finally:
        os.close(descriptor)
    assert first is not None and second is not None
    assert (first.replica, first.slot, first.attempt, first.step) == (1, 2, 7, 5)
    assert (second.step, second.raised, second.pid) == (6, True, os.getpid())


def test_a_detached_process_does_not_outlive_the_block() -> None:
    read, write = os.pipe()
    with no_offspring():
        subprocess.run([sys.executable, "-c", DETACHES, str(write)], pass_fds=[write], check=True)
        pid = int(os.read(read, 100))
        os.kill(pid, 0)
    os.close(write)
    # Nobody holds the line open any more.
    assert os.read(read, 1) == b""
    os.close(read)
    assert not Path(f"/proc/{pid}").exists()


def test_a_stopped_process_does_not_outlive_the_block() -> None:
    with no_offspring():
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        child.send_signal(signal.SIGSTOP)
    assert not Path(f"/proc/{child.pid}").exists()


def test_a_cell_gives_median_range_and_lost_steps() -> None:
    cell = [Recovery(1.0, 2), Recovery(3.0, 5), Recovery(2.0, 2)]
    assert cell_text(cell, 60) == "2.00 (1.00 .. 3.00), 2-5 lost"
    assert median_seconds(cell) == 2.0


def test_runs_beyond_the_limit_count_as_endless() -> None:
    cell = [Recovery(1.0, 0), Recovery(math.inf, 0), Recovery(math.inf, 0)]
    assert cell_text(cell, 60) == "> 60 (1.00 .. > 60), 0 lost"
    assert cell_text(cell[1:], 60) == "> 60"
    assert cell_text(Missing("not available"), 60) == "not available"
    assert median_seconds(Missing("failed")) == math.inf


def test_the_failures_of_one_node_are_one_recovery() -> None:
    def failure(detected_at: float) -> dict[str, object]:
        return {"event": "failure", "fault": 1, "fault_at": 10.0, "detected_at": detected_at}

    phases = ("quiesce", "rebuild", "reshard", "resume")
    journal = [
        {"event": "plan", "generation": 1, "at": 1.0, "lost_steps": 0},
        failure(detected_at=10.1),
        {"event": "plan", "generation": 2, "at": 10.2, "lost_steps": 0},
        failure(detected_at=10.3),
        {"event": "plan", "generation": 3, "at": 10.5, "lost_steps": 1},
        *(
            {"event": "phase_done", "generation": 3, "phase": phase, "done_at": 10.4 + 0.2 * place}
            for place, phase in enumerate(phases)
        ),
    ]
    summary = {"failures": [{"recover_seconds": 1.5}, {"recover_seconds": 1.5}]}
    (found,) = _recoveries(EverstepRun(summary, journal, []))
    assert found.recovery == Recovery(1.5, 1)
    expected = (0.3, 0.1, 0.1, 0.1, 0.2, 0.2, 0.5)
    assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(found.parts, expected, strict=True))
