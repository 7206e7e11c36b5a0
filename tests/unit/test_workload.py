"""What a sample costs: the work of the most loaded slot of the slowest stage, at its pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.pace import Pace
from elastic.workload import (
    SplitBatchBy,
    replica_work,
    replica_works,
    sample_costs,
    slot_work,
)
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import ParallelLayout, SlotRef, full_layout, vacate

COUNTS = AtomCounts(kv_groups=8, mlp_columns=12, vocab_rows=16)
SIZES = (AtomSizes(kv_group=100, mlp_column=10, vocab_row=1, replicated=7),)


def wounded() -> ParallelLayout:
    """TP4, TP3 and TP1."""
    layout = full_layout(COUNTS, 4, 3)
    for replica, slot in ((1, 2), (2, 0), (2, 1), (2, 3)):
        layout = vacate(layout, SlotRef(replica, slot))
    return layout


def test_the_work_of_a_slot_is_what_it_holds_without_replicated_tensors() -> None:
    whole, three, one = (replica.shards for replica in wounded().replicas)
    assert slot_work(whole, 0, SIZES[0]) == 2 * 100 + 3 * 10 + 4
    assert slot_work(three, 2, SIZES[0]) == 0
    assert slot_work(one, 2, SIZES[0]) == 8 * 100 + 12 * 10 + 16


def test_a_replica_works_as_long_as_its_most_loaded_slot() -> None:
    # Three slots of eight KV groups: one has 2, two have 3.
    assert replica_works(wounded(), SIZES) == (234, 3 * 100 + 4 * 10 + 6, 936)


def test_the_slowest_stage_counts() -> None:
    output = AtomSizes(kv_group=100, mlp_column=10, vocab_row=50, replicated=7)
    layout = wounded().replicas[0]
    assert replica_work(layout, (*SIZES, output)) == 2 * 100 + 3 * 10 + 4 * 50


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=6))
def test_works_are_those_of_each_replica_alone(losses: list[tuple[int, int]]) -> None:
    layout = full_layout(COUNTS, 4, 3)
    for replica, slot in losses:
        active = layout.replica(replica).active
        if slot in active and len(active) > 1:
            layout = vacate(layout, SlotRef(replica, slot))
    slow = tuple(
        max(slot_work(r.shards, slot, SIZES[0]) for slot in r.active) for r in layout.replicas
    )
    assert replica_works(layout, SIZES) == slow


def test_costs_follow_the_setting() -> None:
    layout = wounded()
    assert sample_costs(SplitBatchBy.EQUAL, layout, SIZES, {}) == (1, 1, 1)
    assert sample_costs(SplitBatchBy.DEGREE, layout, SIZES, {}) == (234, 346, 936)
    assert sample_costs(SplitBatchBy.SPEED, layout, SIZES, {}) == (234, 346, 936)


def test_a_pace_is_scaled_to_the_work_of_the_present_layout() -> None:
    layout, full = wounded(), full_layout(COUNTS, 4, 3)
    paces = {
        0: Pace(2.0, layout.replica(0)),
        1: Pace(3.0, full.replica(1)),
        2: Pace(9.0, layout.replica(2)),
    }
    costs = sample_costs(SplitBatchBy.SPEED, layout, SIZES, paces)
    assert costs == pytest.approx((2.0, 3.0 * 346 / 234, 9.0))


def test_a_replica_that_was_never_measured_has_the_median_speed() -> None:
    full = full_layout(COUNTS, 4, 4)
    paces = {
        replica: Pace(seconds, full.replica(replica))
        for replica, seconds in ((0, 2.0), (1, 3.0), (3, 100.0))
    }
    costs = sample_costs(SplitBatchBy.SPEED, full, SIZES, paces)
    assert costs == pytest.approx((2.0, 3.0, 3.0, 100.0))
