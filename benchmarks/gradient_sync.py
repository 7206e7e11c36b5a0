"""What gradient sync costs: within backward or after it, and for replicas of unlike degrees.

    python -m benchmarks.gradient_sync [--rounds 15] [--steps 4]

Theory of operation. The ranks of three replicas at TP4 hold the gradients of the demo's model and
run steps that consist of backward and gradient sync alone. Backward multiplies matrices of the
sizes of the model's and reduces activations between the slots of a replica where the model does; it
reports each gradient when it is complete. A step ends with an all-reduce over all ranks, as a real
one does with its vote. The ways to sync take turns, as the speed of a shared machine drifts, and
medians count. The same is done with one slot of the last replica vacant, its mates' shards being
that much larger, and so is their part of backward, as nobody gives it less to do here.

Two figures are given for each way: the time of a step, and the processor time of all ranks
together, over that of steps without sync. Where ranks share a few cores, as here, processor time is
what decides; it is also less disturbed by others who use the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.common import DEMO_CONFIG, progress, run_main, scratch_folder
from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give, run_ranks
from trainer.config import RunConfig, load

REPLICAS, TENSOR = 3, 4
LOST_SLOTS = ((), (2,))
"""Slots of the last replica that are vacant, by job."""

WITHOUT = "no sync"
BLOCKING = "after backward, blocking"
AFTER = "after backward"
KIB = 1024
BUCKETS = (1 << 30, 1024 * KIB, 512 * KIB, 256 * KIB)
"""Bytes of a bucket: all in one, about two, four and eight."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step: by the clock, and of processor time over all ranks."""

    clock: float
    processors: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of gradient sync.")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way (default 15)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default 4)")
    options = parser.parse_args()
    if min(options.rounds, options.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    config = load(DEMO_CONFIG, ())
    table = Table(title="Gradient sync: ms of a step, and processor ms of all ranks over no sync")
    table.add_column("sync")
    columns: list[dict[str, Cost]] = []
    with scratch_folder() as scratch:
        for lost in LOST_SLOTS:
            degrees = "/".join(map(str, _degrees(lost)))
            progress(degrees)
            table.add_column(degrees, justify="right")
            arguments = (config, lost, options.rounds, options.steps)
            results = run_ranks(measure, sum(_degrees(lost)), scratch / str(len(lost)), *arguments)
            columns.append(_over_ranks(results))
    for way in columns[0]:
        table.add_row(way, *(_figures(column, way) for column in columns))
    Console().print(table)


def measure(
    connection: Connection,
    rank: int,
    size: int,
    address: str,
    config: RunConfig,
    lost: tuple[int, ...],
    rounds: int,
    steps: int,
) -> None:
    """One rank: give the cost of each way, the clock's by the first rank's watch."""
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from elastic.rendezvous_client import RendezvousStore
    from ntp.geometry import SlotRef, full_layout, vacate
    from ntp.grad_sync import GradientSync, SyncGroups
    from ntp.groups import plan_groups
    from ntp.local_shards import LocalShards
    from ntp.model_shape import atom_counts, tensor_specs
    from ntp.process_groups import Link, ProcessGroups
    from ntp.sync_plan import plan_sync
    from trainer.config import model_shape

    torch.set_num_threads(1)
    shape = model_shape(config)
    layout = full_layout(atom_counts(shape), TENSOR, REPLICAS)
    for vacant in lost:
        layout = vacate(layout, SlotRef(REPLICAS - 1, vacant))
    slot = layout.slots()[rank]
    replica = layout.replica(slot.replica)
    plan = plan_sync(layout)
    groups = ProcessGroups(Link("gloo", LOOPBACK, 60.0, 60.0))
    store = RendezvousStore(address, STORE_TIMEOUT_SECONDS)
    names = [str(ref) for ref in layout.slots()]
    groups.adopt(plan_groups(layout, plan, 1), names, rank, 1, store, frozenset())

    specs = tensor_specs(shape)
    shards = LocalShards(specs, replica.shards, slot.slot)
    gradients = torch.zeros(shards.total, dtype=torch.float64)
    tokens = config.train.micro_batch_size * config.train.seq_length
    activations = torch.zeros(tokens, shape.hidden, dtype=torch.float64)
    whole: dict[str, Tensor] = {}
    for placement in shards.placements:
        spec = placement.spec
        atoms = placement.shape[spec.atom_dim] if spec.axis else 0
        whole[spec.name] = shards.tensor(gradients, placement).view(spec.parameter_shape(atoms))

    def backward(ready: Callable[[str], None]) -> None:
        for spec in reversed(specs):
            gradient = whole[spec.name]
            if gradient.dim() == 2:
                rows, columns = gradient.shape
                outer, inner = (
                    torch.zeros(rows, tokens).double(),
                    torch.zeros(tokens, columns).double(),
                )
                gradient.addmm_(outer, inner)
                outer.T @ gradient
            ready(spec.name)
            if spec.name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                dist.all_reduce(activations, group=groups.tensor)

    def new_sync(bucket_bytes: int) -> GradientSync:
        return GradientSync(
            plan,
            layout,
            slot,
            {ref: position for position, ref in enumerate(layout.slots())},
            shards,
            SyncGroups(groups.stage, groups.home),
            contributes_replicated=slot.slot == replica.active[0],
            bucket_bytes=bucket_bytes,
        )

    def without() -> None:
        backward(lambda name: None)

    def blocking() -> None:
        without()
        dist.all_reduce(gradients[shards.sharded :], group=groups.stage)
        if groups.home is not None:
            dist.all_reduce(gradients[: shards.sharded], group=groups.home)

    def after(sync: GradientSync) -> Callable[[], None]:
        def step() -> None:
            sync.begin(gradients, 1)
            without()
            sync.finish()

        return step

    def within(sync: GradientSync) -> Callable[[], None]:
        def step() -> None:
            sync.begin(gradients, 1)
            backward(sync.ready)
            sync.finish()

        return step

    ways: dict[str, Callable[[], None]] = {WITHOUT: without}
    if not lost:
        ways[BLOCKING] = blocking
    ways[AFTER] = after(new_sync(BUCKETS[0]))
    for bucket_bytes in BUCKETS:
        sync = new_sync(bucket_bytes)
        ways[f"within, {_size(bucket_bytes)}"] = within(sync)

    end = torch.zeros(6, dtype=torch.float64)
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, step in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
                dist.all_reduce(end, group=groups.world)
            gradients.zero_()
            if turn:  # The first is a warm-up.
                clock, processor = time.perf_counter() - clock, time.process_time() - processor
                costs[way].append(Cost(clock / steps, processor / steps))
    give(connection, costs)
    groups.close()


def _degrees(lost: tuple[int, ...]) -> tuple[int, ...]:
    return (*[TENSOR] * (REPLICAS - 1), TENSOR - len(lost))


def _size(bucket_bytes: int) -> str:
    return "one bucket" if bucket_bytes == BUCKETS[0] else f"{bucket_bytes // KIB} KiB buckets"


def _over_ranks(results: list[dict[str, list[Cost]]]) -> dict[str, Cost]:
    """Medians over turns; a step takes what the first rank says, and the processors of all."""
    medians = {}
    for way, costs in results[0].items():
        turns = zip(*(result[way] for result in results), strict=True)
        processors = median(sum(cost.processors for cost in turn) for turn in turns)
        medians[way] = Cost(median(cost.clock for cost in costs), processors)
    return medians


def _figures(column: dict[str, Cost], way: str) -> str:
    if way not in column:
        return ""
    cost, floor = column[way], column[WITHOUT]
    processors = (cost.processors - floor.processors) * 1e3
    if way == WITHOUT:
        return f"{cost.clock * 1e3:.1f} ({floor.processors * 1e3:.0f})"
    return f"{cost.clock * 1e3:.1f} (+{processors:.0f})"


if __name__ == "__main__":
    run_main(main)
