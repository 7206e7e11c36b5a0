"""Losses and returns in any order, of any model: what must hold after each, state and all.

State is simulated as what a slot's tensors hold, one value per atom in storage order, so that an
atom that lands in a wrong place shows. Sizes of models need not divide by anything.
"""

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import atoms_of, axes, owners

from ntp.atoms import AtomCounts, AtomSizes, Axis
from ntp.geometry import ParallelLayout, Range, SlotRef, full_layout, heal, with_active
from ntp.reshard_plan import (
    NoHolder,
    ReshardPlan,
    check_reshard,
    inverse,
    kept_ranges,
    plan_reshard,
)
from ntp.sync_check import check_sync
from ntp.sync_plan import plan_sync

PROPERTY = settings(derandomize=True, print_blob=True, deadline=None, max_examples=50)
SIZES = AtomSizes(kv_group=500, mlp_column=30, vocab_row=7, replicated=100, expert=900)
Stores = dict[SlotRef, dict[Axis, list[int]]]
"""What each slot's tensors hold, by axis, in storage order: an atom's value is its number."""


@dataclass(frozen=True)
class Step:
    """Slots that change at once: active ones are lost (dead, or leaving alive), others return."""

    toggled: frozenset[SlotRef]
    dead: bool


@st.composite
def models(draw: st.DrawFn) -> ParallelLayout:
    """Up to 128 heads in groups, any width and vocabulary, dense or with experts; one layout."""
    base = draw(st.integers(1, 16))
    columns, experts = draw(st.sampled_from([(True, False), (True, True), (False, True)]))
    counts = AtomCounts(
        kv_groups=draw(st.integers(base, 128)),
        mlp_columns=draw(st.integers(base, 300)) if columns else 0,
        vocab_rows=draw(st.integers(base, 300)),
        experts=draw(st.integers(base, 64)) if experts else 0,
    )
    return full_layout(counts, base, draw(st.integers(1, 5)))


@st.composite
def stories(draw: st.DrawFn) -> tuple[ParallelLayout, list[Step]]:
    full = draw(models())
    slots = st.frozensets(st.sampled_from(full.slots()), min_size=1, max_size=2 * full.tp_base)
    return full, draw(st.lists(st.builds(Step, slots, st.booleans()), min_size=1, max_size=6))


def after(layout: ParallelLayout, step: Step) -> ParallelLayout:
    """The layout with the step's slots toggled; a replica that would lose all stays as it is."""
    replicas = []
    for replica in layout.replicas:
        toggled = {ref.slot for ref in step.toggled if ref.replica == replica.replica}
        active = tuple(sorted(set(replica.active) ^ toggled))
        replicas.append(with_active(replica, active) if active else replica)
    return ParallelLayout(layout.tp_base, tuple(replicas))


def stores_of(layout: ParallelLayout) -> Stores:
    """What every slot is to hold."""
    return {
        SlotRef(replica.replica, slot): {
            axis: atoms_of(replica, axis, slot) for axis in axes(layout)
        }
        for replica in layout.replicas
        for slot in replica.active
    }


def run(
    plan: ReshardPlan,
    source: ParallelLayout,
    target: ParallelLayout,
    living: frozenset[SlotRef],
    stores: Stores,
) -> Stores:
    """What the slots of `target` hold after the plan; -1 where nothing was written."""
    result = {
        slot: {axis: [-1] * len(held) for axis, held in wanted.items()}
        for slot, wanted in stores_of(target).items()
    }

    def copy(axis: Axis, atoms: Range, sender: SlotRef, receiver: SlotRef) -> None:
        begin = source.replica(sender.replica).shards.offset_of(axis, sender.slot, atoms)
        there = target.replica(receiver.replica).shards.offset_of(axis, receiver.slot, atoms)
        values = stores[sender][axis][begin : begin + len(atoms)]
        result[receiver][axis][there : there + len(atoms)] = values

    for slot in target.slots():
        if slot in living:
            for axis, atoms in kept_ranges(source, target, slot):
                copy(axis, atoms, slot, slot)
    for move in plan.moves:
        if move.axis is not None and move.atoms is not None:
            copy(move.axis, move.atoms, move.source, move.target)
    return result


def lacking(source: ParallelLayout, target: ParallelLayout, living: frozenset[SlotRef]) -> int:
    """Elements that slots are to own and do not hold: no plan can move less."""
    before, wanted = stores_of(source), stores_of(target)
    total = SIZES.replicated * len(set(wanted) - living)
    for slot, held in wanted.items():
        for axis, atoms in held.items():
            kept = set(before[slot][axis]) if slot in living else set()
            total += SIZES.of(axis) * len(set(atoms) - kept)
    return total


def check_layout(layout: ParallelLayout, full: ParallelLayout) -> None:
    for replica, whole in zip(layout.replicas, full.replicas, strict=True):
        for axis, homes in full.homes:
            dense = owners(replica, axis)  # each atom once
            sizes = [dense.count(slot) for slot in replica.active]
            assert max(sizes) - min(sizes) <= 1
            for slot in replica.active:
                assert replica.shards.owned(axis, slot)[0] == homes[slot]
        if replica.active == whole.active:
            assert replica.shards == whole.shards


def check_plan(
    plan: ReshardPlan,
    source: ParallelLayout,
    target: ParallelLayout,
    living: frozenset[SlotRef],
) -> None:
    check_reshard(plan, source, target, living)
    assert plan.elements(SIZES) == lacking(source, target, living)
    assert inverse(inverse(plan)) == plan
    touched = {move.target.replica for move in plan.moves}
    for old, new in zip(source.replicas, target.replicas, strict=True):
        if old.active == new.active:
            assert new is old
            assert new.replica not in touched or not living.issuperset(
                SlotRef(new.replica, slot) for slot in new.active
            )


@PROPERTY
@given(stories(), st.randoms(use_true_random=False))
def test_any_story_ends_as_it_began(
    story: tuple[ParallelLayout, list[Step]], order: Random
) -> None:
    full, steps = story
    layout, stores = full, stores_of(full)
    for step in steps:
        target = after(layout, step)
        lost = frozenset(layout.slots()) - frozenset(target.slots())
        living = frozenset(layout.slots()) - (lost if step.dead else frozenset())
        try:
            plan = plan_reshard(layout, target, living, SIZES)
        except NoHolder as error:
            assert step.dead
            held = [stores[slot][error.axis] for slot in living]
            assert not any(error.atoms.start in atoms for atoms in held)
            living = frozenset(layout.slots())
            plan = plan_reshard(layout, target, living, SIZES)
        check_layout(target, full)
        check_plan(plan, layout, target, living)
        stores = run(plan, layout, target, living, stores)
        assert stores == stores_of(target)
        layout = target
    check_sync(plan_sync(layout), layout, turn=len(steps))
    vacant = sorted(set(full.slots()) - set(layout.slots()))
    order.shuffle(vacant)
    for slot in vacant:
        target = heal(layout, slot)
        living = frozenset(layout.slots())
        plan = plan_reshard(layout, target, living, SIZES)
        check_plan(plan, layout, target, living)
        stores = run(plan, layout, target, living, stores)
        layout = target
    assert layout == full
    assert stores == stores_of(full)


@PROPERTY
@given(stories())
def test_a_return_takes_back_what_the_loss_gave_away(
    story: tuple[ParallelLayout, list[Step]],
) -> None:
    full, steps = story
    layout = full
    for step in steps:
        target = after(layout, step)
        survivors = frozenset(layout.slots()) & frozenset(target.slots())
        lost = set(layout.slots()) - survivors
        only_losses = set(target.slots()) <= survivors
        if lost and only_losses:
            gone = stores_of(layout)
            elements = sum(
                SIZES.of(axis) * len(atoms) for slot in lost for axis, atoms in gone[slot].items()
            )
            everyone = frozenset(layout.slots())
            plan = plan_reshard(layout, target, everyone, SIZES)
            assert plan.elements(SIZES) == elements
            back = plan_reshard(target, layout, survivors, SIZES)
            assert back.elements(SIZES) == elements + SIZES.replicated * len(lost)
            assert {move.target for move in back.moves} == lost
            assert atoms_moved(inverse(back)) == atoms_moved(plan)
        layout = target


def atoms_moved(plan: ReshardPlan) -> list[tuple[Axis, int]]:
    """Axis and number of each atom that moved, as often as it did."""
    return sorted(
        (move.axis, atom)
        for move in plan.moves
        if move.axis is not None and move.atoms is not None
        for atom in range(move.atoms.start, move.atoms.stop)
    )


@pytest.mark.parametrize("base", [2, 16])
def test_down_to_one_slot_where_each_has_one_atom(base: int) -> None:
    full = layout = full_layout(AtomCounts(base, base, base, base), base, 3)
    for slot in range(base - 1):
        layout = after(layout, Step(frozenset({SlotRef(1, slot)}), dead=True))
        check_layout(layout, full)
        check_sync(plan_sync(layout), layout)
    assert layout.replica(1).active == (base - 1,)
