"""Sync plans run on integer gradients: every slot must end with the dense sum of its atoms."""

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp import sync_plan
from ntp.atoms import AtomCounts, Axis
from ntp.geometry import ParallelLayout, Range, SlotRef, full_layout, vacate, with_active
from ntp.sync_plan import HomeSync, LeafPiece, SyncPlan, check_sync, plan_sync

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
Local = dict[tuple[SlotRef, Axis], list[int]]


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    """Replicas (numbers with gaps) that each have some of their slots, degrees independent."""
    base = draw(st.integers(1, 8))
    counts = AtomCounts(*(draw(st.integers(base, 64)) for _ in Axis))
    full = full_layout(counts, base, 7)
    # Half of the time one slot is vacant everywhere, which random sets rarely give.
    allowed = set(range(base)) - (
        {draw(st.integers(0, base - 1))} if draw(st.booleans()) else set()
    )
    some = st.sets(st.sampled_from(sorted(allowed or {0})), min_size=1)
    numbers = sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=4)))
    return ParallelLayout(
        base,
        tuple(with_active(full.replicas[n], tuple(sorted(draw(some)))) for n in numbers),
    )


def gradient(replica: int, axis: Axis, atom: int) -> int:
    """One byte per replica, so that a count that is off by one shows; and another per atom."""
    return (1 << (8 * replica + 20)) + (atom + 1) * len(axis)


def local_gradients(layout: ParallelLayout) -> Local:
    return {
        (SlotRef(replica.replica, slot), axis): [
            gradient(replica.replica, axis, atom)
            for piece in replica.shards.owned(axis, slot)
            for atom in range(piece.start, piece.stop)
        ]
        for replica in layout.replicas
        for slot in replica.active
        for axis in Axis
    }


def dense_sum(layout: ParallelLayout) -> Local:
    numbers = [replica.replica for replica in layout.replicas]
    return {
        (SlotRef(replica.replica, slot), axis): [
            sum(gradient(number, axis, atom) for number in numbers)
            for piece in replica.shards.owned(axis, slot)
            for atom in range(piece.start, piece.stop)
        ]
        for replica in layout.replicas
        for slot in replica.active
        for axis in Axis
    }


def carry_out(plan: SyncPlan, layout: ParallelLayout) -> Local:
    """Send pieces, add at the proxies, all-reduce among members, send the sums back."""
    local = local_gradients(layout)
    outbox = {key: list(values) for key, values in local.items()}

    def place(axis: Axis, ref: SlotRef, atoms: Range) -> slice:
        offset = layout.replica(ref.replica).shards.offset_of(axis, ref.slot, atoms)
        return slice(offset, offset + len(atoms))

    for sync in plan.homes:
        for piece in sync.pieces:
            there = place(piece.axis, piece.proxy, piece.atoms)
            sent = outbox[piece.holder, piece.axis][place(piece.axis, piece.holder, piece.atoms)]
            buffer = local[piece.proxy, piece.axis]
            buffer[there] = [a + b for a, b in zip(buffer[there], sent, strict=True)]
        for axis in Axis:
            home = layout.replicas[0].shards.axis(axis).home[sync.home]
            spots = [(local[ref, axis], place(axis, ref, home)) for ref in sync.members]
            total = [sum(column) for column in zip(*(b[s] for b, s in spots), strict=True)]
            for buffer, spot in spots:
                buffer[spot] = total
        for piece in sync.pieces:
            there = place(piece.axis, piece.proxy, piece.atoms)
            here = place(piece.axis, piece.holder, piece.atoms)
            local[piece.holder, piece.axis][here] = local[piece.proxy, piece.axis][there]
    return local


@PROPERTY
@given(layouts())
def test_every_slot_gets_the_dense_sum(layout: ParallelLayout) -> None:
    plan = plan_sync(layout)
    assert carry_out(plan, layout) == dense_sum(layout)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=SyncPlan) == plan


@PROPERTY
@given(layouts())
def test_members_and_order(layout: ParallelLayout) -> None:
    plan = plan_sync(layout)
    slots = layout.slots()
    for home, sync in enumerate(plan.homes):
        assert sync.home == home
        assert sync.members == tuple(ref for ref in slots if ref.slot == home)
        keys = [(p.home, p.axis.value, p.atoms.start, p.holder) for p in sync.pieces]
        assert keys == sorted(keys)
        if sync.members:
            assert {piece.proxy for piece in sync.pieces} <= set(sync.members)


@PROPERTY
@given(st.integers(2, 8), st.integers(2, 5), st.integers(8, 64), st.data())
def test_members_carry_evenly(base: int, replicas: int, atoms: int, data: st.DataObject) -> None:
    # Replica 0 stays whole, so that every home has a member.
    layout = full_layout(AtomCounts(atoms, 2 * atoms, 3 * atoms), base, replicas)
    for replica in range(1, replicas):
        lost = data.draw(st.sets(st.integers(0, base - 1), max_size=base - 1))
        for slot in sorted(lost):
            layout = vacate(layout, SlotRef(replica, slot))
    for sync in plan_sync(layout).homes:
        for axis in Axis:
            loads = Counter(dict.fromkeys(sync.members, 0))
            for piece in sync.pieces:
                loads[piece.proxy] += len(piece.atoms) if piece.axis is axis else 0
            assert max(loads.values()) - min(loads.values()) <= 1


def test_a_slot_vacant_everywhere_spreads_over_replicas() -> None:
    layout = full_layout(AtomCounts(8, 64, 80), 4, 3)
    for replica in range(3):
        layout = vacate(layout, SlotRef(replica, 2))
    sync = plan_sync(layout).homes[2]
    assert sync.members == ()
    for axis in (Axis.MLP_COLUMN, Axis.VOCAB_ROW):
        proxied = Counter[int]()
        for piece in sync.pieces:
            proxied[piece.proxy.replica] += len(piece.atoms) if piece.axis is axis else 0
        # Each atom is proxied once, for the two other replicas.
        assert sum(proxied.values()) == 2 * len(layout.replicas[0].shards.axis(axis).home[2])
        # Loads level over nine slots, each within an atom of the others.
        assert max(proxied.values()) - min(proxied.values()) <= 2 * 3


def test_a_full_layout_has_no_pieces_and_a_lone_replica_nothing_to_do() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    assert all(not sync.pieces for sync in plan_sync(full).homes)
    alone = vacate(full_layout(AtomCounts(8, 64, 80), 4, 1), SlotRef(0, 1))
    assert all(not sync.pieces for sync in plan_sync(alone).homes)


def uneven() -> ParallelLayout:
    """Degrees 4, 3, 2, 2; slot 3 is vacant in one replica and slot 1 in two."""
    full = full_layout(AtomCounts(8, 30, 41), 4, 4)
    active = ((0, 1, 2, 3), (0, 1, 2), (0, 2), (2, 3))
    return ParallelLayout(4, tuple(map(with_active, full.replicas, active)))


def leafy() -> ParallelLayout:
    """Slot 3 is vacant in all three replicas, which differ otherwise."""
    full = full_layout(AtomCounts(8, 30, 41), 4, 4)
    active = ((0, 1, 2), (0, 1), (1, 2), (0,))
    return ParallelLayout(4, tuple(map(with_active, full.replicas, active)))


def with_pieces(plan: SyncPlan, home: int, pieces: list[LeafPiece]) -> SyncPlan:
    ordered = tuple(sorted(pieces, key=sync_plan._order))
    homes = list(plan.homes)
    homes[home] = replace(homes[home], pieces=ordered)
    return SyncPlan(tuple(homes))


@pytest.mark.parametrize("layout", [uneven(), leafy()], ids=["uneven", "leafy"])
def test_planted_faults_are_rejected(layout: ParallelLayout) -> None:
    plan = plan_sync(layout)
    slots = layout.slots()
    faults = 0
    for home, sync in enumerate(plan.homes):
        for index, piece in enumerate(sync.pieces):
            rest = [*sync.pieces[:index], *sync.pieces[index + 1 :]]
            changes = [rest]  # a dropped piece
            changes += [
                [*rest, replace(piece, holder=other)]
                for other in slots
                if other.replica != piece.proxy.replica and other != piece.holder
            ]
            shifted = Range(piece.atoms.start + 1, piece.atoms.stop + 1)
            changes.append([*rest, replace(piece, atoms=shifted)])
            if not sync.members:  # a second place where the sum is formed
                changes += [
                    [*rest, replace(piece, proxy=other)]
                    for other in slots
                    if other.replica not in (piece.holder.replica, piece.proxy.replica)
                ]
            for pieces in changes:
                faults += 1
                with pytest.raises(ValueError, match=r"plan again|sorted and distinct"):
                    check_sync(with_pieces(plan, home, pieces), layout)
    assert faults > 50


def test_two_separate_sums_are_rejected() -> None:
    # Replicas 0 and 1 sum among themselves, and so do 2 and 3: each atom is given once, to
    # one of two sums.
    full = full_layout(AtomCounts(2, 2, 2), 2, 4)
    layout = ParallelLayout(2, tuple(with_active(replica, (0,)) for replica in full.replicas))
    pieces = [
        LeafPiece(1, axis, Range(1, 2), SlotRef(holder, 0), SlotRef(proxy, 0))
        for axis in Axis
        for holder, proxy in ((0, 1), (2, 3))
    ]
    with pytest.raises(ValueError, match="one proxy per atom"):
        check_sync(with_pieces(plan_sync(layout), 1, pieces), layout)


def test_a_plan_of_another_layout_is_rejected() -> None:
    plan = plan_sync(uneven())
    with pytest.raises(ValueError, match="not its active slots"):
        check_sync(plan, leafy())
    with pytest.raises(ValueError, match="homes"):
        check_sync(SyncPlan(plan.homes[:-1]), uneven())


def test_the_planner_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(amount: int, unit: int, loads: list[int]) -> tuple[int, ...]:
        return (amount - 1, *(0 for _ in loads[1:]))

    monkeypatch.setattr(sync_plan, "even_shares", forgetful)
    with pytest.raises(ValueError, match="plan again"):
        plan_sync(uneven())


def test_malformed_plans_are_rejected() -> None:
    plan = plan_sync(uneven())
    sync = next(sync for sync in plan.homes if sync.pieces)
    with pytest.raises(ValueError, match="sorted and distinct"):
        replace(sync, pieces=sync.pieces[::-1])
    with pytest.raises(ValueError, match="another home"):
        HomeSync(sync.home + 1, sync.members, sync.pieces)
    with pytest.raises(ValueError, match="different replicas"):
        replace(sync.pieces[0], proxy=sync.pieces[0].holder)
    with pytest.raises(ValueError, match="slot order"):
        SyncPlan(plan.homes[::-1])
