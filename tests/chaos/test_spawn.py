"""No process outlives its agent, not even one that cannot notice that the agent has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from elastic.spawn import Spawner
from tests.chaos.launcher import wait_until_gone

AGENT = "import sys; from tests.chaos.test_spawn import serve; serve(sys.argv[1])"


def serve(log: str) -> None:
    """Be an agent with one process, and say who that and its fork server are."""
    child = Spawner(("tests.chaos.slow_to_end",)).start(tell_parent, Path(log))
    print(child.pid, child.connection.recv(), flush=True)
    signal.pause()


def tell_parent(connection: Connection) -> None:
    """Be a process that is of use to nobody."""
    connection.send(os.getppid())
    signal.pause()


def test_a_stopped_process_dies_with_its_agent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AGENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        child, server = map(int, agent.stdout.readline().split())
        os.kill(child, signal.SIGSTOP)
        agent.kill()
        left = wait_until_gone([child, server], timeout_seconds=20)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []
