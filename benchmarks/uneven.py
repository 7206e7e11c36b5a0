"""What uneven replicas cost on paper: bytes of the gradient sync, and the time to plan a change.

    python -m benchmarks.uneven

Theory of operation. No process is started. Bytes are counted in the actual plans: for every rank,
what it sends in the all-reduce of its home and as leaf or proxy, in each bucket; the busiest rank
counts, relative to a uniform ring all-reduce of the same model. Beside it stands Megatron's scheme,
in which every replica reduces at the reduced degree.

Planning is timed at the size of a large job: new layouts of the replicas that lost slots, the moves
of shards and optimizer state in each pipeline stage, the gradient sync, and the process groups of a
rank, which each rank derives for itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from random import Random
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks.common import progress, run_main
from ntp.atoms import AtomSizes, atom_elements_by_axis
from ntp.geometry import ParallelLayout, full_layout, with_active
from ntp.groups import groups_of
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from ntp.reshard_plan import plan_reshard
from ntp.sync_plan import plan_sync
from ntp.sync_traffic import megatron_bytes, sync_bytes, uniform_ring_bytes

# A Llama-like model whose heads divide by 8 and 32, in bfloat16 with float32 gradients.
SHAPE = ModelShape(
    layers=32,
    hidden=8192,
    heads=64,
    kv_groups=64,
    kv_channels=128,
    ffn=28672,
    vocab=128256,
    gated=True,
    bias=False,
    tied=False,
)
Result = TypeVar("Result")
GRADIENT_BYTES = 4
TRAFFIC = ((8, 7, 16, 1.04), (8, 6, 16, 1.04), (8, 4, 16, 1.07), (32, 30, 128, 1.01))
"""Degree, reduced degree, replicas, target of the busiest rank over a uniform ring."""

PLANNED = (8, 16, 1, 4), (32, 128, 8, 1), (32, 128, 8, 40)
"""Degree, replicas, stages, failures."""
TARGET_SECONDS = 0.050


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of uneven replicas, on paper.")
    parser.add_argument("--repetitions", type=int, default=9, help="plans of each (default 9)")
    repetitions = parser.parse_args().repetitions
    if repetitions < 1:
        parser.error("--repetitions must be at least 1")
    console = Console()
    console.print(_traffic())
    console.print(_planning(repetitions))


def _bucket_sizes() -> list[AtomSizes]:
    """Sizes of the atoms in each bucket: here one per layer, and one for the vocabulary."""
    specs = [spec for spec in tensor_specs(SHAPE) if spec.axis is not None]
    names = [spec.name.partition(".layers.")[2].partition(".")[0] for spec in specs]
    return [
        atom_elements_by_axis(tuple(s for s, n in zip(specs, names, strict=True) if n == name))
        for name in dict.fromkeys(names)
    ]


def _traffic() -> Table:
    table = Table(title="Bytes per step through the busiest rank, over a uniform ring")
    for name in ("one replica at", "replicas", "everstep", "target", "", "Megatron's scheme"):
        table.add_column(name, justify="right")
    buckets = _bucket_sizes()
    sizes = atom_elements_by_axis(tensor_specs(SHAPE))
    for tensor, reduced, replicas, target in TRAFFIC:
        progress(f"bytes of TP{tensor} to {reduced} at {replicas} replicas")
        full = full_layout(atom_counts(SHAPE), tensor, replicas)
        wounded = with_active(full.replicas[0], tuple(range(reduced)))
        layout = ParallelLayout(tensor, (wounded, *full.replicas[1:]))
        sent = sync_bytes(plan_sync(layout), layout, buckets, GRADIENT_BYTES)
        uniform = uniform_ring_bytes(layout, sizes, GRADIENT_BYTES)
        ratio = max(sent.values()) / uniform
        megatron = megatron_bytes(layout, sizes, GRADIENT_BYTES).between / uniform
        verdict = "met" if ratio <= target else "missed"
        table.add_row(
            f"TP{tensor} -> {reduced}",
            str(replicas),
            f"{ratio:.3f}",
            f"{target:.2f}",
            verdict,
            f"{megatron:.2f}",
        )
    return table


def _planning(repetitions: int) -> Table:
    table = Table(title=f"Planning a generation, milliseconds of CPU, median of {repetitions}")
    columns = (
        "job",
        "failures",
        "layouts",
        "moves",
        "sync",
        "groups of a rank",
        "together",
        "target",
        "",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for tensor, replicas, stages, failures in PLANNED:
        progress(f"planning TP{tensor} x {stages} stages x {replicas} replicas")
        runs = [_plan(tensor, replicas, stages, failures, seed) for seed in range(repetitions)]
        together = median(sum(run) for run in runs)
        parts = [f"{median(part) * 1000:.1f}" for part in zip(*runs, strict=True)]
        table.add_row(
            f"TP{tensor} x {stages} x {replicas}",
            str(failures),
            *parts,
            f"{together * 1000:.1f}",
            f"{TARGET_SECONDS * 1000:.0f}",
            "met" if together <= TARGET_SECONDS else "missed",
        )
    return table


def _plan(tensor: int, replicas: int, stages: int, failures: int, seed: int) -> list[float]:
    """CPU seconds of each part of planning, which waits for nothing."""
    counts, sizes = atom_counts(SHAPE), atom_elements_by_axis(tensor_specs(SHAPE))
    full = full_layout(counts, tensor, replicas)
    lost = Random(seed).sample(full.slots(), failures)
    vacant: dict[int, set[int]] = {}
    for ref in lost:
        vacant.setdefault(ref.replica, set()).add(ref.slot)
    seconds: list[float] = []

    def timed(work: Callable[[], Result]) -> Result:
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
        return result

    def layouts() -> ParallelLayout:
        everybody = range(tensor)
        return ParallelLayout(
            tensor,
            tuple(
                with_active(r, tuple(s for s in everybody if s not in vacant[r.replica]))
                if r.replica in vacant
                else r
                for r in full.replicas
            ),
        )

    layout = timed(layouts)
    holders = frozenset(full.slots()) - frozenset(lost)
    # Every stage has the same layout and holders, and so the same moves.
    timed(lambda: plan_reshard(full, layout, holders, sizes))
    sync = timed(lambda: plan_sync(layout))
    timed(lambda: groups_of(0, layout, sync, stages))
    return seconds


if __name__ == "__main__":
    run_main(main)
