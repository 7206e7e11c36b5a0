"""What a failure will do, in numbers, before it happens.

Pure. The real planner is asked twice: for the plan of the job at full strength, and for the one
that follows when the workers of the failed places are gone and all others stopped after a step.
Everything else is read off these two plans.

Throughput is that of a model: a step takes as long as the slowest replica needs for its samples,
and a sample as long as the work of the replica's most loaded slot (see `elastic.workload`).
Communication, a pipeline's bubble and the rounding to whole microbatches are left out, and all
devices are taken to be equally fast.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from elastic.answers import Answers
from elastic.apportion import apportion
from elastic.messages import Quiesced
from elastic.plan import NoPlan, Plan
from elastic.planner import JobShape, Situation, home_devices, plan_generation
from elastic.session import Session, decide_resume, standing
from elastic.topology import Coordinate, DeviceId, Member
from elastic.workload import replica_works, slot_work
from ntp.atoms import AtomSizes
from ntp.geometry import ParallelLayout, ShardMap, SlotRef
from ntp.reshard_plan import Move


@dataclass(frozen=True, slots=True)
class ElementBytes:
    """Bytes that one element of the model takes: in a move, and in all that a slot keeps of it."""

    parameter: int
    optimizer: int
    resident: int

    @property
    def moved(self) -> int:
        """Bytes that travel: the parameter and its optimizer state."""
        return self.parameter + self.optimizer


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a slot sends to another, in elements of the model, over all pipeline stages."""

    source: SlotRef
    target: SlotRef
    elements: int


@dataclass(frozen=True, slots=True)
class Alike:
    """Replicas that look the same after the failure; `samples` are their shares of the batch.

    `shards` is None, and `samples` empty, where no slot is left.
    """

    replicas: tuple[int, ...]
    active: tuple[int, ...]
    shards: ShardMap | None
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """Elements held by the fullest slot: at full strength, after, and while both are held."""

    before: int
    after: int
    switching: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """Samples a second relative to full strength: as planned; with an equal split; with the
    wounded replicas left out (0 if that leaves none)."""

    planned: float
    equal_split: float
    without_wounded: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """The two plans and what follows from them; amounts in elements of the model.

    `transfers` are the moves by pair, the largest first. `least` is the lower bound of what must
    move if no slot changes its replica: what the lost places owned, in replicas that go on.
    """

    shape: JobShape
    failed: tuple[Coordinate, ...]
    before: Plan
    after: Plan
    alike: tuple[Alike, ...]
    transfers: tuple[Transfer, ...]
    least: int
    memory: Memory
    throughput: Throughput

    @property
    def moved(self) -> int:
        """Elements moved in all."""
        return sum(transfer.elements for transfer in self.transfers)

    def sent(self) -> dict[SlotRef, int]:
        """Elements that each sending slot sends."""
        return _totals((each.source, each.elements) for each in self.transfers)

    def received(self) -> dict[SlotRef, int]:
        """Elements that each receiving slot receives."""
        return _totals((each.target, each.elements) for each in self.transfers)


def failed_places(
    names: Sequence[str], shape: JobShape, devices: Sequence[DeviceId]
) -> tuple[Coordinate, ...]:
    """The places that `names` mean, in order: REPLICA.SLOT (in all stages), or a device's name.

    Raises ValueError for what is not there, or is no name.
    """
    homes = {device: place for place, device in home_devices(shape, devices).items()}
    found: set[Coordinate] = set()
    for name in names:
        if match := re.fullmatch(r"(\d+)\.(\d+)", name):
            replica, slot = int(match[1]), int(match[2])
            places = {p for p in homes.values() if (p.replica, p.slot) == (replica, slot)}
            if not places:
                raise ValueError(
                    f"{name}: there is no such slot; replicas are 0..{shape.replicas - 1}, and "
                    f"each has slots 0..{shape.tensor - 1}"
                )
            found |= places
        elif match := re.fullmatch(r"node(\d+)/(\d+)", name):
            device = DeviceId(int(match[1]), int(match[2]))
            if device not in homes:
                what = "is a spare, which holds no slot" if device in devices else "does not exist"
                raise ValueError(
                    f"{name}: the device {what}; those of slots are {next(iter(homes))} to "
                    f"{list(homes)[-1]}"
                )
            found.add(homes[device])
        else:
            raise ValueError(
                f"{name}: write it as REPLICA.SLOT, such as 1.2, or as a device, such as node0/3"
            )
    return tuple(sorted(found))


def forecast(
    shape: JobShape, devices: Sequence[DeviceId], failed: Sequence[Coordinate]
) -> Forecast | NoPlan:
    """What happens when the workers in all places of `failed` are lost at once.

    NoPlan if the job would halt. `devices` are those of the cluster, in order.
    """
    homes = home_devices(shape, devices)
    workers = {device: Member(device, 1) for device in devices}
    before = plan_generation(shape, Situation(1, workers, Answers(), {}, "", homes))
    if isinstance(before, NoPlan):
        return before
    lost = {homes[place] for place in failed}
    left = {device: member for device, member in workers.items() if device not in lost}
    standings = {
        member: standing(place.slot_ref, Session(0), 1, 0)
        for place, member in before.placement
        if member.device in left
    }
    answers = Answers(Quiesced(2, member, each, True, 0.0) for member, each in standings.items())
    after = plan_generation(shape, Situation(2, left, answers, {1: before}, "", homes))
    if isinstance(after, NoPlan):
        return after
    # The step at which all stopped is made up, and what the reason says of it would mislead.
    resume = decide_resume(list(standings.values()))
    after = replace(after, reason=after.reason.replace(f"{resume.reason}; ", ""))
    return Forecast(
        shape=shape,
        failed=tuple(failed),
        before=before,
        after=after,
        alike=_alike(before, after),
        transfers=_transfers(shape.sizes, after),
        least=_least(shape.sizes, before, after),
        memory=_memory(shape.sizes, before.layout, after.layout),
        throughput=_throughput(shape, before, after),
    )


def imbalance(loads: Sequence[int]) -> float:
    """The largest load over the mean; 1 is perfect balance."""
    return max(loads) * len(loads) / sum(loads)


def stage_moves(plan: Plan) -> tuple[tuple[Move, ...], ...]:
    """The moves of each pipeline stage."""
    return tuple(stage.moves for stage in plan.reshard)


def _totals(amounts: Iterable[tuple[SlotRef, int]]) -> dict[SlotRef, int]:
    totals: defaultdict[SlotRef, int] = defaultdict(int)
    for ref, elements in amounts:
        totals[ref] += elements
    return dict(sorted(totals.items()))


def _transfers(sizes: Sequence[AtomSizes], plan: Plan) -> tuple[Transfer, ...]:
    amounts: defaultdict[tuple[SlotRef, SlotRef], int] = defaultdict(int)
    for stage, (each, moves) in enumerate(zip(sizes, stage_moves(plan), strict=True)):
        ranks = plan.meeting_ranks(stage)
        for move in moves:
            # A worker that changes its place keeps what it needs in the new one.
            if ranks[move.source] != ranks[move.target]:
                atoms = len(move.atoms) if move.atoms else 1
                amounts[move.source, move.target] += each.of(move.axis) * atoms
    transfers = (Transfer(source, target, amount) for (source, target), amount in amounts.items())
    return tuple(sorted(transfers, key=lambda each: (-each.elements, each.target, each.source)))


def _alike(before: Plan, after: Plan) -> tuple[Alike, ...]:
    """Replicas grouped by layout, ordered by the first of each group."""
    members: defaultdict[tuple[tuple[int, ...], ShardMap | None], list[int]] = defaultdict(list)
    samples: dict[int, int] = {}
    layouts = {replica.replica: replica for replica in after.layout.replicas}
    for replica, share in zip(after.layout.replicas, after.batch_split, strict=True):
        samples[replica.replica] = share
    for replica in before.layout.replicas:
        kept = layouts.get(replica.replica)
        key = (kept.active, kept.shards) if kept else ((), None)
        members[key].append(replica.replica)
    return tuple(
        Alike(tuple(numbers), active, shards, tuple(samples[n] for n in numbers if n in samples))
        for (active, shards), numbers in members.items()
    )


def _least(sizes: Sequence[AtomSizes], before: Plan, after: Plan) -> int:
    kept = {replica.replica for replica in after.layout.replicas}
    now = dict(after.placement)
    least = 0
    for place, member in before.placement:
        if place.replica in kept and now.get(place) != member:
            own = sizes[place.stage]
            least += slot_work(before.layout.replica(place.replica).shards, place.slot, own)
            # A new worker in the place also needs what every slot holds.
            least += own.replicated if place in now else 0
    return least


def _memory(sizes: Sequence[AtomSizes], before: ParallelLayout, after: ParallelLayout) -> Memory:
    most_before = most_after = most_switching = 0
    old = {replica.replica: replica for replica in before.replicas}
    for replica in after.replicas:
        was = old[replica.replica]
        for each in set(sizes):
            for slot in replica.active:
                held = slot_work(was.shards, slot, each) + each.replicated
                holds = slot_work(replica.shards, slot, each) + each.replicated
                both = held if was == replica else held + holds
                most_before = max(most_before, held)
                most_after = max(most_after, holds)
                most_switching = max(most_switching, both)
    return Memory(most_before, most_after, most_switching)


def _throughput(shape: JobShape, before: Plan, after: Plan) -> Throughput:
    works = replica_works(after.layout, shape.sizes)
    full = replica_works(before.layout, shape.sizes)
    whole = [
        work
        for work, replica in zip(works, after.layout.replicas, strict=True)
        if replica.degree == shape.tensor
    ]
    at_full_strength = _slowest(before.batch_split, full)
    equal = apportion(shape.global_batch_size, (1,) * len(works), shape.least_share)
    alone = apportion(shape.global_batch_size, whole, shape.least_share) if whole else ()
    return Throughput(
        planned=after.throughput,
        equal_split=at_full_strength / _slowest(equal, works),
        without_wounded=at_full_strength / _slowest(alone, whole) if whole else 0.0,
    )


def _slowest(samples: Sequence[int], works: Sequence[int]) -> int:
    return max(share * work for share, work in zip(samples, works, strict=True))
