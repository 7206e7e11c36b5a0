"""Seconds from a SIGKILL to the next committed step: everstep against plain torchrun.

    python -m benchmarks.recovery [--kills 5] [--workers 8] [--quick]

Theory of operation. Both train the model of configs/demo.yaml in float32, as two replicas of
CPU workers. everstep runs once; SIGKILL strikes a different slot each time, in all phases of a step
in turn, and the device returns a few steps later, so that the next kill finds a job at full degree.
torchrun runs once with a checkpoint every 10 steps and enough restarts; its ranks are killed from
outside, at places between two checkpoints that are 5 steps after one in the mean.

For everstep the seconds are `recover_seconds` of summary.json, which end with the first step that
the new generation commits. For torchrun there are two ends: the first step that was not completed
before, which is the same thing, and the first step at all, which a checkpoint after every step
would give at best. A lost step had been completed and was done again; redone steps count the one in
flight, too. Nothing is asserted, as a busy machine may miss any target.

The table by phase splits everstep's seconds at the times in journal.jsonl: the fault, its
detection, the last worker stopped, the plan, groups built, shards moved, barrier passed, step
committed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    DEMO_CONFIG,
    BenchmarkError,
    EverstepRun,
    progress,
    run_everstep,
    run_main,
    scratch_folder,
)
from benchmarks.torchrun_driver import CHECKPOINT_STEPS, Kill, run_torchrun, torchrun_steps
from trainer.config_file import load

TARGET_SECONDS = 1.0
TARGET_WORKERS = 8
TARGET_RATIO = 5.0

REPLICAS = 2
FIRST_KILL_STEP = 10
PHASES = ("forward", "backward", "grad_sync", "vote", "optimizer")
SPLIT = ("detect", "quiesce", "plan", "rebuild", "reshard", "resume", "first step")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table; lost and redone steps are those of all kills together."""

    name: str
    seconds: list[float]
    lost_steps: int
    redone_steps: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """everstep's answer to one kill. `split` has the seconds of each part named in SPLIT."""

    seconds: float
    split: tuple[float, ...]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Recovery time of everstep and of torchrun.")
    parser.add_argument("--kills", type=int, default=5, help="kills of each (default 5)")
    parser.add_argument("--workers", type=int, default=8, help="an even number (default 8)")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps between two kills of everstep (default 20)"
    )
    parser.add_argument("--quick", action="store_true", help="three kills")
    options = parser.parse_args()
    kills = 3 if options.quick else options.kills
    if kills < 1 or options.workers < 4 or options.workers % REPLICAS or options.steps < 6:
        parser.error("--kills must be at least 1, --workers even and at least 4, --steps 6 or more")
    shape = _shape(options.workers)
    with scratch_folder() as scratch:
        run = _everstep(shape, kills, options.steps, scratch / "everstep")
        recoveries = _recoveries(run)
        found = ", ".join(f"{recovery.seconds:.2f}" for recovery in recoveries)
        progress(f"everstep recovered in {found} s")
        config = load(DEMO_CONFIG, (*shape, f"train.steps={torchrun_steps(kills)}"))
        torchrun = run_torchrun(config, kills, scratch / "torchrun")
    _print(options.workers, run, recoveries, torchrun)


def _shape(workers: int) -> tuple[str, ...]:
    degree = workers // REPLICAS
    return (
        "job=recovery",
        f"cluster.nodes={REPLICAS}",
        f"cluster.devices_per_node={degree}",
        f"parallel.tensor={degree}",
        f"parallel.replicas={REPLICAS}",
        "train.dtype=float32",
        "train.weights_digest_every=0",
    )


def _everstep(shape: tuple[str, ...], kills: int, spacing: int, run_dir: Path) -> EverstepRun:
    """One run with all kills; a device returns after a quarter of the steps to the next kill."""
    slots = next(
        int(setting.partition("=")[2])
        for setting in shape
        if setting.startswith("parallel.tensor=")
    )
    faults: list[dict[str, Any]] = []
    for number in range(kills):
        step = FIRST_KILL_STEP + number * spacing
        faults.append(
            {
                "at_step": step,
                "phase": PHASES[number % len(PHASES)],
                # Both replicas and all slots in turn, the first rank of the world among them.
                "target": {
                    "replica": (number + 1) % REPLICAS,
                    "slot": (number // REPLICAS + 2 * number + 2) % slots,
                },
                "kind": "sigkill",
                "heal_at_step": step + max(2, spacing // 4),
            }
        )
    steps = FIRST_KILL_STEP + kills * spacing
    progress(f"everstep: {steps} steps with {kills} kills")
    return run_everstep(DEMO_CONFIG, (*shape, f"train.steps={steps}"), faults, run_dir)


def _recoveries(run: EverstepRun) -> list[Recovery]:
    failures = [entry for entry in run.journal if entry["event"] == "failure"]
    found = []
    for failure, summary in zip(failures, run.summary["failures"], strict=True):
        if failure["fault_at"] is None or summary["recover_seconds"] is None:
            raise BenchmarkError(f"a failure that nobody injected, or without an end: {summary}")
        plan = next(
            entry
            for entry in run.journal
            if entry["event"] == "plan" and entry["generation"] > failure["generation"]
        )
        done = {
            entry["phase"]: entry["done_at"]
            for entry in run.journal
            if entry["event"] == "phase_done" and entry["generation"] == plan["generation"]
        }
        times = (
            failure["fault_at"],
            failure["detected_at"],
            done["quiesce"],
            plan["at"],
            done["rebuild"],
            done["reshard"],
            done["resume"],
            failure["fault_at"] + summary["recover_seconds"],
        )
        split = tuple(after - before for before, after in pairwise(times))
        found.append(Recovery(summary["recover_seconds"], split))
    return found


def _at_full_degree(run: EverstepRun) -> int:
    """How many failures struck while no slot was vacant."""
    full = next(entry for entry in run.journal if entry["event"] == "plan")["degrees"]
    count, degrees = 0, full
    for entry in run.journal:
        if entry["event"] == "plan":
            degrees = entry["degrees"]
        elif entry["event"] == "failure":
            count += degrees == full
    return count


def _print(
    workers: int, run: EverstepRun, recoveries: Sequence[Recovery], torchrun: Sequence[Kill]
) -> None:
    lost, redone = sum(k.lost_steps for k in torchrun), sum(k.redone_steps for k in torchrun)
    rows = [
        Row(
            "everstep",
            [recovery.seconds for recovery in recoveries],
            run.summary["lost_steps"],
            run.summary["redone_steps"],
        ),
        Row("torchrun", [k.recover_seconds for k in torchrun], lost, redone),
        Row("torchrun, first redone step", [k.first_step_seconds for k in torchrun], lost, redone),
    ]
    console = Console()
    console.print(_times_table(rows, workers))
    console.print(_split_table(recoveries))
    console.print(
        f"{_at_full_degree(run)} of {len(recoveries)} kills of everstep hit a job at full degree;"
        f" torchrun saved a checkpoint every {CHECKPOINT_STEPS} steps, and"
        f" {median(kill.ready_seconds for kill in torchrun):.1f} s of its median are processes that"
        " end, start, import, meet and load."
    )
    everstep, other = median(rows[0].seconds), median(rows[1].seconds)
    ratio = other / everstep
    limit = (
        _verdict(everstep <= TARGET_SECONDS)
        if workers == TARGET_WORKERS
        else f"not judged with {workers}"
    )
    console.print(
        f"targets: median <= {TARGET_SECONDS} s with {TARGET_WORKERS} workers: {limit};"
        f" >= {TARGET_RATIO:g}x faster than torchrun: {_verdict(ratio >= TARGET_RATIO)}"
        f" ({ratio:.1f}x)"
    )


def _times_table(rows: Sequence[Row], workers: int) -> Table:
    kills = len(rows[0].seconds)
    table = Table(
        title=f"SIGKILL to the next committed step, seconds: {workers} workers, {kills} kills"
    )
    table.add_column("")
    for name in ("median", "min", "max", "lost", "redone", "ratio"):
        table.add_column(name, justify="right")
    base = median(rows[0].seconds)
    for row in rows:
        middle = median(row.seconds)
        times = (middle, min(row.seconds), max(row.seconds))
        table.add_row(
            row.name,
            *(f"{seconds:.2f}" for seconds in times),
            str(row.lost_steps),
            str(row.redone_steps),
            f"{middle / base:.1f}",
        )
    return table


def _split_table(recoveries: Sequence[Recovery]) -> Table:
    table = Table(title="everstep's seconds by phase")
    table.add_column("")
    for name in SPLIT:
        table.add_column(name, justify="right")
    parts = list(zip(*(recovery.split for recovery in recoveries), strict=True))
    for label, of in (("median", median), ("min", min), ("max", max)):
        table.add_row(label, *(f"{of(part):.3f}" for part in parts))
    return table


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    run_main(main)
