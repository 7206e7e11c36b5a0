"""Processes that can start in milliseconds and cannot outlive their agent.

torch and megatron-core take seconds to import. A fork server (multiprocessing's) imports them once
per launcher and forks every worker from there, so that eight workers cost one import, and a
replacement is running before its generation is planned. Nothing in the server has touched an
accelerator or started a thread when it forks.

Every process leads its own process group, so that a signal reaches all that it may have started,
and is killed by the kernel when the fork server dies. The server ends with its agent, at once
(`elastic.fork_server`): it watches a pipe whose other end only the agent may hold, so each child
closes the copy that multiprocessing hands down to let children start processes of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A process started by a Spawner, and this end of the line to it."""

    process: ForkServerProcess
    connection: Connection

    @property
    def pid(self) -> int:
        """Its process id, also that of its process group."""
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL to the process, and to its group, which a new one may not lead yet."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Spawner:
    """Starts processes from one fork server that has imported `preload` (module names)."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*preload, "elastic.fork_server"])

    def warm_up(self) -> None:
        """Wait until the fork server has done its imports; the first of several callers waits."""
        # Starting the tracker unblocks signals, so it comes first. The server inherits the mask: a
        # Ctrl-C in the terminal must not reach its imports.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            child = self.start(_nothing, Path(os.devnull))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child.process.join()
        child.connection.close()

    def close(self) -> None:
        """End the fork server and wait for it. Its children must have ended."""
        # The one way to end them before the interpreter exits, though not a public one. The server
        # may still be busy with its imports.
        server: Any = forkserver._forkserver
        with server._lock:
            if server._forkserver_pid is not None:
                os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop_unlocked()
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]

    def start(self, main: Callable[..., None], log: Path, *arguments: Any) -> Child:
        """Run ``main(connection, *arguments)`` in a new process that writes its output to `log`."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_enter, args=(main, str(log), theirs, *arguments))
        process.start()
        theirs.close()
        return Child(process, ours)


def end_with(parent: int) -> bool:
    """Let the kernel kill this process with its parent; False if that is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def _nothing(connection: Connection) -> None:
    """What a process does that only shows that the fork server answers."""


def _enter(main: Callable[..., None], log: str, connection: Connection, *arguments: Any) -> None:
    parent = os.getppid()
    os.setsid()
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if not end_with(parent):
        os._exit(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    # The terminal's Ctrl-C is for the launcher, which stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(connection, *arguments)
