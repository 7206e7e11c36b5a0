"""Which worker sits in which place.

Pure. A *roster* says who is where before anything is decided: survivors in the places whose state
they hold, free workers at the vacant homes of their devices, and the idle ones. `seat` gives every
replica a degree: it keeps the slots that lack fewest workers, vacates the others, and fills what
lacks from those who are free then. A place that stays active keeps the worker that holds its
state; only a worker whose slot is vacated, in all stages, takes another place, and then sends what
it held.

A place is filled, in this order, by its home device; by a worker on a node where its
tensor-parallel group has members; by one of the node with most free workers. The last is forbidden
where `tensor_across_nodes` is off, unless the group has no members at all. Among equals comes first
a worker that has held this slot and stage in another replica, as it holds most of what it needs;
then one that holds nothing, whose process need not keep two states.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from elastic.job_shape import JobShape
from elastic.memory_fit import MemoryFit
from elastic.topology import Assignment, Coordinate, DeviceId, Member

Row = tuple[Assignment, ...]
"""The workers of one replica, by stage and slot."""


@dataclass(frozen=True, slots=True)
class Roster:
    """Who is where. `rows` holds who has the state of its place (at the start: who is at home);
    `returned` free workers at vacant homes in wounded replicas; `idle` all other free workers.

    `held` are the slots among which the state of each wounded replica was divided.
    """

    rows: Mapping[int, Row]
    returned: Mapping[int, Mapping[Coordinate, Member]]
    idle: tuple[Member, ...]
    held: Mapping[int, tuple[int, ...]]

    def fits(self, memory: MemoryFit, replica: int, slots: tuple[int, ...]) -> bool:
        """Whether the replica's workers can go on with these slots, which may change the layout."""
        held = self.held.get(replica, ())
        return memory.fits_both(0 if slots == held else len(held), len(slots))


@dataclass(frozen=True, slots=True)
class Seating:
    """Who sits where after the decision, by replica; replicas that are left out are missing.

    `active` are the slots of those that are not as before and whole.
    """

    rows: Mapping[int, Row]
    active: Mapping[int, tuple[int, ...]]


def roster_at_home(
    shape: JobShape,
    workers: Mapping[DeviceId, Member],
    homes: Mapping[Coordinate, DeviceId],
) -> Roster:
    """Nobody holds anything: each worker is at its home."""
    rows: defaultdict[int, list[Assignment]] = defaultdict(list)
    for place, device in homes.items():
        if device in workers:
            rows[place.replica].append(Assignment(place, workers[device]))
    idle = workers.keys() - set(homes.values())
    return Roster(
        rows={replica: tuple(row) for replica, row in rows.items()},
        returned={},
        idle=tuple(workers[device] for device in sorted(idle)),
        held={},
    )


def roster_of_survivors(
    shape: JobShape,
    source: Mapping[int, Row],
    lost: Sequence[Assignment],
    free: Collection[Member],
    homes: Mapping[Coordinate, DeviceId],
) -> Roster:
    """`source` are the rows of the plan whose state the survivors hold, all but the `lost` ones;
    `free` are the workers that hold nothing."""
    wounded = {place.replica for place, _ in lost}
    gone = set(lost)
    rows = {
        replica: tuple(each for each in row if each not in gone) if replica in wounded else row
        for replica, row in source.items()
    }
    at_home = {member.device: member for member in free}
    size = shape.tensor * shape.stages
    returned: dict[int, dict[Coordinate, Member]] = {}
    for replica in range(shape.replicas) if at_home else ():
        if len(row := rows.get(replica, ())) < size:
            taken = dict(row)
            places = (
                Coordinate(replica, stage, slot)
                for stage in range(shape.stages)
                for slot in range(shape.tensor)
            )
            returned[replica] = {
                place: at_home.pop(device)
                for place in places
                if place not in taken and (device := homes.get(place)) in at_home
            }
    held = {
        replica: tuple(place.slot for place, _ in source[replica] if place.stage == 0)
        for replica, row in rows.items()
        if row and len(row) < size
    }
    return Roster(rows, returned, tuple(sorted(at_home.values())), held)


def complete_slots(places: Iterable[Coordinate], stages: int) -> tuple[int, ...]:
    """Slots of one replica that have a worker in every stage; only these can be active."""
    found = Counter(place.slot for place in places)
    return tuple(sorted(slot for slot, count in found.items() if count == stages))


class _Free(NamedTuple):
    """A worker that may take a place; `held_at` is the place whose state it holds, `degree` that
    of the replica it held it in."""

    member: Member
    held_at: Coordinate | None
    degree: int


def seat(
    shape: JobShape, memory: MemoryFit, roster: Roster, degrees: Mapping[int, int]
) -> Seating | None:
    """Give each replica in `degrees` that many slots, and leave all others as they are.

    None if the rules or the memory leave a place without a worker.
    """
    free = [_Free(member, None, 0) for member in roster.idle]
    seats: dict[int, dict[Coordinate, Member]] = {}
    active: dict[int, tuple[int, ...]] = {}
    short = _nodes_short_of_workers(shape, roster, degrees)
    for replica, degree in sorted(degrees.items()):
        holders = dict(roster.rows.get(replica, ()))
        present = {**roster.returned.get(replica, {}), **holders}
        kept = slots_to_keep(shape, roster, replica, degree, short)
        if not roster.fits(memory, replica, kept):
            return None
        if kept:
            active[replica] = kept
            seats[replica] = {p: member for p, member in present.items() if p.slot in kept}
        held = len(roster.held.get(replica, ()))
        free += [
            _Free(member, place, held) if place in holders and held else _Free(member, None, 0)
            for place, member in present.items()
            if place.slot not in kept
        ]
    if not _fill(shape, memory, seats, active, free):
        return None
    rows = {replica: row for replica, row in roster.rows.items() if replica not in degrees}
    for replica, taken in seats.items():
        rows[replica] = tuple(Assignment(place, taken[place]) for place in sorted(taken))
    return Seating(rows, active)


def slots_to_keep(
    shape: JobShape, roster: Roster, replica: int, degree: int, short: Set[int] = frozenset()
) -> tuple[int, ...]:
    """The slots that lack fewest workers; then those where most hold state; then those whose
    workers are not on nodes that are `short` of some; then the lowest."""
    if not degree:
        return ()
    row, returned = roster.rows.get(replica, ()), roster.returned.get(replica, {})
    holding = Counter(place.slot for place, _ in row)
    there = holding + Counter(place.slot for place in returned)
    present = chain(row, returned.items())
    wanted = Counter(place.slot for place, member in present if member.device.node in short)
    ranked = sorted(
        range(shape.tensor), key=lambda slot: (-there[slot], -holding[slot], wanted[slot], slot)
    )
    return tuple(sorted(ranked[:degree]))


def _nodes_short_of_workers(
    shape: JobShape, roster: Roster, degrees: Mapping[int, int]
) -> frozenset[int]:
    """Where workers of replicas are that are to have more, if those must be on the same nodes."""
    if shape.rules.tensor_across_nodes:
        return frozenset()
    short = set[int]()
    for replica, degree in degrees.items():
        row, returned = roster.rows.get(replica, ()), roster.returned.get(replica, {})
        if len(row) + len(returned) < degree * shape.stages:
            short.update(member.device.node for _, member in chain(row, returned.items()))
    return frozenset(short)


def _fill(
    shape: JobShape,
    memory: MemoryFit,
    seats: Mapping[int, dict[Coordinate, Member]],
    active: Mapping[int, Sequence[int]],
    free: Iterable[_Free],
) -> bool:
    """Seat free workers in all places that lack one; returns whether there are enough."""
    by_node: defaultdict[int, list[_Free]] = defaultdict(list)
    for each in free:
        by_node[each.member.device.node].append(each)
    vacant = [
        place
        for replica, slots in active.items()
        for stage in range(shape.stages)
        for slot in slots
        if (place := Coordinate(replica, stage, slot)) not in seats[replica]
    ]
    nodes: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for replica in {place.replica for place in vacant}:
        for place, member in seats[replica].items():
            nodes[replica, place.stage].add(member.device.node)

    def take(place: Coordinate, near: bool) -> bool:
        group, degree = nodes[place.replica, place.stage], len(active[place.replica])
        if not near and group and not shape.rules.tensor_across_nodes:
            return False
        able = {
            node: fitting
            for node in (group if near else by_node)
            if (fitting := [f for f in by_node.get(node, ()) if memory.fits_both(f.degree, degree)])
        }
        if not able:
            return False
        if near:
            candidates = [each for fitting in able.values() for each in fitting]
        else:
            candidates = able[min(able, key=lambda node: (-len(able[node]), node))]
        chosen = min(candidates, key=lambda each: _effort(each, place))
        by_node[chosen.member.device.node].remove(chosen)
        seats[place.replica][place] = chosen.member
        group.add(chosen.member.device.node)
        return True

    # Whoever has a neighbour to be filled by comes first, so that no other takes it.
    left = [place for place in vacant if not take(place, near=True)]
    return all(take(place, near=True) or take(place, near=False) for place in left)


def _effort(free: _Free, place: Coordinate) -> tuple[int, Member]:
    """Sort key: how much it takes to move this worker into the place."""
    if free.held_at is None:
        return 1, free.member
    alike = (free.held_at.stage, free.held_at.slot) == (place.stage, place.slot)
    return (0 if alike else 2), free.member
