"""Layout -> how replicas at different degrees sum their gradients.

Theory of operation. Replicas agree on homes, so the ranks of slot h in the replicas where h is
active (the *members*) hold the same atoms ``A_h`` and all-reduce them directly. Where h is vacant,
the replica is a *leaf* of h: the slots that adopted pieces of ``A_h`` send those gradients to a
*proxy* before the all-reduce; the proxy adds them to its own, and afterwards sends the sum back on
the same path. Proxies are members, and pieces are cut so that members carry evenly many atoms.

If h is vacant in every replica there are no members. Then ``A_h`` is cut wherever any replica's
ownership changes, so that each part has one holder per replica; one replica's holder is the proxy
of the part and the other replicas' holders are its leaves. Which replica that is, is spread too.

The order of addition is part of the plan: a proxy adds its pieces in replica order, so that a rerun
of the step gives the same bits. `check_sync` proves a plan against its layout.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from ntp.atoms import Axis
from ntp.geometry import AxisShards, ParallelLayout, Range, SlotRef, merged
from ntp.reshard_plan import even_shares, owned_by


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


def _order(piece: LeafPiece) -> tuple[int, str, int, SlotRef]:
    return piece.home, piece.axis, piece.atoms.start, piece.holder


@dataclass(frozen=True, slots=True)
class HomeSync:
    """Gradient sync of one home slot's atoms.

    `members`: the slot in each replica where it is active, by replica; they all-reduce. `pieces`:
    ordered by (axis, start, holder). Raises ValueError if the order is another.
    """

    home: int
    members: tuple[SlotRef, ...]
    pieces: tuple[LeafPiece, ...]

    def __post_init__(self) -> None:
        keys = [_order(piece) for piece in self.pieces]
        if keys != sorted(set(keys)) or list(self.members) != sorted(set(self.members)):
            raise ValueError(f"members and pieces of home {self.home} must be sorted and distinct")
        if any(piece.home != self.home for piece in self.pieces):
            raise ValueError(f"home {self.home} lists pieces of another home")


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """One HomeSync per home slot, in slot order. Raises ValueError if one is missing."""

    homes: tuple[HomeSync, ...]

    def __post_init__(self) -> None:
        if [sync.home for sync in self.homes] != list(range(len(self.homes))):
            raise ValueError("a sync plan has one entry for each home slot, in slot order")


def plan_sync(layout: ParallelLayout) -> SyncPlan:
    """The gradient sync of `layout`. The same layout always gives the same plan."""
    # Atoms each slot handles as a proxy. Counted per axis, as atoms of two axes differ in size.
    loads: Counter[tuple[Axis, SlotRef]] = Counter()
    homes: list[HomeSync] = []
    for home in range(layout.tp_base):
        members = _members(layout, home)
        pieces: list[LeafPiece] = []
        for axis in Axis:
            if members:
                pieces += _through_members(layout, home, axis, members, loads)
            else:
                pieces += _without_members(layout, home, axis, loads)
        homes.append(HomeSync(home, members, tuple(sorted(pieces, key=_order))))
    plan = SyncPlan(tuple(homes))
    check_sync(plan, layout)
    return plan


def _members(layout: ParallelLayout, home: int) -> tuple[SlotRef, ...]:
    return tuple(
        SlotRef(replica.replica, home) for replica in layout.replicas if home in replica.active
    )


def _shards(layout: ParallelLayout, axis: Axis) -> list[tuple[int, AxisShards]]:
    return [(replica.replica, replica.shards.axis(axis)) for replica in layout.replicas]


def _split(
    atoms: Range, axis: Axis, proxies: tuple[SlotRef, ...], loads: Counter[tuple[Axis, SlotRef]]
) -> list[tuple[Range, SlotRef]]:
    """Cut `atoms` into one run per proxy (or none), so that their loads, updated here, level."""
    shares = even_shares(len(atoms), 1, [loads[axis, proxy] for proxy in proxies])
    runs: list[tuple[Range, SlotRef]] = []
    start = atoms.start
    for proxy, share in zip(proxies, shares, strict=True):
        if share:
            runs.append((Range(start, start + share), proxy))
            loads[axis, proxy] += share
            start += share
    return runs


def _through_members(
    layout: ParallelLayout,
    home: int,
    axis: Axis,
    members: tuple[SlotRef, ...],
    loads: Counter[tuple[Axis, SlotRef]],
) -> list[LeafPiece]:
    inside = {member.replica for member in members}
    return [
        LeafPiece(home, axis, run, SlotRef(replica, slot), proxy)
        for replica, shards in _shards(layout, axis)
        if replica not in inside
        for slot, atoms in shards.holders(shards.home[home])
        for run, proxy in _split(atoms, axis, members, loads)
    ]


def _without_members(
    layout: ParallelLayout, home: int, axis: Axis, loads: Counter[tuple[Axis, SlotRef]]
) -> list[LeafPiece]:
    everyone = _shards(layout, axis)
    whole = everyone[0][1].home[home]
    bounds = {atoms.start for _, shards in everyone for _, atoms in shards.holders(whole)}
    edges = [*sorted(bounds), whole.stop]
    pieces: list[LeafPiece] = []
    for start, stop in pairwise(edges):
        part = Range(start, stop)
        # No bound lies inside the part, so each replica has it in one place.
        refs = tuple(SlotRef(replica, shards.holders(part)[0][0]) for replica, shards in everyone)
        for run, proxy in _split(part, axis, refs, loads):
            pieces += [LeafPiece(home, axis, run, ref, proxy) for ref in refs if ref != proxy]
    return pieces


def check_sync(plan: SyncPlan, layout: ParallelLayout) -> None:
    """Raises ValueError unless the plan sums the gradients of `layout`.

    That is: every atom of every replica reaches the sum exactly once, by its member or as a piece,
    and so comes back exactly once; holders and proxies own what they exchange, in one range.
    """
    if len(plan.homes) != layout.tp_base:
        raise ValueError(f"{len(plan.homes)} homes do not fit {layout.tp_base} slots; plan again")
    for sync in plan.homes:
        if sync.members != _members(layout, sync.home):
            raise ValueError(
                f"members {sync.members} of home {sync.home} are not its active slots; plan again"
            )
        for piece in sync.pieces:
            if sync.members and piece.proxy not in sync.members:
                raise ValueError(f"{piece}: its proxy is not in the all-reduce; plan again")
            for end in (piece.holder, piece.proxy):
                if not any(own.contains(piece.atoms) for own in owned_by(layout, piece.axis, end)):
                    raise ValueError(
                        f"{piece}: its atoms are not in one range of {end}; plan again"
                    )
        for axis in Axis:
            _check_coverage(sync, axis, layout)


def _check_coverage(sync: HomeSync, axis: Axis, layout: ParallelLayout) -> None:
    """Each replica gives each atom of the home once: as a member, a leaf or a sole proxy."""
    everyone = _shards(layout, axis)
    home = everyone[0][1].home[sync.home]
    pieces = [piece for piece in sync.pieces if piece.axis is axis]
    inside = {member.replica for member in sync.members}
    if not inside and len(everyone) == 1 and not pieces:
        return  # A lone replica has nothing to exchange.
    # Without members the sum of an atom is formed at its proxy. There must be exactly one such
    # place, and the proxy's replica gives its own gradient there, without a piece.
    summed = set() if inside else {(piece.atoms, piece.proxy.replica) for piece in pieces}
    if not inside and merged(atoms for atoms, _ in summed) != (home,):
        raise ValueError(
            f"{axis} {home} of home {sync.home} does not have one proxy per atom; plan again"
        )
    for replica, _ in everyone:
        given = [piece.atoms for piece in pieces if piece.holder.replica == replica]
        given += [atoms for atoms, proxy in summed if proxy == replica]
        given += [home] if replica in inside else []
        if merged(given) != (home,):
            raise ValueError(
                f"replica {replica} gives {axis} {sorted(given)} of home {sync.home} to the sum, "
                f"which needs {home} once; plan again"
            )
