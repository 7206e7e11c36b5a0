"""What fault tolerance costs while nothing fails: everstep against a bare megatron-core loop.

    python -m benchmarks.overhead [--pairs 6] [--steps 20] [--workers 8] [--samples 16]

Theory of operation. Both train the same model on the same data with the same groups, gradient sync
and optimizer on CPU workers (two replicas). A shared machine drifts by ten times what is to be
measured, so they train at the same time, in turns of a second (`benchmarks.turns`). A pair of jobs
gives one ratio: of the seconds that the same steps took of the turns of either. A second ratio, of
the processor seconds of all processes, leaves out what other guests of the host took of the cores.
Either scatters by a hundredth, so several pairs are started, each in the other order than the one
before: who starts first is slower by a hundredth and more, even in kernels that both jobs share. So
it is two pairs, one in either order, that give a figure.

By default a step takes a second and a half, as short as one of a real job may be; with 4 samples
it takes 0.4 s.

The first steps are dropped, and a step ends when the last rank that tells it at once has done it.
Timeouts that a job standing still would exceed are long, and weights digests, a diagnostic that a
production run computes rarely, are off. Timers run on while a job stands still, so that it beats,
and is looked at, more often in a second of its turns than otherwise. Nothing is asserted, as a busy
machine may miss any target.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bare_job import CONFIG, RESULT, STEPS
from benchmarks.common import (
    DEMO_CONFIG,
    PROGRESS_SECONDS,
    BenchmarkError,
    command,
    everstep_command,
    line_count,
    log_tail,
    progress,
    read_lines,
    run_main,
    scratch_folder,
    wait_for,
)
from benchmarks.turns import Turns
from trainer.config import RunConfig
from trainer.config_file import load

EVERSTEP = "everstep"
BARE = "bare loop"
TARGET_RATIO = 0.99
REPLICAS = 2
FIRST_TURN_STEPS = 5
DROPPED_STEPS = 8
"""Those of the first turn, which begins with the start of the job, and of the first seconds."""

SPARE_STEPS = 0.2
"""Of the steps that count: what the faster job does while the slower one ends its last."""

LEAST_SPARE_STEPS = 10
START_SECONDS = 120.0
TURN_SECONDS = 1.0
POLL_SECONDS = 0.1
SHAPE = (
    "job=overhead",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "train.seq_length=128",
    "train.micro_batch_size=2",
    "train.dtype=float32",
    "train.weights_digest_every=0",
    # Far longer than everstep stands still, the other job's start included. Its agent never sees a
    # worker stopped, as it stops first and goes on last.
    "health.heartbeat_timeout_seconds=300",
    "health.progress_floor_seconds=300",
    "health.progress_initial_seconds=300",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One of the two jobs: a command that adds a line to the file `steps` with each step."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    steps: Path
    turns: Turns

    def progress(self) -> str:
        """How far it is."""
        return f"{self.name}: {line_count(self.steps)} steps done"

    def check(self, deadline: float) -> None:
        """Raises BenchmarkError if it ended, or `deadline` (of time.monotonic) is over."""
        if self.process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"{self.progress()}, then no more:\n{log_tail(self.log)}")


@dataclass(frozen=True, slots=True)
class Done:
    """What a job did.

    Attributes:
        had: seconds that the job had had of its turns at the end of each step that counts, and of
            the last before them.
        used: processor seconds of all of its processes at the same moments.
        losses: mean loss of each step.
    """

    had: list[float]
    used: list[float]
    losses: list[float]

    @property
    def speed(self) -> float:
        """Steps per second of the job's turns."""
        return (len(self.had) - 1) / (self.had[-1] - self.had[0])

    @property
    def frugality(self) -> float:
        """Steps per processor second."""
        return (len(self.used) - 1) / (self.used[-1] - self.used[0])


Pair = tuple[Done, Done]
"""everstep and the bare loop."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Failure-free speed of everstep.")
    parser.add_argument("--pairs", type=int, default=6, help="runs of each, even (default 6)")
    parser.add_argument("--steps", type=int, default=20, help="steps that count (default 20)")
    parser.add_argument("--workers", type=int, default=8, help="an even number (default 8)")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples a step, in microbatches of 2 (default 16)"
    )
    options = parser.parse_args()
    if options.pairs < 6 or options.pairs % 2 or options.steps < 1:
        parser.error("--pairs must be even and at least 6, --steps at least 1")
    if options.workers < REPLICAS or options.workers % REPLICAS:
        parser.error(f"--workers must be a multiple of {REPLICAS}")
    if options.samples < REPLICAS:
        parser.error(f"--samples must be at least {REPLICAS}")
    spare = max(LEAST_SPARE_STEPS, ceil(SPARE_STEPS * options.steps))
    steps = DROPPED_STEPS + options.steps + spare
    of_size = (f"train.global_batch_size={options.samples}", f"train.steps={steps}")
    overrides = (*SHAPE, *_shape(options.workers), *of_size)
    config = load(DEMO_CONFIG, overrides)
    pairs: list[Pair] = []
    with scratch_folder() as scratch:
        for number in range(1, options.pairs + 1):
            progress(f"pair {number} of {options.pairs}")
            folder = scratch / f"pair{number}"
            order = (EVERSTEP, BARE) if number % 2 else (BARE, EVERSTEP)
            pairs.append(_run(config, overrides, DROPPED_STEPS + options.steps, order, folder))
    _print(config, pairs, options.steps)


def _shape(workers: int) -> tuple[str, ...]:
    degree = workers // REPLICAS
    return (
        f"cluster.devices_per_node={degree}",
        f"parallel.tensor={degree}",
        f"parallel.replicas={REPLICAS}",
    )


def _run(
    config: RunConfig, overrides: Sequence[str], steps: int, order: Sequence[str], scratch: Path
) -> Pair:
    """Run everstep and the bare loop to their ends, in turns until both have done `steps` steps.

    `order` is that in which they start, and have their turns.
    """
    ours, bare = scratch / "everstep", scratch / "bare"
    for folder in (ours, bare):
        folder.mkdir(parents=True)
    (bare / CONFIG).write_text(config.model_dump_json())
    commands = {
        EVERSTEP: (everstep_command(DEMO_CONFIG, overrides, ours), ours),
        BARE: ([sys.executable, "-m", "benchmarks.bare_job", str(bare)], bare),
    }
    with ExitStack() as stack:
        jobs = {name: stack.enter_context(_stopped_job(name, *commands[name])) for name in order}
        _take_turns(list(jobs.values()), steps)
        for job in jobs.values():
            job.turns.release()
        for job in jobs.values():
            wait_for(job.process, job.log, job.progress)
    result = json.loads((bare / RESULT).read_text())
    our_steps = read_lines(jobs[EVERSTEP].steps)
    our_ends = _everstep_ends(read_lines(ours / "journal.jsonl"), our_steps)
    return (
        _done(jobs[EVERSTEP], our_ends, [step["loss"] for step in our_steps], steps),
        _done(jobs[BARE], result["ended_at"], result["losses"], steps),
    )


@contextmanager
def _stopped_job(name: str, arguments: Sequence[str], folder: Path) -> Iterator[Job]:
    """A job that has done its first steps and stands still; nothing of it is left afterwards."""
    log = folder.with_suffix(".log")
    progress(f"{name} starts")
    with command(arguments, log) as process:
        job = Job(name, process, log, folder / STEPS, Turns(process.pid))
        try:
            deadline = time.monotonic() + START_SECONDS
            while line_count(job.steps) < FIRST_TURN_STEPS:
                job.check(deadline)
                time.sleep(POLL_SECONDS)
            job.turns.stop()
            yield job
        finally:
            # A process that stands still would not hear that it is to end.
            job.turns.release()


def _take_turns(jobs: Sequence[Job], steps: int) -> None:
    told_at = time.monotonic()
    while min(line_count(job.steps) for job in jobs) < steps:
        for job in jobs:
            job.check(deadline=inf)
            job.turns.begin()
            time.sleep(TURN_SECONDS)
            job.turns.stop()
        if time.monotonic() - told_at > PROGRESS_SECONDS:
            told_at = time.monotonic()
            progress(", ".join(job.progress() for job in jobs))


def _done(job: Job, ended_at: Sequence[float], losses: list[float], steps: int) -> Done:
    counted = ended_at[DROPPED_STEPS - 1 : steps]
    had, used = ([of(moment) for moment in counted] for of in (job.turns.had, job.turns.used))
    return Done(had, used, losses)


def _everstep_ends(
    journal: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> list[float]:
    """When each step ended, in seconds since the epoch."""
    first, *later = [entry["at"] for entry in journal if entry["event"] == "resumed"]
    if later:
        raise BenchmarkError(f"everstep had to recover {len(later)} times: see its journal")
    return list(accumulate((step["seconds"] for step in steps[1:]), initial=first))


def _print(config: RunConfig, pairs: Sequence[Pair], counted: int) -> None:
    model, train = config.model, config.train
    table = Table(
        title=f"Failure-free speed: {REPLICAS} replicas x TP{config.parallel.tensor},"
        f" hidden {model.hidden_size}, {model.num_layers} layers,"
        f" {train.global_batch_size} x {train.seq_length} tokens a step, {counted} steps"
    )
    for name in ("pair", "everstep, steps/s", "bare loop, steps/s", "ratio", "of CPU time"):
        table.add_column(name, justify="right")
    ratios, ratios_of_use = [], []
    for number, (ours, theirs) in enumerate(pairs, start=1):
        ratios.append(ours.speed / theirs.speed)
        ratios_of_use.append(ours.frugality / theirs.frugality)
        speeds = (f"{done.speed:.3f}" for done in (ours, theirs))
        table.add_row(str(number), *speeds, f"{ratios[-1]:.4f}", f"{ratios_of_use[-1]:.4f}")
    console = Console()
    console.print(table)
    difference = max(
        abs(our_loss - their_loss)
        for everstep, bare in pairs
        for our_loss, their_loss in zip(everstep.losses, bare.losses, strict=True)
    )
    console.print(f"both train alike: largest difference between their losses {difference:.2g}")
    console.print(f"ratio of processor time: {_mean_text(ratios_of_use)}")
    verdict = "met" if mean(ratios) >= TARGET_RATIO else "missed"
    console.print(f"ratio: {_mean_text(ratios)}; target >= {TARGET_RATIO}: {verdict}")


def _mean_text(ratios: Sequence[float]) -> str:
    """The mean, and its error as the figures of both orders together show it."""
    both_orders = [mean(two) for two in zip(ratios[::2], ratios[1::2], strict=True)]
    error = stdev(both_orders) / sqrt(len(both_orders))
    return f"mean {mean(ratios):.4f} +- {error:.4f}, median {median(ratios):.4f}"


if __name__ == "__main__":
    run_main(main)
