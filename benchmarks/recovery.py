"""Seconds from a failure to the next completed step: everstep beside its peers.

    python -m benchmarks.recovery [--runs 10] [--workers 4 8] [--strikes ...] [--systems ...]

Theory of operation. All train the model of configs/demo.yaml in float32, as two replicas of CPU
workers, each replica on a node with an agent of its own; nobody has a spare. The strikes
(`benchmarks.strikes`): SIGKILL or SIGSTOP of a worker, an exception in one, SIGKILL of
a node's agent (its workers die with it), and of an agent and its workers at once. The seconds run
to the first step that the job completes with whom it has then. Steps lost had been completed and
were done again, as those after the newest of the checkpoints that peers save every ten steps.

The kernel ends everstep's workers with their agent, so its node loss is another series of agent
kills. Its strikes on workers alternate between the replicas and between the phases of a step; those
of peers hit the last replica, half a step after a step, as a peer's store may live on the first
node.

The peers run the same model and step (`benchmarks.bare_model`), without everstep's runtime, from
`benchmarks.peers`. A peer that is not installed, or fails, has that in its cells. A run without a
step within the limit is printed as longer than it; a cell of which the first two runs had none is
given up. Nothing is asserted, as a busy machine may miss any target.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    DEMO_CONFIG,
    BenchmarkError,
    RefusedError,
    progress,
    run_main,
    scratch_folder,
)
from benchmarks.everstep_recovery import PARTS, REPLICAS, PhasedRecovery, shape
from benchmarks.everstep_recovery import measure as measure_everstep
from benchmarks.peers.driver import measure
from benchmarks.peers.systems import PEERS, Peer
from benchmarks.strikes import Cell, Missing, Recovery, Strike, cell_text, median_seconds
from trainer.config import RunConfig
from trainer.config_file import load

EVERSTEP = "everstep"
ENDLESS_STEPS = 1_000_000
PLAIN_WIDTH = 200
"""Columns of tables that go into a file or a pipe."""

HOPELESS_RUNS = 2

TARGETS = {
    (Strike.SIGKILL, 4): 0.3,
    (Strike.SIGKILL, 8): 0.5,
    (Strike.SIGSTOP, 4): 2.0,
    (Strike.SIGSTOP, 8): 2.0,
}
"""Median seconds that everstep is to stay within, by strike and workers."""

Row = dict[Strike, Cell]


def main() -> None:
    """Measure and print."""
    options = _options()
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    peers = [peer for peer in PEERS if _chosen(peer.name, options.systems)]
    for workers in options.workers:
        rows: dict[str, Row] = {}
        phases: dict[Strike, Sequence[PhasedRecovery]] = {}
        with scratch_folder() as scratch:
            if _chosen(EVERSTEP, options.systems):
                phases, rows[EVERSTEP] = _everstep(options, workers, scratch)
            config = load(DEMO_CONFIG, (*shape(workers), f"train.steps={ENDLESS_STEPS}"))
            for peer in peers:
                rows[peer.name] = _row(peer, options, config, scratch / peer.name)
        console.print(_table(rows, options, workers))
        if phases:
            console.print(_phase_table(phases, workers))
        for line in _verdicts(rows, options.strikes, workers):
            console.print(line)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recovery time of everstep and of its peers.")
    parser.add_argument("--runs", type=int, default=10, help="runs of each cell (default 10)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[4, 8], help="even numbers (default 4 8)"
    )
    parser.add_argument(
        "--strikes", type=Strike, nargs="+", default=list(Strike), choices=list(Strike)
    )
    names = ", ".join((EVERSTEP, *(peer.name for peer in PEERS)))
    parser.add_argument(
        "--systems", nargs="+", default=[""], help=f"how names begin (default all): {names}"
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds that a run waits for a step (default 60)"
    )
    options = parser.parse_args()
    if options.runs < 1 or any(workers < 4 or workers % REPLICAS for workers in options.workers):
        parser.error("--runs must be at least 1, --workers even and at least 4")
    return options


def _chosen(name: str, beginnings: Sequence[str]) -> bool:
    return any(name.startswith(beginning) for beginning in beginnings)


def _everstep(
    options: argparse.Namespace, workers: int, scratch: Path
) -> tuple[dict[Strike, Sequence[PhasedRecovery]], Row]:
    phases: dict[Strike, Sequence[PhasedRecovery]] = {}
    row: Row = {}
    for strike in options.strikes:
        try:
            folder = scratch / f"{EVERSTEP} {strike}"
            found = measure_everstep(strike, workers, options.runs, folder, options.limit)
        except RefusedError:
            row[strike] = Missing("not available")
        except BenchmarkError as error:
            row[strike] = _failed(error)
        else:
            phases[strike] = found
            row[strike] = [each.recovery for each in found]
        progress(f"{EVERSTEP}, {strike}: {cell_text(row[strike], options.limit)}")
    return phases, row


def _row(peer: Peer, options: argparse.Namespace, config: RunConfig, scratch: Path) -> Row:
    if not peer.is_installed():
        missing = Missing("not installed: make bench installs it")
        return dict.fromkeys(options.strikes, missing)
    return {strike: _cell(peer, strike, options, config, scratch) for strike in options.strikes}


def _cell(
    peer: Peer, strike: Strike, options: argparse.Namespace, config: RunConfig, scratch: Path
) -> Cell:
    found: list[Recovery] = []
    for number in range(options.runs):
        try:
            folder = scratch / f"{strike} {number}"
            found.append(measure(peer, strike, number, config, folder, options.limit))
        except (BenchmarkError, OSError) as error:
            # A later run that never came to its strike takes nothing from the others.
            if not found:
                return _failed(error)
            progress(str(error))
            continue
        progress(f"{peer.name}, {strike}: {cell_text(found[-1:], options.limit)}")
        if len(found) == HOPELESS_RUNS and all(math.isinf(each.seconds) for each in found):
            break
    return found


def _failed(error: Exception) -> Missing:
    progress(str(error))
    return Missing("failed")


def _table(rows: Mapping[str, Row], options: argparse.Namespace, workers: int) -> Table:
    title = (
        f"seconds from a failure to the next completed step, {workers} workers: median"
        f" (least .. most) of up to {options.runs} runs, steps lost"
    )
    table = Table(title=title)
    table.add_column("")
    for strike in options.strikes:
        table.add_column(strike.value, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(cell_text(row[strike], options.limit) for strike in options.strikes))
    return table


def _phase_table(phases: Mapping[Strike, Sequence[PhasedRecovery]], workers: int) -> Table:
    table = Table(title=f"{EVERSTEP}'s seconds by phase, {workers} workers: medians")
    table.add_column("")
    for name in PARTS:
        table.add_column(name, justify="right")
    for strike, recoveries in phases.items():
        parts = zip(*(recovery.parts for recovery in recoveries), strict=True)
        table.add_row(strike.value, *(f"{median(part):.3f}" for part in parts))
    return table


def _verdicts(rows: Mapping[str, Row], strikes: Sequence[Strike], workers: int) -> list[str]:
    """How everstep stands against its targets and against the fastest peer."""
    lines = []
    for strike in strikes:
        if EVERSTEP not in rows or isinstance(rows[EVERSTEP][strike], Missing):
            continue
        seconds = median_seconds(rows[EVERSTEP][strike])
        if (target := TARGETS.get((strike, workers))) is not None:
            verdict = "met" if seconds <= target else "missed"
            lines.append(f"{strike}, {workers} workers: at most {target:g} s: {verdict}")
        others = {name: median_seconds(row[strike]) for name, row in rows.items()}
        del others[EVERSTEP]
        fastest = min(others, key=others.__getitem__, default=None)
        if fastest is not None and math.isfinite(others[fastest]):
            ratio = others[fastest] / seconds
            lines.append(f"{strike}, {workers} workers: {ratio:.1f} x as fast as {fastest}")
    return lines


if __name__ == "__main__":
    run_main(main)
