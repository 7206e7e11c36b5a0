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

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ntp.atoms import AtomCounts, Axis


@dataclass(frozen=True, slots=True, order=True)
class SlotRef:
    """A tensor-parallel slot of one replica. Ordered by replica, then slot."""

    replica: int
    slot: int


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Atoms start..stop-1 of an axis. Never empty. Raises ValueError if it would be."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"range {self.start}..{self.stop} is empty or negative; leave it out")

    def __len__(self) -> int:
        return self.stop - self.start

    def contains(self, other: Range) -> bool:
        """Whether every atom of `other` is in this range."""
        return self.start <= other.start and other.stop <= self.stop


def intersect(first: Range, second: Range) -> Range | None:
    """The atoms in both ranges, None if there are none."""
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    return Range(start, stop) if start < stop else None


def subtract(minuend: Range, taken: Iterable[Range]) -> tuple[Range, ...]:
    """The atoms of `minuend` that are in no range of `taken`, ascending."""
    rest: list[Range] = []
    start = minuend.start
    for hole in sorted(taken):
        if start < min(hole.start, minuend.stop):
            rest.append(Range(start, min(hole.start, minuend.stop)))
        start = max(start, hole.stop)
    if start < minuend.stop:
        rest.append(Range(start, minuend.stop))
    return tuple(rest)


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Disjoint `ranges`, ascending, those that touch joined."""
    result: list[Range] = []
    for piece in sorted(ranges):
        if result and result[-1].stop == piece.start:
            piece = Range(result.pop().start, piece.stop)
        result.append(piece)
    return tuple(result)


def take(ranges: tuple[Range, ...], atoms: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Split `ranges` into their first `atoms` atoms (fewer if there are fewer) and the rest."""
    for index, piece in enumerate(ranges):
        if atoms < len(piece):
            cut = piece.start + atoms
            head = (Range(piece.start, cut),) if atoms else ()
            return (*ranges[:index], *head), (
                Range(cut, piece.stop),
                *ranges[index + 1 :],
            )
        atoms -= len(piece)
    return ranges, ()


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
        whole = (Range(0, self.home[-1].stop),)
        if merged(self.home) != whole or tuple(sorted(self.home)) != self.home:
            raise ValueError(f"{self.axis}: homes {self.home} must be contiguous from atom 0")
        for slot, pieces in enumerate(self.owned):
            if pieces and (pieces[0] != self.home[slot] or merged(pieces[1:]) != pieces[1:]):
                raise ValueError(
                    f"{self.axis}: slot {slot} owns {pieces}; its home {self.home[slot]} must come "
                    "first, then adopted ranges, ascending and merged"
                )
        # Every active slot owns its home, so an overlap shows as a range that cannot be merged.
        if merged(piece for pieces in self.owned for piece in pieces) != whole:
            raise ValueError(f"{self.axis}: {self.owned} must own atoms {whole[0]} once each")

    @property
    def atoms(self) -> int:
        """Number of atoms on the axis."""
        return self.home[-1].stop

    def holders(self, within: Range) -> tuple[tuple[int, Range], ...]:
        """(slot, range) pieces that make up `within`, ascending; each inside one owned range."""
        found = [
            (slot, common)
            for slot, pieces in enumerate(self.owned)
            for piece in pieces
            if (common := intersect(piece, within)) is not None
        ]
        return tuple(sorted(found, key=lambda entry: entry[1]))


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Ownership of all atoms of one replica. Raises ValueError if its axes disagree."""

    tp_base: int
    axes: tuple[AxisShards, ...]

    def __post_init__(self) -> None:
        if tuple(shards.axis for shards in self.axes) != tuple(Axis):
            raise ValueError(f"a shard map has each axis once, in the order {tuple(Axis)}")
        for shards in self.axes:
            if len(shards.home) != self.tp_base:
                raise ValueError(
                    f"{shards.axis} has {len(shards.home)} slots but tp_base is {self.tp_base}"
                )

    def axis(self, axis: Axis) -> AxisShards:
        """Ownership on one axis."""
        return next(shards for shards in self.axes if shards.axis is axis)

    def owned(self, axis: Axis, slot: int) -> tuple[Range, ...]:
        """Ranges of `slot` in storage order; () if it is vacant."""
        return self.axis(axis).owned[slot]

    def local_atoms(self, axis: Axis, slot: int) -> int:
        """Number of atoms `slot` owns; 0 if it is vacant."""
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
        homes = {tuple(axis.home for axis in replica.shards.axes) for replica in self.replicas}
        if len(homes) > 1 or self.replicas[0].shards.tp_base != self.tp_base:
            raise ValueError(
                f"all replicas must have the same home ranges for tp_base {self.tp_base}"
            )

    def replica(self, number: int) -> ReplicaLayout:
        """Layout of replica `number`. Raises ValueError if it takes no part."""
        for replica in self.replicas:
            if replica.replica == number:
                return replica
        raise ValueError(
            f"no replica {number}; there are {[replica.replica for replica in self.replicas]}"
        )

    def slots(self) -> tuple[SlotRef, ...]:
        """Active slots in order of replica and slot; the position is the rank in the world."""
        return tuple(
            SlotRef(replica.replica, slot) for replica in self.replicas for slot in replica.active
        )


def full_layout(counts: AtomCounts, tp_base: int, replicas: int) -> ParallelLayout:
    """Every slot of `replicas` replicas active, each owning its home.

    Homes are contiguous and differ by at most one atom, the bigger ones first. Raises ValueError
    if an axis has fewer atoms than slots, or there is no slot or replica.
    """
    if tp_base < 1 or replicas < 1:
        raise ValueError(f"tp_base {tp_base} and replicas {replicas} must both be at least 1")
    axes: list[AxisShards] = []
    for axis in Axis:
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

    Raises ValueError for no slot, a repeated or unsorted one, or one outside 0..tp_base-1.
    """
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
    orphans = tuple(home for slot, home in enumerate(shards.home) if slot not in active)
    present = {
        slot: merged(
            common
            for piece in shards.owned[slot]
            for orphan in orphans
            if (common := intersect(piece, orphan)) is not None
        )
        for slot in active
    }
    # Some slots must own one atom more than the even share. It goes first to slots that have
    # more than the share already, at home or adopted, and so keep an atom; then to the lowest.
    # No home is cut by this: homes differ by at most one atom, so if one exceeds the share then
    # all reach it, and there is an atom to give for every slot of the first kind.
    share, bigger = divmod(shards.atoms, len(active))

    def claim(slot: int) -> tuple[bool, int]:
        holds = len(shards.home[slot]) + sum(len(piece) for piece in present[slot])
        return holds <= share, slot

    favoured = set(sorted(active, key=claim)[:bigger])
    wanted = {slot: share + (slot in favoured) - len(shards.home[slot]) for slot in active}
    assert min(wanted.values()) >= 0, f"a home exceeds its even share: {shards}, {active}"

    kept = {slot: take(present[slot], wanted[slot])[0] for slot in active}
    stay = [piece for pieces in kept.values() for piece in pieces]
    pool = tuple(piece for orphan in orphans for piece in subtract(orphan, stay))
    owned: list[tuple[Range, ...]] = []
    for slot, home in enumerate(shards.home):
        if slot not in active:
            owned.append(())
            continue
        missing = wanted[slot] - sum(len(piece) for piece in kept[slot])
        gained, pool = take(pool, missing)
        owned.append((home, *merged((*kept[slot], *gained))))
    assert not pool, f"orphans {pool} left over: {shards}, {active}"
    return replace(shards, owned=tuple(owned))
