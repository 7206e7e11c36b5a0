"""Reshard plans against a dense oracle: sets of atoms per slot, moved one plan at a time."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp import reshard_plan
from ntp.atoms import AtomCounts, AtomSizes, Axis
from ntp.geometry import ParallelLayout, Range, SlotRef, full_layout, vacate, with_active
from ntp.reshard_plan import (
    Move,
    NoHolder,
    ReshardPlan,
    check_reshard,
    even_shares,
    inverse,
    kept_ranges,
    plan_reshard,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
SIZES = AtomSizes(kv_group=400, mlp_column=30, vocab_row=7, replicated=1000)
Stock = dict[tuple[SlotRef, Axis], Counter[int]]


@st.composite
def layouts(draw: st.DrawFn, full: ParallelLayout) -> ParallelLayout:
    """Some of the replicas, each with some of its slots."""
    some = st.sets(st.integers(0, full.tp_base - 1), min_size=1)
    chosen = draw(st.sets(st.sampled_from(full.replicas), min_size=1))
    return ParallelLayout(
        full.tp_base,
        tuple(
            with_active(replica, tuple(sorted(draw(some))))
            for replica in full.replicas
            if replica in chosen
        ),
    )


@st.composite
def full_layouts(draw: st.DrawFn) -> ParallelLayout:
    base = draw(st.integers(1, 8))
    counts = AtomCounts(*(draw(st.integers(base, 64)) for _ in Axis))
    return full_layout(counts, base, draw(st.integers(1, 4)))


def stock(layout: ParallelLayout) -> Stock:
    """How often each slot has each atom."""
    return {
        (SlotRef(replica.replica, slot), axis): Counter(
            atom
            for piece in replica.shards.owned(axis, slot)
            for atom in range(piece.start, piece.stop)
        )
        for replica in layout.replicas
        for slot in replica.active
        for axis in Axis
    }


def carry_out(
    plan: ReshardPlan, source: ParallelLayout, target: ParallelLayout, holders: frozenset[SlotRef]
) -> Stock:
    """What the target's slots have after the plan; fails if a source sends what it lacks."""
    before = stock(source)
    after: Stock = {}
    for slot in target.slots():
        kept = kept_ranges(source, target, slot) if slot in holders else ()
        for axis in Axis:
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


@PROPERTY
@given(st.data())
def test_every_slot_ends_with_its_atoms_once(data: st.DataObject) -> None:
    full = data.draw(full_layouts())
    source, target = data.draw(layouts(full)), data.draw(layouts(full))
    holders = frozenset(data.draw(st.sets(st.sampled_from(source.slots()))))
    before = stock(source)
    lost = {
        (axis, atom)
        for axis in Axis
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
    assert carry_out(plan, source, target, holders) == stock(target)
    fresh = [move.target for move in plan.moves if move.axis is None]
    assert sorted(fresh) == sorted(set(target.slots()) - holders)
    assert inverse(inverse(plan)) == plan
    assert inverse(plan).elements(SIZES) == plan.elements(SIZES)
    decoded = msgspec.json.decode(msgspec.json.encode(plan), type=ReshardPlan)
    assert decoded == plan
    assert decoded.digest == plan.digest


@PROPERTY
@given(st.data())
def test_a_loss_moves_the_lost_atoms_once(data: st.DataObject) -> None:
    full = data.draw(full_layouts().filter(lambda full: full.tp_base > 1))
    replicas = (full.replicas[0], *(replace(full.replicas[0], replica=n) for n in (7, 9)))
    source = ParallelLayout(full.tp_base, replicas)
    for _ in range(data.draw(st.integers(1, full.tp_base - 1))):
        victim = SlotRef(7, data.draw(st.sampled_from(source.replica(7).active)))
        target = vacate(source, victim)
        holders = frozenset(source.slots()) - {victim}
        plan = plan_reshard(source, target, holders, SIZES)
        lost = sum(source.replica(7).shards.local_atoms(a, victim.slot) * SIZES.of(a) for a in Axis)
        assert plan.elements(SIZES) == lost
        assert {move.target.replica for move in plan.moves} == {7}
        # And home again: the returning slot is fresh, everyone else only gives back.
        back = plan_reshard(target, source, frozenset(target.slots()), SIZES)
        assert back.elements(SIZES) == lost + SIZES.replicated
        assert {move.target for move in back.moves} == {victim}
        source = target


def test_senders_share_the_load() -> None:
    source = full_layout(AtomCounts(8, 512, 1024), 4, 5)
    victim = SlotRef(2, 1)
    holders = frozenset(source.slots()) - {victim}
    plan = plan_reshard(source, vacate(source, victim), holders, SIZES)
    sent: Counter[SlotRef] = Counter()
    for move in plan.moves:
        assert move.atoms is not None
        sent[move.source] += SIZES.of(move.axis) * len(move.atoms)
    assert set(sent) == {SlotRef(replica, 1) for replica in (0, 1, 3, 4)}
    # The uncut groups differ by whole atoms; columns and rows fill the gaps.
    assert max(sent.values()) - min(sent.values()) <= SIZES.mlp_column


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
    with pytest.raises(NoHolder, match=r"kv_group 1\.\.2") as caught:
        plan_reshard(source, source, holders, SIZES)
    assert (caught.value.axis, caught.value.atoms) == (Axis.KV_GROUP, Range(1, 2))
    with pytest.raises(NoHolder, match="replicated tensors"):
        plan_reshard(source, source, frozenset(), SIZES)
    with pytest.raises(ValueError, match="not active in the source"):
        plan_reshard(source, source, frozenset({SlotRef(5, 0)}), SIZES)
    with pytest.raises(ValueError, match="layouts of one model"):
        plan_reshard(source, full_layout(AtomCounts(2, 4, 7), 2, 2), holders, SIZES)


def test_nothing_to_do() -> None:
    layout = full_layout(AtomCounts(2, 4, 6), 2, 2)
    plan = plan_reshard(layout, layout, frozenset(layout.slots()), SIZES)
    assert plan == ReshardPlan(())
    assert plan.elements(SIZES) == 0


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
    full = full_layout(AtomCounts(4, 16, 20), 4, 3)
    source = vacate(full, SlotRef(1, 2))
    holders = frozenset(source.slots())
    return plan_reshard(source, full, holders, SIZES), source, full, holders


def wrong(plan: ReshardPlan, index: int, *moves: Move) -> ReshardPlan:
    """The plan with one move replaced."""
    changed = [*plan.moves[:index], *moves, *plan.moves[index + 1 :]]
    return ReshardPlan(tuple(sorted(changed, key=reshard_plan._order)))


def test_planted_faults_are_rejected() -> None:
    plan, source, target, holders = planted_case()
    assert {move.axis for move in plan.moves} == {None, *Axis}
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


def test_the_planner_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, target, holders = planted_case()

    def forgetful(amount: int, unit: int, loads: list[int]) -> tuple[int, ...]:
        return (amount - 1, *(0 for _ in loads[1:]))

    monkeypatch.setattr(reshard_plan, "even_shares", forgetful)
    with pytest.raises(ValueError, match="plan again"):
        plan_reshard(source, target, holders, SIZES)


def test_malformed_plans_are_rejected() -> None:
    plan, *_ = planted_case()
    with pytest.raises(ValueError, match="sorted and distinct"):
        ReshardPlan(plan.moves[::-1])
    with pytest.raises(ValueError, match="sorted and distinct"):
        ReshardPlan((plan.moves[0], plan.moves[0]))
    with pytest.raises(ValueError, match="without the other"):
        Move(None, Range(0, 1), SlotRef(0, 0), SlotRef(0, 1))
