"""Reshards in many chunks: any pair of layouts, the memory they need, and a peer lost midway."""

from __future__ import annotations

import os
import random
import signal
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense import fill, normal
from harness import Cluster, Rank
from test_reshard import FULL, LOST, SIZES, SPECS, TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ntp.confirmed_exchange import MARK_TAG, ConfirmedExchange
from ntp.geometry import ParallelLayout, SlotRef, vacate, with_active
from ntp.local_shards import LocalShards
from ntp.process_groups import is_connection_error
from ntp.reshard import DEFAULT_LIMITS, ranges_kept, reshard
from ntp.reshard_plan import NoHolder, ReshardPlan, plan_reshard
from ntp.state_chunks import Limits

CONFIRMATION_BYTES = 1


@dataclass(frozen=True, slots=True)
class Case:
    """A switch between any two layouts; who holds nothing of the source starts from nothing."""

    source: ParallelLayout
    target: ParallelLayout
    plan: ReshardPlan
    holders: frozenset[SlotRef]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case did on one rank. `wrong`: what differs from the reference, "" if nothing."""

    received: int
    peak_bytes: int
    messages: dict[int, int]
    wrong: str


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes of tensors with memory of their own that were made since it was entered.

    ``peak`` is the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            nbytes = result.untyped_storage().nbytes()
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(result, self._gone, nbytes)
        return result

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


class CountingGroup:
    """A group that counts the messages it sends to each rank; confirmations do not count."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.messages: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        if tag < MARK_TAG:
            self.messages[peer] = self.messages.get(peer, 0) + 1
        return self._group.send(tensors, peer, tag)


def random_layout(rng: random.Random) -> ParallelLayout:
    """Some of the replicas, each with some of its slots."""
    chosen = sorted(rng.sample(range(len(FULL.replicas)), rng.randint(1, len(FULL.replicas))))
    return ParallelLayout(
        FULL.tp_base,
        tuple(
            with_active(FULL.replicas[number], tuple(sorted(rng.sample(range(4), size))))
            for number in chosen
            for size in [rng.randint(1, 4)]
        ),
    )


def random_case(rng: random.Random) -> Case:
    """A switch that is possible, with limits that make many chunks, some of a few bytes."""
    while True:
        source, target = random_layout(rng), random_layout(rng)
        alive = sorted(set(source.slots()) & set(target.slots()))
        holders = frozenset(rng.sample(alive, rng.randint(0, len(alive))))
        try:
            plan = plan_reshard(source, target, holders, SIZES)
        except NoHolder:
            continue
        if plan.moves:
            # An atom has 512 bytes of a fused query, key and value weight in float32.
            chunk = rng.choice([500, 2000, 1 << 20])
            limits = Limits(chunk, rng.randint(1, 6), rng.choice([200, 1000, 1 << 20]))
            return Case(source, target, plan, holders, limits)


def filled(layout: ParallelLayout, slot: SlotRef) -> tuple[LocalShards, list[Tensor]]:
    """What a slot holds in a layout. Kinds of state may differ in dtype."""
    replica = layout.replica(slot.replica)
    shards = LocalShards(SPECS, replica.shards, slot.slot)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    buffers = [torch.zeros(shards.total, dtype=dtype) for dtype in dtypes]
    for seed, buffer in enumerate(buffers):
        fill(shards, replica, buffer, lambda spec, seed=seed: normal(spec, seed))
    return shards, buffers


def cases_rank(rank: Rank, cases: list[Case]) -> list[Outcome | None]:
    """Run all cases in one world of which each uses some ranks."""
    slot = FULL.slots()[rank.rank]
    groups = rank.groups()
    ranks = rank.adopt(groups, FULL, slot)
    outcomes: list[Outcome | None] = []
    for case in cases:
        if slot not in case.target.slots():
            outcomes.append(None)
            continue
        source = filled(case.source, slot) if slot in case.holders else None
        before = [buffer.clone() for buffer in source[1]] if source else []
        shards, wanted = filled(case.target, slot)
        target = (shards, [torch.full_like(buffer, 7.0) for buffer in wanted])
        kept = ranges_kept(case.source, case.target, slot) if source else ()
        group: Any = CountingGroup(groups.world)
        with AllocationMeter() as meter:
            received = reshard(
                case.plan, slot, ranks, group, source, target, kept, limits=case.limits
            )
        wrong = [
            f"{what} {number}"
            for what, got, expected in (
                ("target", target[1], wanted),
                ("source", source[1] if source else [], before),
            )
            for number, pair in enumerate(zip(got, expected, strict=True))
            if not torch.equal(*(buffer.view(torch.uint8) for buffer in pair))
        ]
        outcomes.append(Outcome(received, meter.peak, group.messages, ", ".join(wrong)))
    return outcomes


@pytest.mark.parametrize("seed", range(3))
def test_any_pair_of_layouts(cluster: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    cases = [random_case(rng) for _ in range(5)]
    ran = cluster.run(cases_rank, len(FULL.slots()), cases)
    for number, case in enumerate(cases):
        outcomes = [outcomes[number] for outcomes in ran if outcomes[number] is not None]
        assert not [outcome.wrong for outcome in outcomes if outcome.wrong], (seed, number)
        # Bytes on the wire are those that had to move, in float32, float64 and bfloat16.
        assert sum(outcome.received for outcome in outcomes) == case.plan.elements(SIZES) * 14
        peak = max(outcome.peak_bytes for outcome in outcomes)
        assert peak <= case.limits.staging_bytes + CONFIRMATION_BYTES, (seed, number)


def switch(source: ParallelLayout, target: ParallelLayout, limits: Limits) -> Case:
    """A switch of which all slots but LOST were part before."""
    holders = frozenset(source.slots()) - {LOST}
    return Case(source, target, plan_reshard(source, target, holders, SIZES), holders, limits)


def test_contiguous_runs_are_not_copied(cluster: Cluster) -> None:
    # With runs of any length direct, each row of each matrix is a message between flat buffers.
    case = switch(vacate(FULL, LOST), FULL, Limits(direct_bytes=1))
    for (outcome,) in cluster.run(cases_rank, len(FULL.slots()), [case]):
        assert (outcome.wrong, outcome.peak_bytes) == ("", CONFIRMATION_BYTES)


def test_a_small_reshard_is_one_message_per_pair(cluster: Cluster) -> None:
    reduced = vacate(FULL, LOST)
    cases = [switch(FULL, reduced, DEFAULT_LIMITS), switch(reduced, FULL, DEFAULT_LIMITS)]
    ran = cluster.run(cases_rank, len(FULL.slots()), cases)
    for number, case in enumerate(cases):
        pairs = {(move.source, move.target) for move in case.plan.moves}
        sent = {
            (slot, FULL.slots()[peer]): count
            for slot, outcomes in zip(FULL.slots(), ran, strict=True)
            if outcomes[number] is not None
            for peer, count in outcomes[number].messages.items()
        }
        assert sent == dict.fromkeys(pairs, 1)


VICTIM = SlotRef(1, 1)
"""It sends to LOST when that returns."""


@dataclass(frozen=True, slots=True)
class AfterLoss:
    """What a survivor saw: the error, if any; whether the source changed or the target lives on."""

    error: str | None
    source_changed: bool
    target_kept: bool
    wrong: bool


def lossy_rank(rank: Rank, dies_at: int) -> AfterLoss:
    """Heal LOST while VICTIM dies at a window of its own, then go on without both of them."""
    slots = FULL.slots()
    slot = slots[rank.rank]
    groups = rank.groups()
    store = rank.store()
    reduced = vacate(FULL, LOST)
    holders = frozenset(reduced.slots())
    ranks = rank.adopt(groups, FULL, slot, 1, store)
    if slot == VICTIM:
        _die_at_window(dies_at)
    source = filled(reduced, slot) if slot in holders else None
    before = [buffer.clone() for buffer in source[1]] if source else []
    target = filled(FULL, slot)
    watched = weakref.ref(target[1][0])
    kept = ranges_kept(reduced, FULL, slot) if source else ()
    plan = plan_reshard(reduced, FULL, holders, SIZES)
    error: str | None = None
    try:
        reshard(plan, slot, ranks, groups.world, source, target, kept, TINY)
        # As the worker does before anybody promotes what it received.
        torch.distributed.all_reduce(torch.zeros(1), group=groups.world)
    except RuntimeError as caught:
        assert is_connection_error(caught), caught
        error = str(caught)
        # Wakes those that wait for this rank.
        groups.sever()
    del target
    changed = source is not None and not all(
        torch.equal(*pair) for pair in zip(source[1], before, strict=True)
    )
    kept_alive = watched() is not None
    wrong = False
    smaller = vacate(reduced, VICTIM)
    if slot in smaller.slots():
        ranks = rank.adopt(groups, smaller, slot, 2, store)
        assert source is not None
        shards, wanted = filled(smaller, slot)
        target = (shards, [torch.zeros_like(buffer) for buffer in wanted])
        plan = plan_reshard(reduced, smaller, holders - {VICTIM}, SIZES)
        kept = ranges_kept(reduced, smaller, slot)
        reshard(plan, slot, ranks, groups.world, source, target, kept, TINY)
        wrong = not all(torch.equal(*pair) for pair in zip(target[1], wanted, strict=True))
    return AfterLoss(error, changed, kept_alive, wrong)


def _die_at_window(number: int) -> None:
    """Have this process killed when it has posted its window `number`."""
    posted = 0

    def post(self: ConfirmedExchange, *arguments: Any) -> None:
        nonlocal posted
        original(self, *arguments)
        if posted == number:
            os.kill(os.getpid(), signal.SIGKILL)
        posted += 1

    original = ConfirmedExchange.post
    ConfirmedExchange.post = post


@pytest.mark.parametrize("dies_at", [0, 2])
def test_a_peer_is_lost_midway(cluster: Cluster, dies_at: int) -> None:
    slots = FULL.slots()
    victim = slots.index(VICTIM)
    ran = cluster.run(lossy_rank, len(slots), dies_at, dies={victim})
    for slot, outcome in zip(slots, ran, strict=True):
        if slot != VICTIM:
            assert outcome.error is not None, slot
            assert not (outcome.source_changed or outcome.target_kept or outcome.wrong), outcome
