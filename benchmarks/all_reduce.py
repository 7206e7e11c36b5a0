"""Where the star beats gloo's ring: the measurement behind `ntp.stable_group.STAR_LIMIT_BYTES`.

    python -m benchmarks.all_reduce [--quick]

Theory of operation. The same all-reduce is run through the same StableGroup with the limit set so
that it always takes the star, and then never. gloo's ring passes n-th parts of the tensor on in
2(n-1) rounds, each of which waits for the one before; the star has two rounds, but its first rank
receives and sends n-1 whole tensors. So the star wins by fewer wake-ups of processes where tensors
are small, and the ring by less data through one rank where they are big. The two alternate, and
medians count. The ranks share this machine's cores, as they do in a run on CPU workers.

The limit applies to the bytes that the first rank receives, so the table gives these too.
"""

from __future__ import annotations

import argparse
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.common import progress, run_main, scratch_folder
from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give, run_ranks

RANKS = (2, 4, 8)
KIB = 1024
SIZES = tuple(KIB << shift for shift in range(0, 13, 2))
ROUNDS = 5
ALWAYS, NEVER = 1 << 62, 0

Timings = dict[int, tuple[float, float]]
"""Seconds of one all-reduce by its bytes: through the star, and through the ring."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="All-reduce over gloo: star against ring.")
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions")
    options = parser.parse_args()
    budget = 0.1 if options.quick else 0.5
    timings: dict[int, Timings] = {}
    with scratch_folder() as scratch:
        for size in RANKS:
            progress(f"{size} ranks")
            timings[size] = _measure(size, scratch / str(size), budget)
    _print(timings)


def compare(connection: Connection, rank: int, size: int, address: str, budget: float) -> None:
    """One rank: give the timings, of which the first rank's are used."""
    import torch
    import torch.distributed as dist

    from elastic.rendezvous_client import RendezvousStore
    from ntp import stable_group
    from ntp.groups import GroupAxis, GroupSpec
    from ntp.process_groups import Link, ProcessGroups

    torch.set_num_threads(1)
    groups = ProcessGroups(Link("gloo", LOOPBACK, 60.0, 60.0))
    store = RendezvousStore(address, STORE_TIMEOUT_SECONDS)
    world = GroupSpec(GroupAxis.WORLD, (), tuple(range(size)))
    groups.adopt([world], [str(r) for r in range(size)], rank, 1, store, frozenset())

    def seconds(tensor: torch.Tensor, limit: int, repetitions: int) -> float:
        stable_group.STAR_LIMIT_BYTES = limit
        began = time.perf_counter()
        for _ in range(repetitions):
            dist.all_reduce(tensor, group=groups.world)
        return (time.perf_counter() - began) / repetitions

    timings: Timings = {}
    for nbytes in SIZES:
        tensor = torch.zeros(nbytes // 4)
        # Also a warm-up. All ranks must repeat equally often, so they agree on the slowest one.
        one = torch.tensor([max(seconds(tensor, ALWAYS, 3), seconds(tensor, NEVER, 3))])
        dist.all_reduce(one, op=dist.ReduceOp.MAX, group=groups.world)
        repetitions = max(3, int(budget / ROUNDS / one.item()))
        star, ring = [], []
        for _ in range(ROUNDS):
            star.append(seconds(tensor, ALWAYS, repetitions))
            ring.append(seconds(tensor, NEVER, repetitions))
        timings[nbytes] = (median(star), median(ring))
    give(connection, timings)


def _measure(size: int, logs: Path, budget: float) -> Timings:
    timings: Timings = run_ranks(compare, size, logs, budget)[0]
    return timings


def _print(timings: dict[int, Timings]) -> None:
    from ntp.stable_group import STAR_LIMIT_BYTES

    table = Table(title="All-reduce over gloo: ring / star (ms of each)")
    table.add_column("tensor", justify="right")
    for size in timings:
        table.add_column(f"{size} ranks", justify="right")
    chosen_well = cells = 0
    for nbytes in SIZES:
        row = [f"{nbytes // KIB} KiB"]
        for size, of_size in timings.items():
            star, ring = of_size[nbytes]
            takes_star = nbytes * (size - 1) <= STAR_LIMIT_BYTES
            cells += 1
            # A tenth either way is a draw.
            chosen_well += takes_star == (ring > star) or 0.9 < ring / star < 1.1
            mark = "*" if takes_star else " "
            row.append(f"{ring / star:.1f}{mark} ({ring * 1e3:.1f} / {star * 1e3:.1f})")
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        f"* takes the star: tensor x (ranks - 1) <= {STAR_LIMIT_BYTES // KIB} KiB."
        f" {chosen_well} of {cells} choices are the faster one, or within a tenth of it."
    )


if __name__ == "__main__":
    run_main(main)
