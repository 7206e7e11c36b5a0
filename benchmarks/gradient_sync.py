"""What gradient sync costs: after backward or within it, and among replicas of unlike degrees.

    python -m benchmarks.gradient_sync [--rounds 20] [--steps 4]

Theory of operation. The ranks of three replicas at TP4 hold the gradients of the demo's model and
run steps of backward and gradient sync alone (`benchmarks.sync_job`). The ways to sync take turns,
as the speed of a shared machine drifts. The same is done with a slot of the last replica vacant.
There its mates have more to compute, as nobody gives them fewer samples here, so columns compare
only by what sync adds.

Two figures are given for each way: the time of a step, and the processor time of all ranks in it,
over that of a step without sync. Where ranks share a few cores it is processor time that decides.
Of all turns the one at the end of the fastest fifth counts, which foreign load touches least.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.common import DEMO_CONFIG, progress, run_main, scratch_folder
from benchmarks.ranks import run_ranks
from trainer.config_file import load

if TYPE_CHECKING:
    from benchmarks.sync_job import Cost

REPLICAS, TENSOR = 3, 4
LOST_SLOTS = ((), (2,))
"""Slots of the last replica that are vacant, by job."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of gradient sync.")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way (default 20)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default 4)")
    options = parser.parse_args()
    if min(options.rounds, options.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")

    # Only here, as this loads torch, which the parser's --help should not wait for.
    from benchmarks.sync_job import WITHOUT, measure, ways_of

    config = load(DEMO_CONFIG, ())
    jobs: dict[str, dict[str, Cost]] = {}
    with scratch_folder() as scratch:
        for lost in LOST_SLOTS:
            degrees = [TENSOR] * (REPLICAS - 1) + [TENSOR - len(lost)]
            name = "/".join(map(str, degrees))
            progress(name)
            results = run_ranks(
                measure,
                sum(degrees),
                scratch / str(len(lost)),
                (config, REPLICAS, TENSOR, lost),
                options.rounds,
                options.steps,
            )
            jobs[name] = _over_ranks(results)

    table = Table(title="ms of a step (and ms of processor time of all ranks, over no sync)")
    table.add_column("sync")
    for name in jobs:
        table.add_column(name, justify="right")
    for way in ways_of(()):
        row = []
        for costs in jobs.values():
            floor = costs[WITHOUT].processor if way != WITHOUT else 0.0
            cost = costs.get(way)
            row.append(
                f"{cost.clock * 1e3:.1f} ({(cost.processor - floor) * 1e3:+.0f})" if cost else ""
            )
        table.add_row(way, *row)
    Console().print(table)


def _over_ranks(results: list[dict[str, list[Cost]]]) -> dict[str, Cost]:
    """A step takes as long as the first rank says, and the processor time of all ranks."""
    from benchmarks.sync_job import Cost

    costs = {}
    for way, of_first in results[0].items():
        turns = zip(*(result[way] for result in results), strict=True)
        processors = sorted(sum(cost.processor for cost in turn) for turn in turns)
        clocks = sorted(cost.clock for cost in of_first)
        costs[way] = Cost(clocks[len(clocks) // 5], processors[len(processors) // 5])
    return costs


if __name__ == "__main__":
    run_main(main)
