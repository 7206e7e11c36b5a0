"""GradientSync over real groups against dense sums of gradients.

Whole numbers add up exactly in any order, so one wrong element shows. Replicas take unequal shares
of the samples, and a gradient is the sum over samples.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense import SHAPE, cut, fill, integers, layout_of, named, normal, same_bits, whole
from harness import Cluster, Rank
from planted import plant
from torch import Tensor

from ntp.atoms import TensorSpec
from ntp.geometry import ParallelLayout
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.local_shards import LocalShards
from ntp.model_shape import tensor_specs
from ntp.sync_plan import plan_sync

SPECS = tensor_specs(SHAPE)
ALL = (0, 1, 2, 3)
LAYOUTS = {
    "4+4": (ALL, ALL),
    "4+3": (ALL, (0, 1, 3)),
    "3+4": ((1, 2, 3), ALL),
    "4+3+2": (ALL, (0, 2, 3), (1, 3)),
    "4+1": (ALL, (2,)),
    "1+2": ((3,), (0, 3)),
    "vacant_in_both": ((0, 1, 3), (0, 3)),
    "vacant_in_all_three": ((1, 2), (2, 3), (1, 2, 3)),
    "nothing_in_common": ((0, 1), (2, 3)),
    "lone_3": ((0, 1, 3),),
}
SAMPLES = (5, 2, 1)
"""Samples that the replicas take."""

Value = Callable[[TensorSpec, int], Tensor]


def summed(value: Value, samples: range) -> Callable[[TensorSpec], Tensor]:
    """The gradient of these samples."""

    def total(spec: TensorSpec) -> Tensor:
        return sum((value(spec, sample) for sample in samples), torch.zeros(()).double())

    return total


def samples_of(position: int) -> range:
    """The samples of the replica at this position."""
    return range(sum(SAMPLES[:position]), sum(SAMPLES[: position + 1]))


def sync_rank(
    rank: Rank, layout: ParallelLayout, value: Value, trap: str | None
) -> dict[str, Tensor]:
    plant(trap)
    slot = layout.slots()[rank.rank]
    replica = layout.replica(slot.replica)
    shards = LocalShards(SPECS, replica.shards, slot.slot)
    samples = samples_of(layout.replicas.index(replica))
    gradients = torch.zeros(shards.total, dtype=torch.float64)
    fill(shards, replica, gradients, summed(value, samples))
    groups = rank.groups()
    ranks = rank.adopt(groups, layout, slot)
    GradientSync(
        plan_sync(layout),
        slot,
        ranks,
        shards,
        SyncGroups(groups.world, groups.home),
        contributes_replicated=slot.slot == replica.active[0],
    ).run(gradients)
    return named(shards, gradients)


def run_sync(
    cluster: Cluster, layout: ParallelLayout, value: Value, trap: str | None = None
) -> list[dict[str, Tensor]]:
    """Reduced gradients of every slot."""
    return cluster.run(sync_rank, len(layout.slots()), layout, value, trap)


def check_sync(cluster: Cluster, layout: ParallelLayout, trap: str | None = None) -> None:
    """Raise Mismatch unless every slot ends with exactly its part of the dense sum."""
    samples = range(sum(SAMPLES[: len(layout.replicas)]))
    dense = {spec.name: summed(integers, samples)(spec) for spec in SPECS}
    for slot, got in zip(layout.slots(), run_sync(cluster, layout, integers, trap), strict=True):
        replica = layout.replica(slot.replica)
        wanted = {spec.name: cut(spec, replica, slot.slot, dense[spec.name]) for spec in SPECS}
        same_bits(f"{slot}", got, wanted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sum_is_exact_on_every_slot(cluster: Cluster, name: str) -> None:
    check_sync(cluster, layout_of(SHAPE, 4, *LAYOUTS[name]))


@pytest.mark.parametrize("name", ["4+3+2", "vacant_in_all_three", "4+1"])
def test_replicas_get_the_same_bits(cluster: Cluster, name: str) -> None:
    layout = layout_of(SHAPE, 4, *LAYOUTS[name])
    results = dict(zip(layout.slots(), run_sync(cluster, layout, normal), strict=True))
    first = {spec.name: whole(spec, layout.replicas[0], results) for spec in SPECS}
    for slot, got in results.items():
        replica = layout.replica(slot.replica)
        wanted = {spec.name: cut(spec, replica, slot.slot, first[spec.name]) for spec in SPECS}
        same_bits(f"{slot}", got, wanted)
    samples = range(sum(SAMPLES[: len(layout.replicas)]))
    for spec in SPECS:
        torch.testing.assert_close(
            first[spec.name], summed(normal, samples)(spec), rtol=0, atol=1e-13
        )
