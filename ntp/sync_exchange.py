"""What one slot exchanges with slots of other replicas in a gradient sync: pieces of atoms.

Theory of operation. A piece is a range of atoms of one home that its *holder* sends to its *proxy*.
The pieces of a home and axis follow from two divisions of the same atoms, one by holder and one by
proxy: a piece is what one part of either has in common. Each slot cuts only the atoms that concern
it, and because all cut the same atoms at the same bounds, both ends of a piece derive it alike.

- A home with members. The leaves' copies of the home's atoms lie on one line, leaf after leaf. Each
  copy is divided among the slots that own it there; and the line is divided evenly among the
  members. So proxies carry alike, within an atom, and pieces are few: about as many as there are
  holders and members.
- A home without members, reduced directly. Its atoms are divided wherever any replica's ownership
  changes, into parts with one holder per replica; and each part evenly into runs, one per holder,
  which is the proxy of that run: the part's other holders send it there.

Gradients may be exchanged in several *turns* (buckets, as backward completes them). Atoms that do
not divide evenly go to other proxies in each turn, so that after a few turns all have carried
alike, also where atoms are few and large.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ntp.atoms import Axis
from ntp.geometry import ParallelLayout, SlotRef
from ntp.ranges import EvenParts, Range, cut
from ntp.sync_plan import HomeSync, SyncPlan


@dataclass(frozen=True, slots=True)
class LeafPiece:
    """`holder` sends its gradient of `atoms` to `proxy`; the sum comes back the same way.

    The atoms lie inside one owned range at both ends. Raises ValueError for ends in one replica.
    """

    home: int
    axis: Axis
    atoms: Range
    holder: SlotRef
    proxy: SlotRef

    def __post_init__(self) -> None:
        if self.holder.replica == self.proxy.replica:
            raise ValueError(f"{self}: holder and proxy must be in different replicas")


def piece_order(piece: LeafPiece) -> tuple[int, str, int, int, int]:
    """Sort key: home, axis, start, holder. No two pieces of one slot's list are equal in it."""
    holder = piece.holder
    return piece.home, piece.axis, piece.atoms.start, holder.replica, holder.slot


@dataclass(frozen=True, slots=True)
class SlotExchange:
    """The pieces of one slot, each tuple in order of (home, axis, start, holder).

    `held`: the slot sends these to their proxies before the all-reduce and gets the sums back after
    it. `proxied`: other slots send it these, and it adds them, in this order.
    """

    held: tuple[LeafPiece, ...]
    proxied: tuple[LeafPiece, ...]


def exchange_of(
    plan: SyncPlan, layout: ParallelLayout, slot: SlotRef, turn: int = 0
) -> SlotExchange:
    """What `slot` exchanges in `turn` of the sync. Raises ValueError if its replica is not there.

    All slots must use the same turn for the same gradients; any number will do.
    """
    held: list[LeafPiece] = []
    proxied: list[LeafPiece] = []
    shards = layout.replica(slot.replica).shards
    for axis, homes in layout.homes:
        for owned in shards.owned(axis, slot.slot):
            for home, atoms in cut(homes, owned):
                sync = plan.homes[home]
                line = _Line(sync, axis, homes[home], turn)
                if not sync.members:
                    direct = _Direct(home, axis, atoms, layout, turn)
                    held += direct.held(slot)
                    proxied += direct.proxied(slot)
                elif slot in sync.members:
                    proxied += line.proxied(slot, layout)
                else:
                    held += line.held(slot, atoms)
    held.sort(key=piece_order)
    proxied.sort(key=piece_order)
    return SlotExchange(tuple(held), tuple(proxied))


@dataclass(frozen=True, slots=True)
class _Line:
    """The leaves' copies of one home's atoms of one axis, one after another."""

    sync: HomeSync
    axis: Axis
    home: Range
    turn: int

    @property
    def _proxies(self) -> EvenParts:
        copies, members = len(self.sync.leaves), len(self.sync.members)
        # The odd atoms of one axis should not go to the same members as those of another.
        first = list(Axis).index(self.axis) * members // len(Axis)
        return EvenParts(copies * len(self.home), members, self.turn + first)

    def held(self, slot: SlotRef, atoms: Range) -> Iterator[LeafPiece]:
        """The pieces of `atoms`, a range that `slot` of a leaf owns."""
        # Where the first atom of the axis would be on the line, were this copy to begin with it.
        origin = self.sync.leaves.index(slot.replica) * len(self.home) - self.home.start
        proxies = self._proxies
        start = atoms.start
        while start < atoms.stop:
            member = proxies.part_of(origin + start)
            stop = min(atoms.stop, proxies.bound(member + 1) - origin)
            piece = Range(start, stop)
            yield LeafPiece(self.sync.home, self.axis, piece, slot, self.sync.members[member])
            start = stop

    def proxied(self, slot: SlotRef, layout: ParallelLayout) -> Iterator[LeafPiece]:
        """The pieces on the part of the line of `slot`, a member."""
        member = self.sync.members.index(slot)
        start, stop = self._proxies.bound(member), self._proxies.bound(member + 1)
        for index, leaf in enumerate(self.sync.leaves):
            begin = index * len(self.home)
            first, last = max(start, begin), min(stop, begin + len(self.home))
            if first < last:
                offset = self.home.start - begin
                shards = layout.replica(leaf).shards.axis(self.axis)
                for holder, piece in shards.holders(Range(first + offset, last + offset)):
                    yield LeafPiece(self.sync.home, self.axis, piece, SlotRef(leaf, holder), slot)


class _Direct:
    """Atoms of a home without members, which their holders reduce among themselves.

    `atoms` are what one slot owns of the home, in one range.
    """

    def __init__(
        self, home: int, axis: Axis, atoms: Range, layout: ParallelLayout, turn: int
    ) -> None:
        self._home, self._axis, self._turn = home, axis, turn
        self._replicas = [replica.replica for replica in layout.replicas]
        # Replicas of the same shape share one map, which need be read only once.
        known: dict[int, tuple[tuple[int, Range], ...]] = {}
        self._holders: list[tuple[tuple[int, Range], ...]] = []
        for replica in layout.replicas:
            shards = replica.shards.axis(axis)
            if id(shards) not in known:
                known[id(shards)] = shards.holders(atoms)
            self._holders.append(known[id(shards)])
        starts = sorted({piece.start for pieces in known.values() for _, piece in pieces})
        self._parts = [Range(*bounds) for bounds in pairwise([*starts, atoms.stop])]

    def held(self, slot: SlotRef) -> Iterator[LeafPiece]:
        """The runs that `slot` sends to the other holders of the same parts."""
        own = self._replicas.index(slot.replica)
        for part in self._parts:
            runs, start = self._runs(part), 0
            while start < len(part):
                run = runs.part_of(start)
                stop = runs.bound(run + 1)
                if run != own:
                    atoms = Range(part.start + start, part.start + stop)
                    proxy = self._holder(run, part)
                    yield LeafPiece(self._home, self._axis, atoms, slot, proxy)
                start = stop

    def proxied(self, slot: SlotRef) -> Iterator[LeafPiece]:
        """The runs of `slot`, as the other holders send them."""
        own = self._replicas.index(slot.replica)
        for part in self._parts:
            runs = self._runs(part)
            start, stop = runs.bound(own), runs.bound(own + 1)
            if start < stop:
                atoms = Range(part.start + start, part.start + stop)
                for other in range(len(self._replicas)):
                    if other != own:
                        holder = self._holder(other, part)
                        yield LeafPiece(self._home, self._axis, atoms, holder, slot)

    def _runs(self, part: Range) -> EvenParts:
        # Parts may be small. Where one begins decides who gets what does not divide.
        return EvenParts(len(part), len(self._replicas), self._turn + part.start)

    def _holder(self, position: int, part: Range) -> SlotRef:
        pieces = self._holders[position]
        slot, _ = pieces[bisect_right(pieces, part.start, key=_start) - 1]
        return SlotRef(self._replicas[position], slot)


def _start(held: tuple[int, Range]) -> int:
    return held[1].start
