"""Layouts as data: which slot of which replica owns which atoms.

Theory of operation. Ownership is anchored. On every axis slot i has a *home* range, fixed for the
whole run: the atoms it owns at full degree. While slot i is active it owns its home; when it is
vacant, its home atoms (*orphans*) are spread over the replica's active slots, so that these end up
within one atom of each other. Two consequences carry the rest of the runtime:

- A loss moves only what was lost: an active slot never has too much after a neighbour left, since
  the even share only grew. A return moves the returned home, and orphans only as balance asks.
- Replicas at different degrees still agree on homes, so slot i of one replica and slot i of another
  share the same leading atoms, and most gradient traffic stays slot to slot.

A slot's local tensor, along the atom dimension, is the concatenation of its owned ranges: first
the home range, always a piece of its own, then the adopted ranges in ascending order, merged where
they touch. Every type here is plain data that checks itself, also when it is decoded from a
message; such data may come from outside, so a breach is a ValueError.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product, starmap
from operator import attrgetter
from typing import NamedTuple

from ntp.atoms import AtomCounts, Axis
from ntp.ranges import Range as Range
from ntp.ranges import by_start, common, deal, subtract, take
from ntp.ranges import merged as merged


class SlotRef(NamedTuple):
    """A tensor-parallel slot of one replica. Ordered by replica, then slot."""

    replica: int
    slot: int


AxisHomes = tuple[Axis, tuple[Range, ...]]
"""An axis, and the home range of each slot."""


@dataclass(frozen=True, slots=True)
class AxisShards:
    """Who owns the atoms of one axis in one replica; tuples are indexed by slot.

    ``home``: the slots' home ranges, contiguous from atom 0. ``owned``: the slots' ranges in
    storage order, home first; () for a vacant slot. Raises ValueError unless every atom is owned
    exactly once.
    """

    axis: Axis
    home: tuple[Range, ...]
    owned: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        if not self.home or len(self.owned) != len(self.home):
            raise ValueError(
                f"{self.axis}: {len(self.home)} homes for {len(self.owned)} slots; give one a slot"
            )
        if self.home[0].start != 0 or not _touch(self.home):
            raise ValueError(f"{self.axis}: homes {self.home} must be contiguous from atom 0")
        for slot, (home, pieces) in enumerate(zip(self.home, self.owned, strict=True)):
            if pieces and (pieces[:1] != (home,) or not _ascend(pieces[1:])):
                raise ValueError(
                    f"{self.axis}: slot {slot} owns {pieces}; its home {home} must come first, "
                    "then adopted ranges, ascending and merged"
                )
        everything = sorted((piece for pieces in self.owned for piece in pieces), key=by_start)
        complete = everything and everything[0].start == 0 and everything[-1].stop == self.atoms
        if not complete or not _touch(everything):
            raise ValueError(f"{self.axis}: {self.owned} must own atoms 0..{self.atoms} once each")

    @property
    def atoms(self) -> int:
        """Number of atoms on the axis."""
        return self.home[-1].stop

    def holders(self, within: Range) -> tuple[tuple[int, Range], ...]:
        """(slot, range) pieces that make up `within`, ascending; each inside one owned range."""
        found = [
            (slot, Range(max(piece.start, within.start), min(piece.stop, within.stop)))
            for slot, pieces in enumerate(self.owned)
            for piece in pieces
            if piece.start < within.stop and within.start < piece.stop
        ]
        return tuple(sorted(found, key=lambda entry: entry[1].start))


def _touch(ranges: Sequence[Range]) -> bool:
    return [piece.start for piece in ranges[1:]] == [piece.stop for piece in ranges[:-1]]


def _ascend(ranges: Sequence[Range]) -> bool:
    return len(ranges) < 2 or all(first.stop < second.start for first, second in pairwise(ranges))


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Ownership of all atoms of one replica: one entry for each axis that the model has.

    Raises ValueError if the axes disagree, repeat or are out of order, or there is none.
    """

    tp_base: int
    axes: tuple[AxisShards, ...]

    def __post_init__(self) -> None:
        axes = [shards.axis for shards in self.axes]
        if not axes or axes != [axis for axis in Axis if axis in axes]:
            raise ValueError(f"axes {axes} must be one or more of {list(Axis)}, in this order")
        for shards in self.axes:
            if len(shards.home) != self.tp_base:
                raise ValueError(
                    f"{shards.axis} has {len(shards.home)} slots but tp_base is {self.tp_base}"
                )

    @property
    def homes(self) -> tuple[AxisHomes, ...]:
        """Each axis with the home ranges of its slots."""
        return tuple((shards.axis, shards.home) for shards in self.axes)

    def axis(self, axis: Axis) -> AxisShards:
        """Ownership on one axis. Raises ValueError if the model does not have it."""
        for shards in self.axes:
            if shards.axis is axis:
                return shards
        raise ValueError(f"the model has no {axis} atoms; it has {[s.axis for s in self.axes]}")

    def owned(self, axis: Axis, slot: int) -> tuple[Range, ...]:
        """Ranges of `slot` in storage order; () if it is vacant, or slot or axis is unknown."""
        for shards in self.axes:
            if shards.axis is axis and 0 <= slot < self.tp_base:
                return shards.owned[slot]
        return ()

    def local_atoms(self, axis: Axis, slot: int) -> int:
        """Number of atoms `slot` owns; 0 if it is vacant, or slot or axis is unknown."""
        return sum(len(piece) for piece in self.owned(axis, slot))

    def offset_of(self, axis: Axis, slot: int, atom_range: Range) -> int:
        """Local index, in atoms, at which `atom_range` begins in the slot's tensors.

        Raises ValueError if the range does not lie inside one owned range: only then is it one
        slice of the local tensor.
        """
        offset = 0
        for piece in self.owned(axis, slot):
            if piece.contains(atom_range):
                return offset + atom_range.start - piece.start
            offset += len(piece)
        raise ValueError(
            f"{axis} {atom_range} is not inside one range of slot {slot}, which owns "
            f"{self.owned(axis, slot)}; cut it at those bounds first"
        )


@dataclass(frozen=True, slots=True)
class ReplicaLayout:
    """One replica: its active slots, ascending, and who owns what among them.

    Raises ValueError if an active slot owns nothing or a vacant one something.
    """

    replica: int
    active: tuple[int, ...]
    shards: ShardMap

    def __post_init__(self) -> None:
        for shards in self.shards.axes:
            owners = tuple(slot for slot, pieces in enumerate(shards.owned) if pieces)
            if owners != self.active:
                raise ValueError(
                    f"replica {self.replica}: slots {owners} own atoms of {shards.axis} but the "
                    f"active slots are {self.active}"
                )

    @property
    def degree(self) -> int:
        """Number of active slots."""
        return len(self.active)


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """All replicas that take part, ascending by number; numbers may have gaps.

    Raises ValueError if there is none, a number repeats, or replicas disagree on the homes.
    """

    tp_base: int
    replicas: tuple[ReplicaLayout, ...]

    def __post_init__(self) -> None:
        numbers = [replica.replica for replica in self.replicas]
        if not numbers or numbers[0] < 0 or numbers != sorted(set(numbers)):
            raise ValueError(f"replicas {numbers} must be one or more numbers from 0, ascending")
        homes = self.homes
        # Most replicas share one map: a look at those that do not is enough.
        first = self.replicas[0].shards
        others = [r.shards for r in self.replicas if r.shards is not first]
        if first.tp_base != self.tp_base or any(shards.homes != homes for shards in others):
            raise ValueError(
                f"all replicas must have the same home ranges for tp_base {self.tp_base}"
            )

    @property
    def homes(self) -> tuple[AxisHomes, ...]:
        """Each axis of the model with the home ranges of its slots, the same in all replicas."""
        return self.replicas[0].shards.homes

    def replica(self, number: int) -> ReplicaLayout:
        """Layout of replica `number`. Raises ValueError if it takes no part."""
        index = bisect_left(self.replicas, number, key=attrgetter("replica"))
        if index < len(self.replicas) and self.replicas[index].replica == number:
            return self.replicas[index]
        raise ValueError(
            f"no replica {number}; there are {[replica.replica for replica in self.replicas]}"
        )

    def slots(self) -> tuple[SlotRef, ...]:
        """Active slots in order of replica and slot; the position is the rank in the world."""
        slots = (product((replica.replica,), replica.active) for replica in self.replicas)
        return tuple(starmap(SlotRef, chain.from_iterable(slots)))


def full_layout(counts: AtomCounts, tp_base: int, replicas: int) -> ParallelLayout:
    """Every slot of `replicas` replicas active, each owning its home.

    Homes are contiguous and differ by at most one atom, the bigger ones first. Raises ValueError
    if an axis has some atoms but fewer than slots, or there is no axis, slot or replica.
    """
    if tp_base < 1 or replicas < 1:
        raise ValueError(f"tp_base {tp_base} and replicas {replicas} must both be at least 1")
    axes: list[AxisShards] = []
    for axis in counts.axes:
        atoms = counts.of(axis)
        if atoms < tp_base:
            raise ValueError(
                f"{atoms} {axis} atoms cannot fill {tp_base} slots; lower tp_base to {atoms}"
            )
        # Slot i starts after i shares, plus one atom for each bigger slot before it.
        share, bigger = divmod(atoms, tp_base)
        starts = [slot * share + min(slot, bigger) for slot in range(tp_base + 1)]
        home = tuple(Range(starts[slot], starts[slot + 1]) for slot in range(tp_base))
        axes.append(AxisShards(axis, home, tuple((piece,) for piece in home)))
    shards = ShardMap(tp_base, tuple(axes))
    active = tuple(range(tp_base))
    return ParallelLayout(
        tp_base,
        tuple(ReplicaLayout(number, active, shards) for number in range(replicas)),
    )


def vacate(layout: ParallelLayout, slot: SlotRef) -> ParallelLayout:
    """The layout after `slot` lost its device: its atoms go to its replica's other slots.

    Raises ValueError if it is not active, or is its replica's last active slot.
    """
    active = layout.replica(slot.replica).active
    if slot.slot not in active:
        raise ValueError(f"{slot} is not active; replica {slot.replica} has slots {active}")
    if len(active) == 1:
        raise ValueError(f"{slot} is the last slot of its replica; drop the replica instead")
    return _with_replica_active(layout, slot.replica, tuple(s for s in active if s != slot.slot))


def heal(layout: ParallelLayout, slot: SlotRef) -> ParallelLayout:
    """The layout after `slot` got a device again: it takes its home back.

    Raises ValueError if it is active already, or no slot of this layout.
    """
    active = layout.replica(slot.replica).active
    if slot.slot in active:
        raise ValueError(f"{slot} is active already; only a vacant slot can heal")
    return _with_replica_active(layout, slot.replica, tuple(sorted((*active, slot.slot))))


def _with_replica_active(
    layout: ParallelLayout, number: int, active: tuple[int, ...]
) -> ParallelLayout:
    return replace(
        layout,
        replicas=tuple(
            with_active(replica, active) if replica.replica == number else replica
            for replica in layout.replicas
        ),
    )


def with_active(replica: ReplicaLayout, active: tuple[int, ...]) -> ReplicaLayout:
    """The replica with exactly the slots `active` (ascending), balanced, moving least.

    Returns `replica` itself if those are its slots. Raises ValueError for no slot, a repeated or
    unsorted one, or one outside 0..tp_base-1.
    """
    if active == replica.active:
        return replica
    base = replica.shards.tp_base
    if not active or list(active) != sorted(set(active) & set(range(base))):
        raise ValueError(
            f"active slots {active} of replica {replica.replica} must be ascending and one or more "
            f"of 0..{base - 1}"
        )
    axes = tuple(_rebalance(shards, active) for shards in replica.shards.axes)
    return ReplicaLayout(replica.replica, active, ShardMap(base, axes))


def _rebalance(shards: AxisShards, active: tuple[int, ...]) -> AxisShards:
    """Give every active slot its home, and the orphans to where they are or are missing."""
    vacant = sorted(set(range(len(shards.home))) - set(active))
    orphans = tuple(shards.home[slot] for slot in vacant)
    # The orphans that are in place already. No slot's own home is one: look at the rest only.
    present = {
        slot: merged(common(shards.owned[slot][1:], orphans))
        for slot in active
        if len(shards.owned[slot]) > 1
    }
    share, bigger = divmod(shards.atoms, len(active))
    missing = {slot: share - len(shards.home[slot]) for slot in active}
    for slot, ranges in present.items():
        missing[slot] -= sum(map(len, ranges))
    # Some slots must own one atom more than the even share. It goes first to slots that have
    # more than the share already, at home or adopted, and so keep an atom; then to the lowest.
    # No home is cut by this: homes differ by at most one atom, so if one exceeds the share then
    # all reach it, and there is an atom to give for every slot of the first kind.
    rich = [slot for slot in active if missing[slot] < 0]
    for slot in (*rich, *(slot for slot in active if missing[slot] >= 0))[:bigger]:
        missing[slot] += 1

    kept = {slot: ranges for slot, ranges in present.items() if ranges}
    for slot, ranges in kept.items():
        surplus = -missing[slot]
        if surplus > 0:
            kept[slot] = take(ranges, sum(map(len, ranges)) - surplus)[0]
            missing[slot] = 0
    assert min(missing.values()) >= 0, f"a home exceeds its even share: {shards}, {active}"

    stay = [atoms for ranges in kept.values() for atoms in ranges]
    pool = [atoms for orphan in orphans for atoms in subtract(orphan, stay)]
    owned: list[tuple[Range, ...]] = [()] * len(shards.home)
    for slot, gained in zip(active, deal(pool, missing.values()), strict=True):
        held = kept.get(slot, ())
        ranges = (shards.home[slot], *(merged((*held, *gained)) if held else gained))
        # An unchanged slot keeps its tuple, so that whoever compares layouts sees it at once.
        owned[slot] = shards.owned[slot] if ranges == shards.owned[slot] else ranges
    return replace(shards, owned=tuple(owned))
