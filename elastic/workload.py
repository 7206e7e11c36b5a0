"""What a sample costs each replica, from which the split of the global batch follows.

Pure. The slots of a replica compute at the same time and wait for each other, so a sample takes as
long as the most loaded slot has work for it. Work is counted in elements of the sharded tensors
that a slot holds, as a matrix product takes the same operations for each of them. That leaves out
what does not depend on the layout (norms) and communication; but it sees where slots cannot be even
(three slots of eight KV groups), which the degree alone does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from operator import mul
from statistics import median

from elastic.pace import Pace
from ntp.atoms import AtomSizes
from ntp.geometry import ParallelLayout, ReplicaLayout, ShardMap


class SplitBatchBy(StrEnum):
    """What decides how many samples a replica takes."""

    DEGREE = "degree"
    SPEED = "speed"
    EQUAL = "equal"


def slot_work(shards: ShardMap, slot: int, sizes: AtomSizes) -> int:
    """Elements of sharded tensors that `slot` holds; 0 if it is vacant."""
    return _weigh(_atoms(shards, slot), _weights(shards, sizes))


def replica_work(layout: ReplicaLayout, sizes: Collection[AtomSizes]) -> int:
    """Work of the most loaded slot of any pipeline stage; `sizes` are those of the stages."""
    shards = layout.shards
    # Slots differ by an atom at most, and stages in the middle are alike: few are distinct.
    slots = {_atoms(shards, slot) for slot in layout.active}
    stages = {_weights(shards, each) for each in sizes}
    return max(_weigh(atoms, weights) for atoms in slots for weights in stages)


def _atoms(shards: ShardMap, slot: int) -> tuple[int, ...]:
    """Atoms of `slot` on each axis."""
    return tuple(sum(map(len, axis.owned[slot])) for axis in shards.axes)


def _weights(shards: ShardMap, sizes: AtomSizes) -> tuple[int, ...]:
    """Elements of an atom of each axis."""
    return tuple(sizes.of(axis.axis) for axis in shards.axes)


def _weigh(atoms: tuple[int, ...], weights: tuple[int, ...]) -> int:
    return sum(map(mul, atoms, weights))


def replica_works(layout: ParallelLayout, sizes: Collection[AtomSizes]) -> tuple[int, ...]:
    """`replica_work` of each replica of `layout`, in order."""
    # At full degree every slot owns its home, so one replica tells the work of all.
    whole = next((r for r in layout.replicas if r.degree == layout.tp_base), None)
    full = replica_work(whole, sizes) if whole else 0
    return tuple(
        full if replica.degree == layout.tp_base else replica_work(replica, sizes)
        for replica in layout.replicas
    )


def sample_costs(
    by: SplitBatchBy,
    layout: ParallelLayout,
    sizes: Collection[AtomSizes],
    paces: Mapping[int, Pace],
) -> tuple[float, ...]:
    """What a sample costs each replica of `layout`, in a unit of its own.

    By speed: the measured seconds, scaled to the work of the present layout. A replica without a
    measurement has the median speed of the others; if there is none, work decides.
    """
    match by:
        case SplitBatchBy.EQUAL:
            return (1,) * len(layout.replicas)
        case SplitBatchBy.DEGREE:
            return replica_works(layout, sizes)
        case SplitBatchBy.SPEED:
            measured = {
                replica: pace.seconds_per_sample / replica_work(pace.layout, sizes)
                for replica, pace in paces.items()
            }
            typical = median(measured.values()) if measured else 1.0
            return tuple(
                work * measured.get(replica.replica, typical)
                for work, replica in zip(replica_works(layout, sizes), layout.replicas, strict=True)
            )


def split_reason(by: SplitBatchBy, split: Collection[int], paces: Mapping[int, Pace]) -> str:
    """The split in words, for a plan's reason."""
    fewest, most = min(split), max(split)
    if fewest == most:
        return f"{most} samples a replica"
    match by:
        case SplitBatchBy.EQUAL:
            why = "as even as they divide"
        case SplitBatchBy.DEGREE:
            why = "by degree"
        case SplitBatchBy.SPEED:
            why = "by speed" if paces else "by degree, as no speed is measured yet"
    return f"{fewest} to {most} samples a replica, {why}"
