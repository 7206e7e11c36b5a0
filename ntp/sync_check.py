"""Proof that a sync plan sums the gradients of its layout.

That is: each replica's gradient of each atom reaches the sum exactly once (by a member of the
all-reduce, as a piece that a proxy adds, or as the proxy's own) and every holder gets that sum.
The proof expands what every slot exchanges, so its cost grows with the number of slots: a check
for tests, and for layouts of a few hundred slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ntp.atoms import Axis
from ntp.geometry import ParallelLayout, SlotRef
from ntp.ranges import Range, merged
from ntp.sync_exchange import LeafPiece, SlotExchange, exchange_of, piece_order
from ntp.sync_plan import HomeSync, SyncPlan


def check_sync(plan: SyncPlan, layout: ParallelLayout, turn: int = 0) -> None:
    """Raises ValueError unless the plan, in this turn, sums the gradients of `layout`."""
    _check_roles(plan, layout)
    exchanges = {slot: exchange_of(plan, layout, slot, turn) for slot in layout.slots()}
    check_exchanges(exchanges, plan, layout)


def check_exchanges(
    exchanges: Mapping[SlotRef, SlotExchange], plan: SyncPlan, layout: ParallelLayout
) -> None:
    """Raises ValueError unless these exchanges complete the all-reduces of `plan` to a full sync.

    Every slot has one entry; both ends of a piece list it; holder and proxy own its atoms in one
    range; and each atom of each replica is summed once.
    """
    if set(exchanges) != set(layout.slots()):
        raise ValueError("exchanges must be given for exactly the slots of the layout; plan again")
    pieces: dict[tuple[int, Axis], list[LeafPiece]] = defaultdict(list)
    for slot, exchange in exchanges.items():
        _check_list(exchange.held, [piece.holder for piece in exchange.held], slot)
        _check_list(exchange.proxied, [piece.proxy for piece in exchange.proxied], slot)
        for piece in exchange.held:
            _check_ends(piece, plan, layout)
            pieces[piece.home, piece.axis].append(piece)
    sent = {piece for exchange in exchanges.values() for piece in exchange.held}
    expected = {piece for exchange in exchanges.values() for piece in exchange.proxied}
    if odd := sent ^ expected:
        raise ValueError(f"only one end knows of {min(odd, key=piece_order)}; plan again")
    for axis, homes in layout.homes:
        for sync, home in zip(plan.homes, homes, strict=True):
            _check_sums(sync, axis, home, pieces[sync.home, axis], layout)


def _check_roles(plan: SyncPlan, layout: ParallelLayout) -> None:
    if len(plan.homes) != layout.tp_base:
        raise ValueError(f"{len(plan.homes)} homes do not fit {layout.tp_base} slots; plan again")
    everyone = [replica.replica for replica in layout.replicas]
    for sync in plan.homes:
        inside = [member.replica for member in sync.members]
        if sorted([*inside, *sync.leaves]) != everyone:
            raise ValueError(
                f"members {inside} and leaves {sync.leaves} of home {sync.home} are not the "
                f"replicas {everyone}; plan again"
            )
        if vacant := [n for n in inside if sync.home not in layout.replica(n).active]:
            raise ValueError(f"home {sync.home} is vacant in members {vacant}; plan again")


def _check_list(pieces: Sequence[LeafPiece], ends: Sequence[SlotRef], slot: SlotRef) -> None:
    if any(end != slot for end in ends):
        raise ValueError(f"{slot} lists a piece of another slot; plan again")
    if any(piece_order(one) >= piece_order(next_) for one, next_ in pairwise(pieces)):
        raise ValueError(f"the pieces of {slot} are not sorted and distinct; plan again")


def _check_ends(piece: LeafPiece, plan: SyncPlan, layout: ParallelLayout) -> None:
    for end in (piece.holder, piece.proxy):
        owned = layout.replica(end.replica).shards.owned(piece.axis, end.slot)
        if not any(own.contains(piece.atoms) for own in owned):
            raise ValueError(f"{piece}: its atoms are not in one range of {end}; plan again")
    members = plan.homes[piece.home].members
    if members and piece.proxy not in members:
        raise ValueError(f"{piece}: its proxy is not in the all-reduce; plan again")


def _check_sums(
    sync: HomeSync, axis: Axis, home: Range, pieces: Sequence[LeafPiece], layout: ParallelLayout
) -> None:
    """Each replica gives each atom of the home once, and to the one place where it is summed."""
    given: dict[int, list[Range]] = defaultdict(list)
    for piece in pieces:
        given[piece.holder.replica].append(piece.atoms)
    for member in sync.members:
        given[member.replica].append(home)
    if not sync.members and len(layout.replicas) > 1:
        # The sum of an atom is formed at its proxy, which gives its own gradient without a piece.
        places = {(piece.atoms, piece.proxy) for piece in pieces}
        if merged(atoms for atoms, _ in places) != (home,):
            raise ValueError(
                f"{axis} {home} of home {sync.home} does not have one proxy per atom; plan again"
            )
        for atoms, proxy in places:
            given[proxy.replica].append(atoms)
    elif not sync.members:
        return  # A lone replica has nothing to exchange.
    for replica in layout.replicas:
        if merged(given[replica.replica]) != (home,):
            raise ValueError(
                f"replica {replica.replica} gives {axis} {sorted(given[replica.replica])} of home "
                f"{sync.home} to the sum, which needs {home} once; plan again"
            )
