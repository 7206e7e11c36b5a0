"""Runs a peer's job, strikes it once, and times what follows.

Each measurement starts the job afresh, waits until all replicas have completed a step somewhere
between two checkpoints, strikes half a step later, and ends with the next complete step, at the
limit, or when every launcher has ended. Whatever is running then is killed.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, BenchmarkError, log_tail
from benchmarks.peers.offspring import no_offspring
from benchmarks.peers.systems import LOOPBACK, Command, Peer, Site
from benchmarks.peers.told import Progress, Told, listen
from benchmarks.peers.training import CHECKPOINT_STEPS, RAISE_SIGNAL
from benchmarks.strikes import Recovery, Strike
from trainer.config import RunConfig

START_SECONDS = 240.0
"""How long a job may take to its first strike."""

OFFSETS = (3, 7, 5, 9, 1)
"""Steps completed after a checkpoint when a strike comes: 5 in the mean, as of a random one."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A job's launchers, one a node, and where their output goes."""

    nodes: Sequence[subprocess.Popen[bytes]]
    logs: Sequence[Path]

    def all_ended(self) -> bool:
        return all(node.poll() is not None for node in self.nodes)

    def log(self) -> str:
        return "\n".join(log_tail(log) for log in self.logs)


def measure(
    peer: Peer, strike: Strike, number: int, config: RunConfig, folder: Path, limit_seconds: float
) -> Recovery:
    """Run `number` of a cell; strikes alternate between places, in time and in the replica.

    Raises:
        BenchmarkError: the job did not get as far as the strike.
    """
    checkpoints, fifo, config_file = folder / "checkpoints", folder / "fifo", folder / "config.json"
    checkpoints.mkdir(parents=True)
    os.mkfifo(fifo)
    config_file.write_text(config.model_dump_json())
    parallel = config.parallel
    site = Site(parallel.replicas, parallel.tensor, _free_port(), config_file, checkpoints, fifo)
    with ExitStack() as stack:
        # Open for writing too, so that the line stays up while no rank is alive.
        descriptor = os.open(fifo, os.O_RDWR)
        stack.callback(os.close, descriptor)
        stack.enter_context(no_offspring())
        running = _start(peer, site, folder)
        progress = Progress(site.degree)
        at_step = CHECKPOINT_STEPS + OFFSETS[number % len(OFFSETS)] - 1
        last, step_seconds = _reach(progress, at_step, site.nodes, descriptor, running)
        time.sleep(step_seconds / 2)
        struck_at = time.time()
        _strike(strike, progress, running, number % site.degree)
        return _recovery(progress, last, struck_at, limit_seconds, descriptor, running)


def _start(peer: Peer, site: Site, folder: Path) -> _Running:
    launch = peer.launch(site)
    for number, service in enumerate(launch.services):
        _popen(service, folder / f"service{number}.log", launch.shared)
    logs = [folder / f"node{node}.log" for node in range(site.nodes)]
    environments = launch.environments or ({},) * site.nodes
    nodes = [
        _popen(command, log, {**launch.shared, **own})
        for command, log, own in zip(launch.nodes, logs, environments, strict=True)
    ]
    return _Running(nodes, logs)


def _popen(command: Command, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _reach(
    progress: Progress, at_step: int, replicas: int, descriptor: int, running: _Running
) -> tuple[Told, float]:
    """Wait until all replicas have completed `at_step`, or one after it, together, and not for the
    first time; also a step's seconds."""
    before = 0.0
    for told in listen(descriptor, START_SECONDS):
        if told is None:
            if running.all_ended():
                raise BenchmarkError(f"the job ended before the strike:\n{running.log()}")
        elif progress.take(told) and progress.replicas_done(told) == replicas:
            # Not with the first of all: how long it took is not known.
            if told.step >= at_step and before:
                return told, told.at - before
            before = told.at
    raise BenchmarkError(f"not at step {at_step} after {START_SECONDS:g} s:\n{running.log()}")


def _strike(strike: Strike, progress: Progress, running: _Running, slot: int) -> None:
    """Strike the last replica, or the last node, which runs it."""
    node = len(running.nodes) - 1
    worker = progress.pids[node, slot]
    match strike:
        case Strike.SIGKILL:
            os.kill(worker, signal.SIGKILL)
        case Strike.SIGSTOP:
            os.kill(worker, signal.SIGSTOP)
        case Strike.RAISE:
            os.kill(worker, RAISE_SIGNAL)
        case Strike.AGENT_KILL:
            running.nodes[node].kill()
        case Strike.NODE_LOSS:
            running.nodes[node].kill()
            for pid in (pid for (replica, _), pid in progress.pids.items() if replica == node):
                # It may have died with its agent already.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _recovery(
    progress: Progress,
    last: Told,
    struck_at: float,
    limit_seconds: float,
    descriptor: int,
    running: _Running,
) -> Recovery:
    """What follows a strike that came after the step `last` was complete."""
    completed = last.step
    for told in _until_ended(listen(descriptor, limit_seconds), running):
        if told.raised:
            struck_at = told.at
        elif progress.take(told):
            if told.attempt > last.attempt:
                return Recovery(told.at - struck_at, max(0, completed + 1 - told.step))
            completed = max(completed, told.step)
    return Recovery(math.inf, 0)


def _until_ended(tellings: Iterator[Told | None], running: _Running) -> Iterator[Told]:
    """What is told, until there is nothing more and no launcher is left to start anybody."""
    for told in tellings:
        if told is not None:
            yield told
        elif running.all_ended():
            return


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port
