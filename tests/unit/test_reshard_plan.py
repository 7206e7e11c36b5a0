"""Reshard plans against a dense oracle: sets of atoms per slot, moved one plan at a time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import atoms_of, axes, full_layouts, some_of

from ntp.atoms import AtomCounts, AtomSizes, Axis
from ntp.geometry import ParallelLayout, Range, SlotRef, full_layout, heal, vacate, with_active
from ntp.reshard_plan import (
    Move,
    NoHolder,
    ReshardPlan,
    check_reshard,
    even_shares,
    inverse,
    kept_ranges,
    move_order,
    plan_reshard,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
SIZES = AtomSizes(kv_group=400, mlp_column=30, vocab_row=7, replicated=1000, expert=90)
Stock = dict[tuple[SlotRef, Axis], Counter[int]]


def stock(layout: ParallelLayout) -> Stock:
    """How often each slot has each atom."""
    return {
        (SlotRef(replica.replica, slot), axis): Counter(atoms_of(replica, axis, slot))
        for replica in layout.replicas
        for slot in replica.active
        for axis in axes(layout)
    }


def carry_out(
    plan: ReshardPlan, source: ParallelLayout, target: ParallelLayout, holders: frozenset[SlotRef]
) -> Stock:
    """What the target's slots have after the plan; fails if a source sends what it lacks."""
    before = stock(source)
    after: Stock = {}
    for slot in target.slots():
        kept = kept_ranges(source, target, slot) if slot in holders else ()
        for axis in axes(target):
            after[slot, axis] = Counter(
                atom
                for kind, piece in kept
                if kind is axis
                for atom in range(piece.start, piece.stop)
            )
    for move in plan.moves:
        if move.axis is None or move.atoms is None:
            continue
        assert move.source in holders
        # Raises where the range is not one slice of the local tensor at either end.
        for layout, end in ((source, move.source), (target, move.target)):
            layout.replica(end.replica).shards.offset_of(move.axis, end.slot, move.atoms)
        for atom in range(move.atoms.start, move.atoms.stop):
            assert before[move.source, move.axis][atom] == 1
            after[move.target, move.axis][atom] += 1
    return after


def elements(moves: Iterable[Move]) -> dict[SlotRef, int]:
    """Elements that each slot sends."""
    sent: Counter[SlotRef] = Counter()
    for move in moves:
        sent[move.source] += SIZES.of(move.axis) * (len(move.atoms) if move.atoms else 1)
    return sent


@PROPERTY
@given(st.data())
def test_every_slot_ends_with_its_atoms_once(data: st.DataObject) -> None:
    full = data.draw(full_layouts())
    source, target = data.draw(some_of(full)), data.draw(some_of(full))
    holders = frozenset(data.draw(st.sets(st.sampled_from(source.slots()))))
    before = stock(source)
    lost = {
        (axis, atom)
        for axis in axes(full)
        for atom in range(full.replicas[0].shards.axis(axis).atoms)
        if not any(before[slot, axis][atom] for slot in holders)
    }
    if lost:
        with pytest.raises(NoHolder) as caught:
            plan_reshard(source, target, holders, SIZES)
        axis, atoms = caught.value.axis, caught.value.atoms
        if axis is None or atoms is None:
            assert not holders
        else:
            assert {(axis, atom) for atom in range(atoms.start, atoms.stop)} <= lost
        return
    plan = plan_reshard(source, target, holders, SIZES)
    check_reshard(plan, source, target, holders)
    assert carry_out(plan, source, target, holders) == stock(target)
    fresh = [move.target for move in plan.moves if move.axis is None]
    assert sorted(fresh) == sorted(set(target.slots()) - holders)
    assert inverse(inverse(plan)) == plan
    assert inverse(plan).elements(SIZES) == plan.elements(SIZES)
    decoded = msgspec.json.decode(msgspec.json.encode(plan), type=ReshardPlan)
    assert decoded == plan
    assert decoded.digest == plan.digest


@pytest.mark.parametrize("replicas", [2, 3, 5, 20])
def test_holders_share_what_a_loss_takes(replicas: int) -> None:
    source = full_layout(AtomCounts(8, 512, 1024), 4, replicas)
    victim = SlotRef(1, 1)
    holders = frozenset(source.slots()) - {victim}
    plan = plan_reshard(source, vacate(source, victim), holders, SIZES)
    sent = elements(plan.moves)
    assert {ref.slot for ref in sent} == {1}
    assert len(sent) == min(replicas - 1, 8)
    # Cuts fall between atoms: at either end of a part up to half a group is too much or too little.
    assert max(sent.values()) - min(sent.values()) <= 2 * SIZES.kv_group
    assert len(plan.moves) <= 2 + 2 * 3 + len(sent)


def test_what_divides_is_shared_exactly() -> None:
    source = full_layout(AtomCounts(12, 48, 96), 4, 4)
    victim = SlotRef(0, 3)
    holders = frozenset(source.slots()) - {victim}
    plan = plan_reshard(source, vacate(source, victim), holders, SIZES)
    assert len(set(elements(plan.moves).values())) == 1
    # Three slots need the same of three axes, and three slots send it: one each.
    assert len({(move.source, move.target) for move in plan.moves}) == 3


def test_no_more_senders_than_receivers_need() -> None:
    source = full_layout(AtomCounts(32, 1600, 3200), 16, 60)
    lost = {SlotRef(7, 4), SlotRef(9, 4)}
    target = source
    for victim in sorted(lost):
        target = vacate(target, victim)
    plan = plan_reshard(source, target, frozenset(source.slots()) - lost, SIZES)
    assert len(elements(plan.moves)) == 2 * 15
    assert len(plan.moves) <= 2 * (2 + 15 + 15) + 30


def test_a_returning_slot_is_served_by_its_own_replica() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    source = vacate(full, SlotRef(1, 2))
    plan = plan_reshard(source, full, frozenset(source.slots()), SIZES)
    assert {move.source for move in plan.moves if move.axis} == {SlotRef(1, s) for s in (0, 1, 3)}
    assert {move.source.replica for move in plan.moves} == {1}
    loss = plan_reshard(full, source, frozenset(source.slots()), SIZES)
    moved = {(move.axis, atom) for move in loss.moves for atom in span(move)}
    assert moved == {(move.axis, atom) for move in plan.moves if move.axis for atom in span(move)}


def span(move: Move) -> range:
    return range(move.atoms.start, move.atoms.stop) if move.atoms else range(0)


GROWING = ((2,), (0, 1, 2, 3))
LEAVING_ALIVE = ((0, 1, 2, 3), (0, 1, 3))


@pytest.mark.parametrize(("before", "after"), [GROWING, LEAVING_ALIVE], ids=["grow", "leave"])
def test_its_own_replica_gives_no_more_than_a_slot_receives(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    source, target = (
        replace(full, replicas=(full.replicas[0], with_active(full.replicas[1], active)))
        for active in (before, after)
    )
    plan = plan_reshard(source, target, frozenset(source.slots()), SIZES)
    shares = elements(move for move in plan.moves if move.axis)
    most = max(elements(move for move in inverse(plan).moves if move.axis).values())
    # Slot 2 alone has what the others need, and is not left idle.
    assert most - SIZES.kv_group < shares[SlotRef(1, 2)] <= most


def test_adopters_serve_only_what_no_home_has() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 4)
    source = full
    for replica in range(3):
        source = vacate(source, SlotRef(replica, 2))
    victim = SlotRef(0, 1)
    target = vacate(source, victim)
    holders = frozenset(source.slots()) - {victim}
    home = {axis: homes[2] for axis, homes in full.homes}

    def of_home_2(living: frozenset[SlotRef]) -> list[Move]:
        plan = plan_reshard(source, target, living, SIZES)
        check_reshard(plan, source, target, living)
        return [
            move
            for move in plan.moves
            if move.axis and move.atoms and home[move.axis].contains(move.atoms)
        ]

    # The lost slot had adopted a third of home 2.
    assert {move.source for move in of_home_2(holders)} == {SlotRef(3, 2)}
    # Without that slot, the third comes from those that adopted the same.
    moves = of_home_2(holders - {SlotRef(3, 2)})
    third = {move.source for move in moves if move.target.replica == 0}
    assert third == {SlotRef(1, 1), SlotRef(2, 1)}
    # The slot itself, now fresh, gets all of it, and who gave a big atom gives fewer small ones.
    sent = elements(moves)
    for slot in (0, 1, 3):
        loads = [load for ref, load in sent.items() if ref.slot == slot]
        assert len(loads) == (2 if slot == 1 else 3)
        assert max(loads) - min(loads) < SIZES.kv_group


@PROPERTY
@given(st.data())
def test_layouts_may_have_other_homes(data: st.DataObject) -> None:
    # A job that starts anew with another tp_base.
    counts = AtomCounts(16, 67, 85, 17)
    source, target = (
        data.draw(some_of(full_layout(counts, data.draw(st.integers(1, 8)), 3))) for _ in "ab"
    )
    holders = frozenset(source.slots())
    plan = plan_reshard(source, target, holders, SIZES)
    check_reshard(plan, source, target, holders)
    assert carry_out(plan, source, target, holders) == stock(target)


def test_replicated_tensors_come_from_near_and_from_the_least_loaded() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    source = replace(
        full, replicas=(full.replicas[0], with_active(full.replicas[1], (0, 3)), full.replicas[2])
    )
    plan = plan_reshard(source, full, frozenset(source.slots()), SIZES)
    whole = {move.target: move.source for move in plan.moves if move.axis is None}
    assert set(whole) == {SlotRef(1, 1), SlotRef(1, 2)}
    assert set(whole.values()) == {SlotRef(1, 0), SlotRef(1, 3)}
    # A replica that is all new is served slot by slot, from different replicas.
    source = replace(full, replicas=full.replicas[:2])
    plan = plan_reshard(source, full, frozenset(source.slots()), SIZES)
    whole = {move.target: move.source for move in plan.moves if move.axis is None}
    assert all(source.slot == target.slot for target, source in whole.items())


def test_a_replica_that_stays_is_not_looked_at() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    decoded = msgspec.json.decode(msgspec.json.encode(full), type=ParallelLayout)
    for source in (full, decoded):
        target = heal(vacate(full, SlotRef(0, 1)), SlotRef(0, 1))
        holders = frozenset(full.slots())
        assert plan_reshard(source, target, holders, SIZES) == ReshardPlan(())
        plan = plan_reshard(source, target, holders - {SlotRef(0, 1)}, SIZES)
        assert {move.target for move in plan.moves} == {SlotRef(0, 1)}


@PROPERTY
@given(
    st.integers(1, 200),
    st.integers(1, 9),
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
)
def test_even_shares_is_greedy_least_loaded(amount: int, unit: int, loads: list[int]) -> None:
    shares = even_shares(amount, unit, loads)
    assert sum(shares) == amount
    assert min(shares) >= 0
    greedy = list(loads)
    for _ in range(amount):
        greedy[greedy.index(min(greedy))] += unit
    after = [load + share * unit for load, share in zip(loads, shares, strict=True)]
    assert max(after) == max(greedy)
    touched = [load for load, share in zip(after, shares, strict=True) if share]
    assert max(touched) - min(after) <= unit


def test_lost_state_is_named() -> None:
    source = full_layout(AtomCounts(2, 4, 6), 2, 2)
    holders = frozenset({SlotRef(0, 0), SlotRef(1, 0)})
    with pytest.raises(NoHolder, match=r"holds KV group 1$") as caught:
        plan_reshard(source, source, holders, SIZES)
    assert (caught.value.axis, caught.value.atoms) == (Axis.KV_GROUP, Range(1, 2))
    with pytest.raises(NoHolder, match="replicated tensors"):
        plan_reshard(source, source, frozenset(), SIZES)
    for stranger in (SlotRef(5, 0), SlotRef(1, 2)):
        with pytest.raises(ValueError, match="not active in the source"):
            plan_reshard(source, source, frozenset({stranger}), SIZES)
    for other in (AtomCounts(2, 4, 7), AtomCounts(2, 4, 6, 8)):
        with pytest.raises(ValueError, match="of one model"):
            plan_reshard(source, full_layout(other, 2, 2), holders, SIZES)


def test_nothing_to_do() -> None:
    layout = full_layout(AtomCounts(2, 4, 6), 2, 2)
    plan = plan_reshard(layout, layout, frozenset(layout.slots()), SIZES)
    assert plan == ReshardPlan(())
    assert plan.elements(SIZES) == 0


def test_an_axis_without_elements_still_changes_hands() -> None:
    # A pipeline stage in the middle has no vocabulary, but its layout is that of all stages.
    nothing = replace(SIZES, vocab_row=0)
    source = full_layout(AtomCounts(4, 16, 20), 4, 3)
    target = vacate(source, SlotRef(1, 2))
    holders = frozenset(target.slots())
    check_reshard(plan_reshard(source, target, holders, nothing), source, target, holders)
    back = plan_reshard(target, source, holders, nothing)
    check_reshard(back, target, source, holders)


def test_digests_tell_plans_apart() -> None:
    source = full_layout(AtomCounts(4, 16, 20), 4, 3)
    plans = [
        plan_reshard(source, vacate(source, slot), frozenset(source.slots()) - {slot}, SIZES)
        for slot in source.slots()
    ]
    plans += [inverse(plan) for plan in plans]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert all(len(plan.digest) == 64 for plan in plans)


def planted_case() -> tuple[ReshardPlan, ParallelLayout, ParallelLayout, frozenset[SlotRef]]:
    full = full_layout(AtomCounts(4, 16, 20, 8), 4, 3)
    source = vacate(full, SlotRef(1, 2))
    holders = frozenset(source.slots())
    return plan_reshard(source, full, holders, SIZES), source, full, holders


def wrong(plan: ReshardPlan, index: int, *moves: Move) -> ReshardPlan:
    """The plan with one move replaced."""
    changed = [*plan.moves[:index], *moves, *plan.moves[index + 1 :]]
    return ReshardPlan(tuple(sorted(changed, key=move_order)))


def test_planted_faults_are_rejected() -> None:
    plan, source, target, holders = planted_case()
    assert {move.axis for move in plan.moves} == {None, *Axis}
    surplus = Move(Axis.KV_GROUP, Range(0, 1), SlotRef(2, 0), SlotRef(0, 0))
    with pytest.raises(ValueError, match="plan again"):  # to a replica that stays as it is
        check_reshard(ReshardPlan((surplus, *plan.moves)), source, target, holders)
    for nowhere in (SlotRef(1, -2), SlotRef(1, 4), SlotRef(9, 0)):
        with pytest.raises(ValueError, match="plan again"):
            check_reshard(
                wrong(plan, 1, plan.moves[1], replace(plan.moves[1], target=nowhere)),
                source,
                target,
                holders,
            )
    for index, move in enumerate(plan.moves):
        faults = [wrong(plan, index)]  # a dropped move
        faults.append(wrong(plan, index, replace(move, target=SlotRef(0, 0))))
        faults.append(wrong(plan, index, replace(move, source=move.target)))
        if move.atoms:
            shifted = Range(move.atoms.start + 1, move.atoms.stop + 1)
            faults.append(wrong(plan, index, replace(move, atoms=shifted)))
            faults.append(wrong(plan, index, replace(move, source=SlotRef(0, 3))))
        for other in holders:  # the same thing from two sources
            if other != move.source:
                faults.append(wrong(plan, index, move, replace(move, source=other)))
        for fault in faults:
            with pytest.raises(ValueError, match="plan again"):
                check_reshard(fault, source, target, holders)
    # Survivors of the reduced replica hold different parts, so none can stand in for another.
    local = [move for move in plan.moves if move.source.replica == 1 and move.atoms]
    pairs = [pair for pair in combinations(local, 2) if pair[0].source != pair[1].source]
    assert pairs
    for first, second in pairs:
        swapped = wrong(plan, plan.moves.index(first), replace(first, source=second.source))
        index = swapped.moves.index(second)
        swapped = wrong(swapped, index, replace(second, source=first.source))
        with pytest.raises(ValueError, match="plan again"):
            check_reshard(swapped, source, target, holders)


def test_a_dead_source_is_rejected() -> None:
    source = full_layout(AtomCounts(4, 16, 20), 4, 3)
    victim = SlotRef(1, 2)
    holders = frozenset(source.slots()) - {victim}
    target = vacate(source, victim)
    plan = plan_reshard(source, target, holders, SIZES)
    for index, move in enumerate(plan.moves):
        fault = wrong(plan, index, replace(move, source=victim))
        with pytest.raises(ValueError, match="not another living process"):
            check_reshard(fault, source, target, holders)


def test_malformed_plans_are_rejected() -> None:
    plan, *_ = planted_case()
    with pytest.raises(ValueError, match="sorted and distinct"):
        ReshardPlan(plan.moves[::-1])
    with pytest.raises(ValueError, match="sorted and distinct"):
        ReshardPlan((plan.moves[0], plan.moves[0]))
    with pytest.raises(ValueError, match="without the other"):
        Move(None, Range(0, 1), SlotRef(0, 0), SlotRef(0, 1))
