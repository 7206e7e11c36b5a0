"""Exchanges run on integer gradients: every slot must end with the dense sum of its atoms."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import atom_counts, atoms_of, axes, full_layouts, some_of

from ntp.atoms import AtomCounts, Axis
from ntp.geometry import (
    ParallelLayout,
    Range,
    ReplicaLayout,
    SlotRef,
    full_layout,
    vacate,
    with_active,
)
from ntp.sync_check import check_exchanges, check_sync
from ntp.sync_exchange import LeafPiece, SlotExchange, exchange_of, piece_order
from ntp.sync_plan import HomeSync, SyncPlan, plan_sync

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
Local = dict[tuple[SlotRef, Axis], list[int]]
Exchanges = dict[SlotRef, SlotExchange]


@st.composite
def up_to_five(draw: st.DrawFn) -> ParallelLayout:
    """Up to five replicas (numbers with gaps) of independent degrees."""
    base = draw(st.integers(1, 6))
    full = full_layout(draw(atom_counts(base, most=40)), base, 7)
    return draw(some_of(replace(full, replicas=draw(st.permutations(full.replicas).map(five)))))


def five(replicas: Sequence[ReplicaLayout]) -> tuple[ReplicaLayout, ...]:
    return tuple(sorted(replicas[:5], key=lambda replica: replica.replica))


def gradient(replica: int, axis: Axis, atom: int) -> int:
    """One byte per replica, so that a count that is off by one shows; and another per atom."""
    return (1 << (8 * replica + 20)) + (atom + 1) * len(axis)


def gradients(layout: ParallelLayout, of: tuple[int, ...] | None = None) -> Local:
    """Each slot's own gradients in storage order, or sums over the replicas `of`."""
    return {
        (SlotRef(replica.replica, slot), axis): [
            sum(gradient(number, axis, atom) for number in of or (replica.replica,))
            for atom in atoms_of(replica, axis, slot)
        ]
        for replica in layout.replicas
        for slot in replica.active
        for axis in axes(layout)
    }


def expand(plan: SyncPlan, layout: ParallelLayout, turn: int = 0) -> Exchanges:
    return {slot: exchange_of(plan, layout, slot, turn) for slot in layout.slots()}


def carry_out(plan: SyncPlan, layout: ParallelLayout, turn: int) -> Local:
    """Each slot acts on what it derives itself: send, add, all-reduce, send back."""
    local = gradients(layout)

    def place(slot: SlotRef, axis: Axis, atoms: Range) -> tuple[list[int], slice]:
        offset = layout.replica(slot.replica).shards.offset_of(axis, slot.slot, atoms)
        return local[slot, axis], slice(offset, offset + len(atoms))

    mail: dict[tuple[SlotRef, SlotRef, LeafPiece], list[int]] = {}
    for slot in layout.slots():
        for piece in exchange_of(plan, layout, slot, turn).held:
            buffer, spot = place(slot, piece.axis, piece.atoms)
            mail[slot, piece.proxy, piece] = buffer[spot]
    for slot in layout.slots():
        for piece in exchange_of(plan, layout, slot, turn).proxied:
            buffer, spot = place(slot, piece.axis, piece.atoms)
            sent = mail.pop((piece.holder, slot, piece))
            buffer[spot] = [a + b for a, b in zip(buffer[spot], sent, strict=True)]
    assert not mail
    for sync in plan.homes:
        for axis, homes in layout.homes:
            spots = [place(ref, axis, homes[sync.home]) for ref in sync.members]
            total = [sum(column) for column in zip(*(b[s] for b, s in spots), strict=True)]
            for buffer, spot in spots:
                buffer[spot] = total
    for slot in layout.slots():
        for piece in exchange_of(plan, layout, slot, turn).proxied:
            buffer, spot = place(slot, piece.axis, piece.atoms)
            mail[slot, piece.holder, piece] = buffer[spot]
    for slot in layout.slots():
        for piece in exchange_of(plan, layout, slot, turn).held:
            buffer, spot = place(slot, piece.axis, piece.atoms)
            buffer[spot] = mail.pop((piece.proxy, slot, piece))
    assert not mail
    return local


@PROPERTY
@given(up_to_five(), st.integers(0, 50))
def test_every_slot_gets_the_dense_sum(layout: ParallelLayout, turn: int) -> None:
    plan = plan_sync(layout)
    everyone = tuple(replica.replica for replica in layout.replicas)
    assert carry_out(plan, layout, turn) == gradients(layout, everyone)


@PROPERTY
@given(up_to_five(), st.data())
def test_so_it_does_whoever_is_a_member(layout: ParallelLayout, data: st.DataObject) -> None:
    homes = []
    for home in range(layout.tp_base):
        having = [r.replica for r in layout.replicas if home in r.active]
        inside = data.draw(st.sets(st.sampled_from(having))) if having else set()
        members = tuple(SlotRef(number, home) for number in sorted(inside))
        others = (r.replica for r in layout.replicas if r.replica not in inside)
        homes.append(HomeSync(home, members, tuple(others)))
    plan = SyncPlan(tuple(homes))
    everyone = tuple(replica.replica for replica in layout.replicas)
    assert carry_out(plan, layout, 0) == gradients(layout, everyone)
    check_sync(plan, layout)


@PROPERTY
@given(st.data())
def test_both_ends_agree_in_one_order(data: st.DataObject) -> None:
    layout = data.draw(some_of(data.draw(full_layouts())))
    plan = plan_sync(layout)
    exchanges = expand(plan, layout, data.draw(st.integers(0, 9)))
    check_exchanges(exchanges, plan, layout)
    for slot, exchange in exchanges.items():
        for pieces in (exchange.held, exchange.proxied):
            assert list(pieces) == sorted(pieces, key=piece_order)
        for peer, other in exchanges.items():
            here = [piece for piece in exchange.held if piece.proxy == peer]
            assert here == [piece for piece in other.proxied if piece.holder == slot]


@PROPERTY
@given(st.data(), st.integers(0, 9))
def test_members_carry_evenly(data: st.DataObject, turn: int) -> None:
    layout = data.draw(some_of(data.draw(full_layouts())))
    plan = plan_sync(layout)
    exchanges = expand(plan, layout, turn)
    for axis, homes in layout.homes:
        for sync, home in zip(plan.homes, homes, strict=True):
            if not sync.members:
                continue
            proxied = {
                member: [
                    p for p in exchanges[member].proxied if (p.home, p.axis) == (sync.home, axis)
                ]
                for member in sync.members
            }
            loads = [sum(len(piece.atoms) for piece in pieces) for pieces in proxied.values()]
            assert sum(loads) == len(sync.leaves) * len(home)
            assert max(loads) - min(loads) <= 1
            owners = sum(
                len(layout.replica(leaf).shards.axis(axis).holders(home)) for leaf in sync.leaves
            )
            assert sum(map(len, proxied.values())) < owners + len(sync.members)


def test_direct_holders_carry_what_they_hold() -> None:
    layout = full_layout(AtomCounts(8, 640, 808), 4, 3)
    for replica in range(3):
        layout = vacate(layout, SlotRef(replica, 2))
    plan = plan_sync(layout)
    assert plan.homes[2].members == ()
    exchanges = expand(plan, layout)
    for axis in (Axis.MLP_COLUMN, Axis.VOCAB_ROW):
        home = dict(layout.homes)[axis][2]
        proxied: Counter[int] = Counter()
        for slot, exchange in exchanges.items():
            mine = [p for p in exchange.proxied if p.axis is axis and p.home == 2]
            carried = {p.atoms for p in mine}
            proxied[slot.replica] += sum(map(len, carried))
            # An even third of its own part, which both other replicas send.
            part = sum(len(r) for r in layout.replicas[0].shards.owned(axis, slot.slot)[1:])
            assert abs(sum(map(len, carried)) - part / 3) < 1
            assert len(mine) == 2 * len(carried)
        assert sum(proxied.values()) == len(home)


def test_direct_holders_of_few_atoms_share_them_out() -> None:
    # Three slots of each replica hold one KV group each of the home that nobody has.
    layout = full_layout(AtomCounts(12, 120, 120), 4, 3)
    for replica in range(3):
        layout = vacate(layout, SlotRef(replica, 2))
    pieces = [
        piece
        for exchange in expand(plan_sync(layout), layout).values()
        for piece in exchange.proxied
        if piece.axis is Axis.KV_GROUP
    ]
    assert Counter(piece.proxy.replica for piece in pieces) == {0: 2, 1: 2, 2: 2}


def test_few_atoms_go_round() -> None:
    # Home 3 has one KV group and one expert; in eight turns each of four members has each twice.
    layout = vacate(full_layout(AtomCounts(4, 40, 44, 4), 4, 5), SlotRef(1, 3))
    plan = plan_sync(layout)
    members = plan.homes[3].members
    assert len(members) == 4
    groups: Counter[SlotRef] = Counter()
    experts: Counter[SlotRef] = Counter()
    for turn in range(8):
        for piece in (p for ref in members for p in exchange_of(plan, layout, ref, turn).proxied):
            groups[piece.proxy] += piece.axis is Axis.KV_GROUP
            experts[piece.proxy] += piece.axis is Axis.EXPERT
    assert set(groups.values()) == {2} == set(experts.values())
    first = exchange_of(plan, layout, SlotRef(1, 0)).held
    coarse = [piece.proxy for piece in first if piece.axis in (Axis.KV_GROUP, Axis.EXPERT)]
    assert len(set(coarse)) == len(coarse)


def uneven() -> ParallelLayout:
    """Degrees 4, 3, 2, 2; slot 3 is vacant in one replica and slot 1 in two."""
    full = full_layout(AtomCounts(8, 30, 41, 9), 4, 4)
    active = ((0, 1, 2, 3), (0, 1, 2), (0, 2), (2, 3))
    return ParallelLayout(4, tuple(map(with_active, full.replicas, active)))


def leafy() -> ParallelLayout:
    """Slot 3 is vacant in all four replicas, which differ otherwise."""
    full = full_layout(AtomCounts(8, 30, 41, 9), 4, 4)
    active = ((0, 1, 2), (0, 1), (1, 2), (0,))
    return ParallelLayout(4, tuple(map(with_active, full.replicas, active)))


LAYOUTS = pytest.mark.parametrize("layout", [uneven(), leafy()], ids=["uneven", "leafy"])


def without(exchanges: Exchanges, *pieces: LeafPiece) -> Exchanges:
    return {
        slot: SlotExchange(
            tuple(piece for piece in exchange.held if piece not in pieces),
            tuple(piece for piece in exchange.proxied if piece not in pieces),
        )
        for slot, exchange in exchanges.items()
    }


def added(exchanges: Exchanges, *pieces: LeafPiece) -> Exchanges:
    result = dict(exchanges)
    for piece in pieces:
        for end, side in ((piece.holder, "held"), (piece.proxy, "proxied")):
            pieces_there = sorted((*getattr(result[end], side), piece), key=piece_order)
            result[end] = replace(result[end], **{side: tuple(pieces_there)})
    return result


def instead(exchanges: Exchanges, piece: LeafPiece, **changes: object) -> Exchanges:
    """Both ends have `piece` with these changes."""
    return added(without(exchanges, piece), replace(piece, **changes))


def faults(exchanges: Exchanges, layout: ParallelLayout) -> Iterator[tuple[str, Exchanges]]:
    pieces = [piece for exchange in exchanges.values() for piece in exchange.held]
    slots = layout.slots()
    for piece in pieces:
        yield "a skipped piece", without(exchanges, piece)
        yield "counted twice", added(exchanges, piece)
        moved = Range(piece.atoms.start + 1, piece.atoms.stop + 1)
        yield "shifted by an atom", instead(exchanges, piece, atoms=moved)
        if len(piece.atoms) > 1:
            less = Range(piece.atoms.start, piece.atoms.stop - 1)
            yield "an atom short", instead(exchanges, piece, atoms=less)
        for other in slots:
            if other.replica != piece.proxy.replica and other != piece.holder:
                yield "a wrong holder", instead(exchanges, piece, holder=other)
            if other.slot != piece.proxy.slot and other.replica != piece.holder.replica:
                yield "a wrong proxy", instead(exchanges, piece, proxy=other)
        for end, side in ((piece.holder, "held"), (piece.proxy, "proxied")):
            rest = tuple(p for p in getattr(exchanges[end], side) if p != piece)
            one_end = {**exchanges, end: replace(exchanges[end], **{side: rest})}
            yield f"only one end knows ({side})", one_end
            other = next(slot for slot in slots if slot != end)
            theirs = sorted((*getattr(exchanges[other], side), piece), key=piece_order)
            elsewhere = replace(exchanges[other], **{side: tuple(theirs)})
            yield f"in the list of another slot ({side})", {**one_end, other: elsewhere}
    for first, second in combinations(pieces, 2):
        ends = [(piece.holder, piece.proxy) for piece in (first, second)]
        alike = (first.home, first.axis) == (second.home, second.axis)
        if alike and ends[0] != ends[1] and first.atoms != second.atoms:
            swapped = dict(exchanges)
            for piece, atoms in ((first, second.atoms), (second, first.atoms)):
                rest = (other for other in swapped[piece.holder].held if other != piece)
                held = sorted((*rest, replace(piece, atoms=atoms)), key=piece_order)
                swapped[piece.holder] = replace(swapped[piece.holder], held=tuple(held))
            yield "swapped pieces", swapped
    for slot, exchange in exchanges.items():
        for side in ("held", "proxied"):
            listed = getattr(exchange, side)
            if len(listed) > 1:
                turned = (listed[1], listed[0], *listed[2:])
                yield "another order", {**exchanges, slot: replace(exchange, **{side: turned})}
    yield "a slot forgotten", {slot: exchanges[slot] for slot in slots[1:]}


@LAYOUTS
def test_planted_faults_are_found(layout: ParallelLayout) -> None:
    plan = plan_sync(layout)
    exchanges = expand(plan, layout)
    check_exchanges(exchanges, plan, layout)
    planted: Counter[str] = Counter()
    for fault, broken in faults(exchanges, layout):
        planted[fault] += 1
        with pytest.raises(ValueError, match="plan again"):
            check_exchanges(broken, plan, layout)
    assert len(planted) == 13, planted
    assert planted.total() > 100


def test_a_proxy_in_another_all_reduce_or_a_second_sum_is_found() -> None:
    # Each replica's atoms of home 1 are given once, but to one of two sums.
    full = full_layout(AtomCounts(2, 2, 2), 2, 4)
    layout = ParallelLayout(2, tuple(with_active(replica, (0,)) for replica in full.replicas))
    plan = plan_sync(layout)
    assert plan.homes[1].members == ()
    pieces = [
        LeafPiece(1, axis, Range(1, 2), SlotRef(holder, 0), SlotRef(proxy, 0))
        for axis in axes(layout)
        for holder, proxy in ((0, 1), (2, 3))
    ]
    nothing = dict.fromkeys(layout.slots(), SlotExchange((), ()))
    with pytest.raises(ValueError, match="one proxy per atom"):
        check_exchanges(added(nothing, *pieces), plan, layout)


@LAYOUTS
def test_wrong_roles_are_found(layout: ParallelLayout) -> None:
    plan = plan_sync(layout)
    sync, leaf = next(
        (sync, leaf)
        for sync in plan.homes
        for leaf in sync.leaves
        if sync.members and sync.home not in layout.replica(leaf).active
    )
    joined = replace(
        sync,
        members=tuple(sorted((*sync.members, SlotRef(leaf, sync.home)))),
        leaves=tuple(other for other in sync.leaves if other != leaf),
    )
    forgotten = replace(sync, leaves=sync.leaves[1:])
    for fault in (joined, forgotten):
        homes = tuple(fault if own is sync else own for own in plan.homes)
        with pytest.raises(ValueError, match="plan again"):
            check_sync(SyncPlan(homes), layout)
    with pytest.raises(ValueError, match="homes do not fit"):
        check_sync(SyncPlan(plan.homes[:-1]), layout)


def test_a_plan_of_another_layout_is_found() -> None:
    with pytest.raises(ValueError, match="plan again"):
        check_sync(plan_sync(uneven()), leafy())


def test_ends_in_one_replica_are_refused() -> None:
    piece = exchange_of(plan_sync(uneven()), uneven(), SlotRef(2, 0)).held[0]
    with pytest.raises(ValueError, match="different replicas"):
        replace(piece, proxy=piece.holder)
    with pytest.raises(ValueError, match="no replica 9"):
        exchange_of(plan_sync(uneven()), uneven(), SlotRef(9, 0))
