"""Two jobs that take turns: who stands still when, and what time is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from benchmarks import turns
from benchmarks.turns import Turns

PARENT = """
import os, signal
child = os.fork()
if child:
    os.write(1, b"%d" % child)
signal.pause()
"""


class Clock:
    """What `time.time` says."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        """Seconds since the epoch."""
        return self.now


def test_only_the_seconds_of_turns_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    used = iter((6.0, 8.0))
    monkeypatch.setattr(turns, "_tree", lambda _root: iter((1,)))
    monkeypatch.setattr(turns, "_processor_seconds", lambda _pid: next(used))
    monkeypatch.setattr(turns, "_signal", lambda _pid, _number: None)
    job = Turns(1)
    for at, change in ((104.0, job.stop), (110.0, job.begin), (111.0, job.stop)):
        clock.now = at
        change()
    moments = (100.0, 103.0, 104.0, 107.0, 110.0, 110.5, 111.0, 120.0)
    assert [job.had(moment) for moment in moments] == [0.0, 3.0, 4.0, 4.0, 4.0, 4.5, 5.0, 5.0]
    assert [job.used(moment) for moment in moments] == [0.0, 4.5, 6.0, 6.0, 6.0, 7.0, 8.0, 8.0]


def test_a_turn_ends_and_begins_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = [sys.executable, "-c", "import signal; signal.pause()"]
    with subprocess.Popen(pause) as first, subprocess.Popen(pause) as second:
        pids = (first.pid, second.pid)
        monkeypatch.setattr(turns, "_tree", lambda _root: iter(pids))
        job = Turns(first.pid)
        try:
            job.stop()
            assert all(os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) for pid in pids)
            job.begin()
            assert all(os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1]) for pid in pids)
            job.stop()
            assert all(os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) for pid in pids)
            job.release()
            assert all(os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1]) for pid in pids)
        finally:
            first.kill()
            second.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_is_all_of_its_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(os.read(parent.stdout.fileno(), 20))
        try:
            assert list(turns._tree(parent.pid)) == [parent.pid, child]
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()
