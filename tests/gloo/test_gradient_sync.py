"""GradientSync over real groups against dense sums of gradients.

Whole numbers add up exactly in any order, so one wrong element shows. Replicas take unequal shares
of the samples, each sample is a backward pass, and a gradient is the sum over samples. Every rank
finishes its gradients in an order of its own, near to that of backward, and some it never reports.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from dense import SHAPE, cut, integers, layout_of, named, normal, same_bits, whole
from harness import Cluster, Rank
from planted import plant
from torch import Tensor

from ntp import bundles, marked_exchange, stable_group
from ntp.atoms import TensorSpec
from ntp.geometry import ParallelLayout, SlotRef, vacate
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.local_shards import LocalShards
from ntp.model_shape import tensor_specs
from ntp.process_groups import ProcessGroups, is_connection_error
from ntp.sync_plan import plan_sync

SPECS = tensor_specs(SHAPE)
ALL = (0, 1, 2, 3)
LAYOUTS = {
    "4+4": (ALL, ALL),
    "4+3": (ALL, (0, 1, 3)),
    "3+4": ((1, 2, 3), ALL),
    "4+4+3": (ALL, ALL, (0, 1, 3)),
    "4+3+2": (ALL, (0, 2, 3), (1, 3)),
    "4+1": (ALL, (2,)),
    "1+2": ((3,), (0, 3)),
    "same_slot_in_two_of_three": (ALL, (0, 1), (0, 1)),
    "other_slots_in_two_of_three": (ALL, (0, 1), (2, 3)),
    "vacant_in_both": ((0, 1, 3), (0, 3)),
    "vacant_in_all_three": ((1, 2), (2, 3), (1, 2, 3)),
    "nothing_in_common": ((0, 1), (2, 3)),
    "lone_3": ((0, 1, 3),),
}
SAMPLES = (5, 2, 1)
"""Samples that the replicas take."""

TINY, SOME, ONE = 1, 4000, 1 << 30
"""Bytes of a bucket: each tensor by itself, a few, or all in one."""

Value = Callable[[TensorSpec, int], Tensor]


def summed(value: Value, samples: range) -> Callable[[TensorSpec], Tensor]:
    """The gradient of these samples."""

    def total(spec: TensorSpec) -> Tensor:
        return sum((value(spec, sample) for sample in samples), torch.zeros(()).double())

    return total


@dataclass(frozen=True, slots=True)
class Drill:
    """A step, run `times` times: its number, the size of buckets, and an order for every rank.

    The order is that of the model's backward with neighbours exchanged, and a tensor is added to
    without a report with probability `unreported`, both by `seed`.
    """

    step: int
    bucket_bytes: int
    seed: int = 0
    unreported: float = 0.0
    times: int = 1


class Slot:
    """What one rank of a test holds, and a backward pass that computes nothing."""

    def __init__(self, layout: ParallelLayout, slot: SlotRef) -> None:
        self.layout = layout
        self.slot = slot
        self.replica = layout.replica(slot.replica)
        self.shards = LocalShards(SPECS, self.replica.shards, slot.slot)
        self.gradients = torch.zeros(self.shards.total, dtype=torch.float64)
        self._placements = {p.spec.name: p for p in self.shards.placements}

    def sync(
        self, groups: ProcessGroups, ranks: dict[SlotRef, int], bucket_bytes: int
    ) -> GradientSync:
        return GradientSync(
            plan_sync(self.layout),
            self.layout,
            self.slot,
            ranks,
            self.shards,
            SyncGroups(groups.stage, groups.home),
            contributes_replicated=self.slot.slot == self.replica.active[0],
            bucket_bytes=bucket_bytes,
        )

    def samples(self, step: int) -> range:
        """The samples of this replica."""
        position = self.layout.replicas.index(self.replica)
        first = step * sum(SAMPLES) + sum(SAMPLES[:position])
        return range(first, first + SAMPLES[position])

    def backward(self, sync: GradientSync, value: Value, drill: Drill) -> Iterator[str]:
        """Run all passes of a step; yields the name of each tensor after it was reported."""
        chance = random.Random(f"{drill.seed} {self.slot}")
        unreported = [spec.name for spec in SPECS if chance.random() < drill.unreported]
        samples = self.samples(drill.step)
        self.gradients.zero_()
        sync.begin(self.gradients, passes=len(samples))
        for sample in samples:
            places = {i: i + chance.uniform(0, 4) for i in range(len(SPECS))}
            for i in sorted(places, key=lambda i: -places[i]):
                spec = SPECS[i]
                gradient = self.shards.tensor(self.gradients, self._placements[spec.name])
                gradient += cut(spec, self.replica, self.slot.slot, value(spec, sample))
                if spec.name not in unreported:
                    sync.ready(spec.name)
                yield spec.name

    def held(self) -> dict[str, Tensor]:
        """Copies of the gradients."""
        return named(self.shards, self.gradients)


def vote(groups: ProcessGroups) -> None:
    """Wait until all ranks have finished: before that, a rank may be answering others."""
    dist.all_reduce(torch.zeros(1), group=groups.world)


def sync_rank(
    rank: Rank,
    layout: ParallelLayout,
    value: Value,
    drills: tuple[Drill, ...],
    as_if_large: bool,
    trap: str | None,
) -> list[dict[str, Tensor]]:
    plant(trap)
    if as_if_large:
        stable_group.STAR_LIMIT_BYTES = marked_exchange.WHOLE_BYTES = 0
        bundles.OWN_MESSAGE_BYTES = 200
    slot = Slot(layout, layout.slots()[rank.rank])
    groups = rank.groups()
    ranks = rank.adopt(groups, layout, slot.slot)
    results = []
    for drill in drills:
        sync = slot.sync(groups, ranks, drill.bucket_bytes)
        betweens: list[int] = []
        for _ in range(drill.times):
            for _ in slot.backward(sync, value, drill):
                pass
            sync.finish(lambda seen=betweens: seen.append(1))  # type: ignore[misc]
            vote(groups)
        assert len(betweens) == drill.times
        results.append(slot.held())
    return results


def run_sync(
    cluster: Cluster,
    layout: ParallelLayout,
    value: Value,
    drills: tuple[Drill, ...],
    as_if_large: bool = False,
    trap: str | None = None,
) -> list[dict[SlotRef, dict[str, Tensor]]]:
    """Reduced gradients of every slot after each drill."""
    slots = layout.slots()
    results = cluster.run(sync_rank, len(slots), layout, value, drills, as_if_large, trap)
    return [dict(zip(slots, after, strict=True)) for after in zip(*results, strict=True)]


def check_step(layout: ParallelLayout, got: dict[SlotRef, dict[str, Tensor]], step: int) -> None:
    """Raise Mismatch unless every slot has exactly its part of the dense sum."""
    first = step * sum(SAMPLES)
    samples = range(first, first + sum(SAMPLES[: len(layout.replicas)]))
    dense = {spec.name: summed(integers, samples)(spec) for spec in SPECS}
    for slot, tensors in got.items():
        replica = layout.replica(slot.replica)
        wanted = {spec.name: cut(spec, replica, slot.slot, dense[spec.name]) for spec in SPECS}
        same_bits(f"step {step}, {slot}", tensors, wanted)


def check_sync(
    cluster: Cluster,
    layout: ParallelLayout,
    trap: str | None = None,
    as_if_large: bool = False,
) -> None:
    """Raise Mismatch unless every slot ends each step with exactly its part of the dense sum."""
    drills = (
        Drill(step=0, bucket_bytes=TINY),
        Drill(step=1, bucket_bytes=ONE, times=2),
        Drill(step=2, bucket_bytes=SOME),
        Drill(step=3, bucket_bytes=TINY, unreported=0.1),
    )
    results = run_sync(cluster, layout, integers, drills, as_if_large, trap)
    for drill, got in zip(drills, results, strict=True):
        check_step(layout, got, drill.step)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sum_is_exact_on_every_slot(cluster: Cluster, name: str) -> None:
    check_sync(cluster, layout_of(SHAPE, 4, *LAYOUTS[name]))


@pytest.mark.parametrize("name", ["4+3", "1+2", "same_slot_in_two_of_three"])
def test_sum_of_large_tensors_is_exact(cluster: Cluster, name: str) -> None:
    check_sync(cluster, layout_of(SHAPE, 4, *LAYOUTS[name]), as_if_large=True)


@pytest.mark.parametrize("name", ["same_slot_in_two_of_three", "vacant_in_all_three"])
def test_replicas_get_the_same_bits_whatever_the_order_of_backward(
    cluster: Cluster, name: str
) -> None:
    layout = layout_of(SHAPE, 4, *LAYOUTS[name])
    drills = tuple(Drill(step=0, bucket_bytes=SOME, seed=seed) for seed in (1, 2))
    results = run_sync(cluster, layout, normal, drills)
    first = {spec.name: whole(spec, layout.replicas[0], results[0]) for spec in SPECS}
    for got in results:
        for slot, tensors in got.items():
            replica = layout.replica(slot.replica)
            wanted = {spec.name: cut(spec, replica, slot.slot, first[spec.name]) for spec in SPECS}
            same_bits(f"{slot}", tensors, wanted)
    samples = range(sum(SAMPLES[: len(layout.replicas)]))
    for spec in SPECS:
        torch.testing.assert_close(
            first[spec.name], summed(normal, samples)(spec), rtol=0, atol=1e-13
        )


def late_rank(rank: Rank, layout: ParallelLayout, last: int) -> dict[str, Tensor]:
    """Replica `last` begins its backward when all others have ended theirs."""
    slot = Slot(layout, layout.slots()[rank.rank])
    groups, store = rank.groups(), rank.store()
    ranks = rank.adopt(groups, layout, slot.slot)
    sync = slot.sync(groups, ranks, TINY)
    others = [str(ref) for ref in layout.slots() if ref.replica != last]
    if slot.slot.replica == last:
        store.wait(others)
    for _ in slot.backward(sync, integers, Drill(0, TINY)):
        pass
    store.set(str(slot.slot), "done")
    sync.finish()
    vote(groups)
    return slot.held()


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("active", [(0, 1), (1,)])
def test_backward_never_waits_for_another_replica(
    cluster: Cluster, active: tuple[int, ...], last: int
) -> None:
    layout = layout_of(SHAPE, 2, (0, 1), active)
    slots = layout.slots()
    results = cluster.run(late_rank, len(slots), layout, last)
    check_step(layout, dict(zip(slots, results, strict=True)), 0)


def bereft_rank(
    rank: Rank, layout: ParallelLayout, lost: SlotRef, after: int, bucket_bytes: int
) -> dict[str, Tensor]:
    """`lost` dies when it has reported `after` tensors; the others go on without it."""
    slot = Slot(layout, layout.slots()[rank.rank])
    groups = rank.groups()
    ranks = rank.adopt(groups, layout, slot.slot)
    sync = slot.sync(groups, ranks, bucket_bytes)
    for count, _ in enumerate(slot.backward(sync, integers, Drill(0, bucket_bytes))):
        if slot.slot == lost and count == after:
            os._exit(1)
    with pytest.raises(RuntimeError) as caught:
        sync.finish()
    assert is_connection_error(caught.value), caught.value
    groups.sever()

    layout = vacate(layout, lost)
    slot = Slot(layout, slot.slot)
    store = dist.PrefixStore("again", rank.store())
    ranks = rank.adopt(groups, layout, slot.slot, 2, store)
    sync = slot.sync(groups, ranks, bucket_bytes)
    for _ in slot.backward(sync, integers, Drill(1, bucket_bytes)):
        pass
    sync.finish()
    vote(groups)
    return slot.held()


REPORTS = SAMPLES[1] * len(SPECS)


@pytest.mark.parametrize("bucket_bytes", [TINY, SOME])
@pytest.mark.parametrize("after", [0, REPORTS - 15, REPORTS - 2])
def test_a_loss_within_backward_shows_at_its_end(
    cluster: Cluster, after: int, bucket_bytes: int
) -> None:
    layout, lost = layout_of(SHAPE, 3, (0, 1, 2), (0, 1, 2)), SlotRef(1, 1)
    slots = layout.slots()
    arguments = (layout, lost, after, bucket_bytes)
    results = cluster.run(bereft_rank, len(slots), *arguments, dies={slots.index(lost)})
    survivors = vacate(layout, lost)
    held = [result for result in results if result is not None]
    check_step(survivors, dict(zip(survivors.slots(), held, strict=True)), 1)


class Interrupted(Exception):
    """A step was given up."""


def giving_up_rank(rank: Rank, layout: ParallelLayout, ends: tuple[int, ...]) -> dict[str, Tensor]:
    """Give a step up at each of `ends`, this rank a little later than others, then do one."""
    slot = Slot(layout, layout.slots()[rank.rank])
    groups = rank.groups()
    reports = len(SPECS) * len(slot.samples(0))
    sync = None
    for generation, end in enumerate(ends, start=1):
        store = dist.PrefixStore(f"{generation}", rank.store())
        ranks = rank.adopt(groups, layout, slot.slot, generation, store)
        sync = slot.sync(groups, ranks, SOME)
        sync.abandon()
        try:
            for count, _ in enumerate(slot.backward(sync, integers, Drill(generation, SOME))):
                if count == end + rank.rank:
                    raise Interrupted
            if end + rank.rank >= reports:
                sync.finish(between=_interrupt)
        except (Interrupted, RuntimeError) as error:
            assert isinstance(error, Interrupted) or is_connection_error(error)
        groups.sever()
        sync.abandon()
        sync.abandon()
    step = len(ends) + 1
    store = dist.PrefixStore("last", rank.store())
    ranks = rank.adopt(groups, layout, slot.slot, step, store)
    sync = slot.sync(groups, ranks, SOME)
    for _ in slot.backward(sync, integers, Drill(step, SOME)):
        pass
    sync.finish()
    vote(groups)
    return slot.held()


def _interrupt() -> None:
    raise Interrupted


def test_a_step_may_be_given_up_anywhere(cluster: Cluster) -> None:
    layout = layout_of(SHAPE, 4, (0, 1, 2, 3), (1, 2, 3))
    ends = (0, 3, len(SPECS), 2 * len(SPECS) - 4, 5 * len(SPECS))
    results = cluster.run(giving_up_rank, len(layout.slots()), layout, ends)
    check_step(layout, dict(zip(layout.slots(), results, strict=True)), len(ends) + 1)
