"""Runs `benchmarks.torchrun_job` under torchrun, kills ranks from outside, and times what follows.

A *completed* step is one that all ranks of one start have done. A kill strikes half a step after
the step that it waits for is completed; the next one waits until the job has passed the step that
the former kill interrupted. Steps completed before a kill that lie after the newest checkpoint are
lost; these and the step in flight are redone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import PROGRESS_SECONDS, BenchmarkError, command, log_tail, progress
from trainer.config import RunConfig

CHECKPOINT_STEPS = 10

SILENCE_SECONDS = 240.0
"""Without a word from any rank for this long, torchrun is given up."""

_OFFSETS = (3, 7, 5, 9, 1)
"""Steps completed after a checkpoint when a kill strikes: 5 in the mean, as of a random kill."""

_ENVIRONMENT = {
    # With the store shared between agent and ranks, torchrun does not come back from a restart.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Kill:
    """One failure and its consequences.

    All seconds run from the SIGKILL: `ready_seconds` until the last rank has started, joined its
    groups and loaded the checkpoint; `first_step_seconds` until the first step is completed again,
    which is a redone one; `recover_seconds` until a step is that had not been completed before.
    """

    ready_seconds: float
    first_step_seconds: float
    recover_seconds: float
    lost_steps: int

    @property
    def redone_steps(self) -> int:
        """The lost steps and the one in flight."""
        return self.lost_steps + 1


def torchrun_steps(kills: int) -> int:
    """How many steps the job must have to be running still after the last kill."""
    return CHECKPOINT_STEPS * (kills + 4)


def run_torchrun(config: RunConfig, kills: int, scratch: Path) -> list[Kill]:
    """Run the job and kill one of its ranks `kills` times.

    Raises:
        BenchmarkError: torchrun ended, or fell silent.
    """
    checkpoints, fifo, log = scratch / "checkpoints", scratch / "fifo", scratch / "torchrun.log"
    checkpoints.mkdir(parents=True)
    os.mkfifo(fifo)
    config_file = scratch / "config.json"
    config_file.write_text(config.model_dump_json())
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments += ["--nproc-per-node", str(config.parallel.devices)]
    arguments += ["--max-restarts", str(kills + 1), "-m", "benchmarks.torchrun_job"]
    arguments += [str(config_file), str(checkpoints), str(CHECKPOINT_STEPS), str(fifo)]
    # Open for writing too, so that the line stays up while no rank is alive.
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        with command(arguments, log, _ENVIRONMENT) as process:
            watch = _Watch(config.parallel.devices, _happenings(descriptor, process, log))
            return [_kill_once(watch, number, kills) for number in range(kills)]
    finally:
        os.close(descriptor)


class _Watch:
    """What the ranks have told so far.

    `restart` is the newest start's number, `pids` its ranks' processes, `ready_at` when the last of
    them was ready, `resumed` the step it resumed at, `completed` the last step it completed and
    `completed_at` when; `step_seconds` is how long that step took.
    """

    def __init__(self, workers: int, happenings: Iterator[dict[str, Any]]) -> None:
        self.restart = 0
        self.pids: dict[int, int] = {}
        self.resumed = self.completed = -1
        self.ready_at = self.completed_at = self.step_seconds = 0.0
        self._workers = workers
        self._happenings = happenings
        self._done: defaultdict[int, list[float]] = defaultdict(list)

    def advance(self) -> None:
        """Take what happens next."""
        happening = next(self._happenings)
        if happening["restart"] != self.restart:
            # Nothing of an earlier start comes after this: torchrun waits for its end.
            self.restart = happening["restart"]
            self.pids.clear()
            self._done.clear()
        match happening["happening"]:
            case "start":
                self.pids[happening["rank"]] = happening["pid"]
                self.ready_at = happening["at"]
                self.resumed, self.completed = happening["step"], happening["step"] - 1
            case "step":
                times = self._done[happening["step"]]
                times.append(happening["at"])
                if len(times) == self._workers:
                    self.step_seconds = max(times) - self.completed_at
                    self.completed, self.completed_at = happening["step"], max(times)


def _kill_once(watch: _Watch, number: int, kills: int) -> Kill:
    offset = _OFFSETS[number % len(_OFFSETS)]
    step = CHECKPOINT_STEPS * (number + 1) + offset - 1
    while watch.completed < step:
        watch.advance()
    restart, rank = watch.restart, (3 * number + 2) % len(watch.pids)
    time.sleep(watch.step_seconds / 2)
    killed_at = time.time()
    os.kill(watch.pids[rank], signal.SIGKILL)
    progress(f"torchrun: kill {number + 1} of {kills}: rank {rank}, after step {step}")
    before = watch.completed
    while watch.restart == restart:
        # What the start in question still had to tell.
        before = watch.completed
        watch.advance()
    # Stands still until all ranks have done a step.
    while watch.completed < watch.resumed:
        watch.advance()
    ready_at, first_at = watch.ready_at, watch.completed_at
    lost = before + 1 - watch.resumed
    while watch.completed <= before:
        watch.advance()
    kill = Kill(
        ready_seconds=ready_at - killed_at,
        first_step_seconds=first_at - killed_at,
        recover_seconds=watch.completed_at - killed_at,
        lost_steps=lost,
    )
    progress(
        f"torchrun: resumed at step {watch.resumed} after {kill.first_step_seconds:.1f} s,"
        f" passed step {before} after {kill.recover_seconds:.1f} s"
    )
    return kill


def _happenings(
    descriptor: int, process: subprocess.Popen[bytes], log: Path
) -> Iterator[dict[str, Any]]:
    """Whatever the ranks tell, as it comes."""
    rest, heard_at = b"", time.monotonic()
    while True:
        readable, _, _ = select.select([descriptor], [], [], PROGRESS_SECONDS)
        if readable:
            heard_at = time.monotonic()
            *lines, rest = (rest + os.read(descriptor, 1 << 16)).split(b"\n")
            yield from (json.loads(line) for line in lines)
            continue
        silent = time.monotonic() - heard_at
        if process.poll() is not None:
            raise BenchmarkError(f"torchrun ended with {process.returncode}:\n{log_tail(log)}")
        if silent > SILENCE_SECONDS:
            raise BenchmarkError(f"torchrun made no step for {silent:.0f} s:\n{log_tail(log)}")
        progress(f"torchrun: waiting for its ranks, {silent:.0f} s")
