"""Who all-reduces and who sends: against the best of all choices, and the bytes that follow."""

from dataclasses import replace
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import full_layouts, some_of

from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import ParallelLayout, SlotRef, full_layout, vacate, with_active
from ntp.sync_plan import HomeSync, SyncPlan, plan_sync
from ntp.sync_traffic import megatron_bytes, ring_bytes, sync_bytes, uniform_ring_bytes

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
COLUMNS = AtomSizes(kv_group=0, mlp_column=1000, vocab_row=0, replicated=0)


def reduced(base: int, replicas: int, *vacant: tuple[int, ...], columns: int = 0) -> ParallelLayout:
    """The first replicas lack these slots; the others are full."""
    full = full_layout(AtomCounts(0, columns or 840 * base, 0), base, replicas)
    keep = [tuple(s for s in range(base) if s not in slots) for slots in vacant]
    return ParallelLayout(
        base,
        (*map(with_active, full.replicas, keep), *full.replicas[len(vacant) :]),
    )


def sizes_of(plan: SyncPlan) -> list[int]:
    return [len(sync.members) for sync in plan.homes]


@PROPERTY
@given(st.data())
def test_everyone_has_one_role(data: st.DataObject) -> None:
    layout = data.draw(some_of(data.draw(full_layouts())))
    plan = plan_sync(layout)
    everyone = [replica.replica for replica in layout.replicas]
    active = set(layout.slots())
    for home, sync in enumerate(plan.homes):
        inside = [member.replica for member in sync.members]
        assert sync.home == home
        assert sorted([*inside, *sync.leaves]) == everyone
        assert set(sync.members) <= active
        if sync.members:
            full = {r.replica for r in layout.replicas if r.degree == layout.tp_base}
            assert full <= set(inside)
    assert plan_sync(layout) == plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=SyncPlan) == plan


@pytest.mark.parametrize(
    ("base", "replicas", "degree", "limit"),
    [(8, 16, 7, 1.04), (8, 16, 6, 1.04), (8, 16, 4, 1.07), (32, 128, 30, 1.01)],
)
def test_the_busiest_slot_of_one_reduced_replica(
    base: int, replicas: int, degree: int, limit: float
) -> None:
    layout = reduced(base, replicas, tuple(range(degree, base)))
    plan = plan_sync(layout)
    assert sizes_of(plan) == [replicas - 1] * base
    slots = [SlotRef(0, slot) for slot in range(degree)]
    slots += [SlotRef(n, slot) for n in (1, replicas // 2, replicas - 1) for slot in (0, base - 1)]
    busiest = max(sync_bytes(plan, layout, (COLUMNS,), 4, slots).values())
    uniform = uniform_ring_bytes(layout, COLUMNS, 4)
    assert busiest / uniform <= limit
    assert megatron_bytes(layout, COLUMNS, 4).between / uniform == pytest.approx(base / degree)


def busiest_of(plan: SyncPlan, layout: ParallelLayout) -> int:
    return max(sync_bytes(plan, layout, (COLUMNS,), 1).values())


@pytest.mark.parametrize(
    "layout",
    [
        reduced(4, 2, (3,)),
        reduced(4, 3, (3,)),
        reduced(4, 4, (1,)),
        reduced(4, 6, (1, 2)),
        reduced(4, 5, (0,), (1,)),
        reduced(3, 5, (0,), (0,), (2,)),
        reduced(4, 4, (1,), (0, 2), (1, 2, 3)),
        reduced(3, 3, (0,), (1,), (2,)),
        reduced(3, 4, (0,), (1,), (2,), (0,)),
    ],
    ids=lambda layout: "+".join(str(replica.degree) for replica in layout.replicas),
)
def test_no_choice_of_members_is_better(layout: ParallelLayout) -> None:
    # All ways to let each reduced replica be a member of a home that it has or not.
    optional = [
        (replica.replica, home)
        for replica in layout.replicas
        if replica.degree < layout.tp_base
        for home in replica.active
    ]
    numbers = [replica.replica for replica in layout.replicas]
    best = None
    for choice in product((False, True), repeat=len(optional)):
        leaf = {place for place, joins in zip(optional, choice, strict=True) if not joins}
        homes = []
        for home in range(layout.tp_base):
            inside = [
                replica.replica
                for replica in layout.replicas
                if home in replica.active and (replica.replica, home) not in leaf
            ]
            leaves = tuple(number for number in numbers if number not in inside)
            homes.append(HomeSync(home, tuple(SlotRef(n, home) for n in inside), leaves))
        if all(sync.members for sync in homes):
            found = busiest_of(SyncPlan(tuple(homes)), layout)
            best = found if best is None else min(best, found)
    planned = busiest_of(plan_sync(layout), layout)
    # Pieces are cut at atoms, of 1000 bytes; ring bytes are rounded up.
    assert best is not None
    assert planned <= best + 4000


def test_few_reduced_replicas_are_leaves_and_many_are_members() -> None:
    assert sizes_of(plan_sync(reduced(8, 16, (3,)))) == [15] * 8
    assert sizes_of(plan_sync(reduced(8, 3, (3,)))) == [3, 3, 3, 2, 3, 3, 3, 3]
    # With two replicas all choices take equally many bytes, and an all-reduce is simpler.
    assert sizes_of(plan_sync(reduced(4, 2, (3,)))) == [2, 2, 2, 1]
    # All reduced, each at another slot: all join where they can.
    everyone = reduced(8, 16, *(((n % 8),) for n in range(16)))
    assert sizes_of(plan_sync(everyone)) == [14] * 8
    # A replica at degree 1 is a leaf, while those at degree 7 have too many atoms to send for it.
    mixed = reduced(8, 16, tuple(range(1, 8)), *(((n % 8),) for n in range(8)))
    assert 0 not in {member.replica for sync in plan_sync(mixed).homes for member in sync.members}


def test_a_home_that_few_or_none_have_is_reduced_directly() -> None:
    nobody = reduced(8, 16, *((3,) for _ in range(16)))
    few = reduced(8, 16, *((3,) for _ in range(14)))
    for layout in (nobody, few):
        plan = plan_sync(layout)
        assert sizes_of(plan) == [16, 16, 16, 0, 16, 16, 16, 16]
        assert plan.homes[3].leaves == tuple(range(16))
        uniform = uniform_ring_bytes(layout, COLUMNS, 1)
        # A slot at degree 7 sends for 8/7 of a home.
        assert busiest_of(plan, layout) / uniform <= 8 / 7 + 0.01
    # Most have it: an all-reduce is simpler, and takes about as much.
    assert sizes_of(plan_sync(reduced(8, 16, (3,), (3,))))[3] == 14


def test_a_full_layout_has_no_leaves_and_a_lone_replica_nothing_to_do() -> None:
    full = full_layout(AtomCounts(8, 64, 80), 4, 3)
    assert all(not sync.leaves for sync in plan_sync(full).homes)
    assert set(sync_bytes(plan_sync(full), full, (COLUMNS,), 2).values()) == {
        uniform_ring_bytes(full, COLUMNS, 2)
    }
    alone = vacate(full_layout(AtomCounts(8, 64, 80), 4, 1), SlotRef(0, 1))
    assert set(sync_bytes(plan_sync(alone), alone, (COLUMNS,), 2).values()) == {0}


@PROPERTY
@given(st.data())
def test_all_plans_send_equally_much(data: st.DataObject) -> None:
    layout = data.draw(some_of(data.draw(full_layouts())))
    sizes = AtomSizes(kv_group=500, mlp_column=30, vocab_row=7, replicated=9, expert=90)
    total = sum(sync_bytes(plan_sync(layout), layout, (sizes,), 1).values())
    model = sum(homes[-1].stop * sizes.of(axis) for axis, homes in layout.homes)
    exact = 2 * (len(layout.replicas) - 1) * model
    assert exact <= total <= exact + len(layout.slots())


def test_buckets_level_what_does_not_divide() -> None:
    # One KV group a home: one proxy of 15 has it all, unless every layer goes to another one.
    full = full_layout(AtomCounts(8, 28672, 0), 8, 16)
    layout = ParallelLayout(8, (*full.replicas[1:], replace(full.replicas[0], replica=16)))
    layout = vacate(layout, SlotRef(4, 5))
    plan = plan_sync(layout)
    layer = AtomSizes(kv_group=18 * 1024 * 1024, mlp_column=24 * 1024, vocab_row=0, replicated=0)
    model = AtomSizes(80 * layer.kv_group, 80 * layer.mlp_column, 0, 0)
    slots = [ref for ref in layout.slots() if ref.slot == 5]
    uniform = uniform_ring_bytes(layout, model, 4)
    once = sync_bytes(plan, layout, (model,), 4, slots)
    layered = sync_bytes(plan, layout, (layer,) * 80, 4, slots)
    assert max(once.values()) / uniform > 1.1
    assert max(layered.values()) / uniform < 1.04


def test_ring_and_megatron_figures() -> None:
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 4) == 150
    assert ring_bytes(100, 3) == 134
    layout = reduced(4, 2, (3,), columns=48)
    megatron = megatron_bytes(layout, COLUMNS, 4)
    # 16 columns a core rank, of which 4 come from the spare rank and go back there.
    assert (megatron.between, megatron.within) == (16 * 4000, 4 * 4000)
    # 50 columns: the core ranks' 13, 13 and 12 become 17, 17 and 16.
    megatron = megatron_bytes(reduced(4, 2, (3,), columns=50), COLUMNS, 4)
    assert (megatron.between, megatron.within) == (17 * 4000, 4 * 4000)
    full = full_layout(AtomCounts(0, 48, 0), 4, 2)
    assert megatron_bytes(full, COLUMNS, 4).between == uniform_ring_bytes(full, COLUMNS, 4)
    assert megatron_bytes(full, COLUMNS, 4).within == 0


def test_malformed_plans_are_rejected() -> None:
    plan = plan_sync(reduced(8, 16, (3,)))
    sync = plan.homes[3]
    with pytest.raises(ValueError, match="sorted and distinct"):
        replace(sync, members=sync.members[::-1])
    with pytest.raises(ValueError, match="sorted and distinct"):
        replace(sync, leaves=(0, 1))
    with pytest.raises(ValueError, match="sorted and distinct"):
        replace(sync, leaves=(0, 0))
    with pytest.raises(ValueError, match="must be its slots"):
        replace(sync, home=2)
    with pytest.raises(ValueError, match="slot order"):
        SyncPlan(plan.homes[::-1])
