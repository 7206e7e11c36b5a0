"""everstep under strikes: one run of a job takes all strikes of one kind, some steps apart.

Strikes alternate between replicas, slots and phases of a step, and the device returns a few steps
later, so that the next one finds a job at full degree. What they cost comes from the files of the
run: the seconds of summary.json, split at the times in journal.jsonl: the fault, its detection, the
last worker stopped, the plan, groups built, shards moved, barrier passed, step committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO_CONFIG, BenchmarkError, EverstepRun, progress, run_everstep
from benchmarks.strikes import Recovery, Strike

REPLICAS = 2
FIRST_STEP = 10
SPACING = {
    Strike.SIGKILL: 20,
    Strike.SIGSTOP: 20,
    Strike.RAISE: 20,
    Strike.AGENT_KILL: 120,
    Strike.NODE_LOSS: 120,
}
"""Steps between two strikes. What was struck is allowed back five steps later, and must be back
before the next one; an agent needs seconds for that, as it imports torch anew."""

HEAL_STEPS = 5

START_SECONDS = 120.0
PHASES = ("forward", "backward", "grad_sync", "vote", "optimizer")
PARTS = ("detect", "quiesce", "plan", "rebuild", "reshard", "resume", "first step")


@dataclass(frozen=True, slots=True)
class PhasedRecovery:
    """everstep's answer to one strike. `parts` has the seconds of each part named in PARTS."""

    recovery: Recovery
    parts: tuple[float, ...]


def shape(workers: int) -> tuple[str, ...]:
    """The job's settings, as overrides of the demo's: two replicas, each on a node."""
    degree = workers // REPLICAS
    return (
        "job=recovery",
        f"cluster.nodes={REPLICAS}",
        f"cluster.devices_per_node={degree}",
        f"parallel.tensor={degree}",
        f"parallel.replicas={REPLICAS}",
        "train.dtype=float32",
        # The samples of a replica fit into one pass, also those that it takes over.
        "train.micro_batch_size=8",
        "train.weights_digest_every=0",
        # Every device is struck again and again, which is no reason to leave it out here.
        "health.flap_window_seconds=0.001",
        "health.quarantine_seconds=0.001",
    )


def measure(
    strike: Strike, workers: int, runs: int, run_dir: Path, limit_seconds: float
) -> list[PhasedRecovery]:
    """Strike a job `runs` times.

    Raises:
        RefusedError: this version cannot be struck that way.
        BenchmarkError: the job did not live through all strikes.
    """
    steps = FIRST_STEP + runs * SPACING[strike]
    faults = [_fault(strike, number, workers // REPLICAS) for number in range(runs)]
    progress(f"everstep: {steps} steps with {runs} x {strike}")
    overrides = (*shape(workers), f"train.steps={steps}", *_store(strike))
    limit = START_SECONDS + steps + runs * limit_seconds
    return _recoveries(run_everstep(DEMO_CONFIG, overrides, faults, run_dir, limit))


def _store(strike: Strike) -> tuple[str, ...]:
    """Agents are processes of their own, which can be killed, in a run with etcd."""
    return ("store.kind=etcd",) if strike in (Strike.AGENT_KILL, Strike.NODE_LOSS) else ()


def _fault(strike: Strike, number: int, slots: int) -> dict[str, Any]:
    step = FIRST_STEP + number * SPACING[strike]
    fault: dict[str, Any] = {"at_step": step, "heal_at_step": step + HEAL_STEPS}
    phase = PHASES[number % len(PHASES)]
    slot = {
        # Both replicas and all slots in turn, the first rank of the world among them.
        "replica": (number + 1) % REPLICAS,
        "slot": (number // REPLICAS + 2 * number + 2) % slots,
    }
    match strike:
        case Strike.SIGKILL:
            return {**fault, "phase": phase, "target": slot, "kind": "sigkill"}
        case Strike.SIGSTOP:
            return {**fault, "phase": phase, "target": slot, "kind": "sigstop"}
        case Strike.RAISE:
            return {**fault, "phase": phase, "target": slot, "kind": "raise"}
        case Strike.AGENT_KILL | Strike.NODE_LOSS:
            agent = {"component": "agent", "node": REPLICAS - 1}
            return {**fault, "target": agent, "kind": "sigkill"}


def _recoveries(run: EverstepRun) -> list[PhasedRecovery]:
    failures = [
        {**entry, **summary}
        for entry, summary in zip(
            (entry for entry in run.journal if entry["event"] == "failure"),
            run.summary["failures"],
            strict=True,
        )
    ]
    for failure in failures:
        if failure["fault_at"] is None or failure["recover_seconds"] is None:
            raise BenchmarkError(f"a failure that nobody injected, or without an end: {failure}")
    # The loss of a node is as many failures as it has devices.
    failures.sort(key=lambda failure: (failure["fault"], failure["detected_at"]))
    return [
        _recovery(list(of_one), run.journal)
        for _, of_one in groupby(failures, key=lambda failure: failure["fault"])
    ]


def _recovery(
    failures: Sequence[Mapping[str, Any]], journal: Sequence[Mapping[str, Any]]
) -> PhasedRecovery:
    struck_at = min(failure["fault_at"] for failure in failures)
    stepped_at = max(failure["fault_at"] + failure["recover_seconds"] for failure in failures)
    # The last one that was made on the way: a failure during a recovery starts another.
    plan = max(
        (e for e in journal if e["event"] == "plan" and struck_at < e["at"] < stepped_at),
        key=lambda entry: int(entry["generation"]),
    )
    done = {
        entry["phase"]: entry["done_at"]
        for entry in journal
        if entry["event"] == "phase_done" and entry["generation"] == plan["generation"]
    }
    times = (
        struck_at,
        max(failure["detected_at"] for failure in failures),
        done["quiesce"],
        plan["at"],
        done["rebuild"],
        done["reshard"],
        done["resume"],
        stepped_at,
    )
    recovery = Recovery(stepped_at - struck_at, plan["lost_steps"])
    return PhasedRecovery(recovery, tuple(after - before for before, after in pairwise(times)))
