"""The throughput model against the split that plans really make."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import job_shape

from elastic.apportion import apportion
from elastic.job_shape import JobShape
from elastic.pace import Pace
from elastic.throughput import (
    TYPICAL,
    Crew,
    fullest_slot,
    makespan,
    planned_throughput,
    relative_paces,
    throughput_model,
)
from elastic.workload import SplitBatchBy, replica_work
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import full_layout, with_active


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(0, 60),
    st.integers(1, 3),
)
def test_the_makespan_is_that_of_the_split(
    crews: list[tuple[int, int]], extra: int, least: int
) -> None:
    costs = [cost for cost, count in crews for _ in range(count)]
    total = least * len(costs) + extra
    shares = apportion(total, costs, least)
    slowest = max(share * cost for share, cost in zip(shares, costs, strict=True))
    assert makespan(total, crews, least) == slowest


def test_too_few_samples_or_nobody_make_no_step() -> None:
    assert makespan(3, [(1, 4)], 1) is None
    assert makespan(3, [], 1) is None


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 20), st.data())
def test_the_fullest_slot_of_a_degree_is_that_of_its_layout(
    tensor: int, kv: int, columns: int, data: st.DataObject
) -> None:
    counts = AtomCounts(tensor + kv, tensor + columns, tensor)
    sizes = AtomSizes(7, 3, 2, 5)
    whole = full_layout(counts, tensor, 1).replicas[0]
    active = data.draw(st.sets(st.integers(0, tensor - 1), min_size=1).map(sorted))
    reduced = with_active(whole, tuple(active))
    bound = fullest_slot(counts, sizes, len(active))
    # Each axis deals out its odd atoms by itself, so not always to the same slots.
    assert bound - (7 + 3 + 2) < replica_work(reduced, (sizes,)) <= bound
    assert fullest_slot(counts, sizes, tensor) == replica_work(whole, (sizes,))


def test_throughput_is_relative_to_full_strength() -> None:
    model = throughput_model(job_shape(), {})
    assert model.throughput(Counter({Crew(2): 2})) == 1.0
    assert model.throughput(Counter({Crew(2): 1, Crew(0): 1})) == 0.5
    assert model.throughput({}) == 0.0
    # TP1 takes 3 samples of 56 in the time of 5 of 29.
    assert model.throughput(Counter({Crew(2): 1, Crew(1): 1})) == 4 * 29 / (3 * 56)


def test_an_equal_split_waits_for_the_slowest() -> None:
    shape = replace(job_shape(), split_batch_by=SplitBatchBy.EQUAL)
    model = throughput_model(shape, {})
    assert model.throughput(Counter({Crew(2): 1, Crew(1): 1})) == 29 / 56
    assert model.step(Counter({Crew(2): 3})) == 3 * 29 * TYPICAL


@pytest.mark.parametrize("by", SplitBatchBy)
def test_paces_count_only_if_the_batch_is_split_by_them(by: SplitBatchBy) -> None:
    shape = replace(job_shape(replicas=3), split_batch_by=by)
    layouts = full_layout(shape.counts, 2, 3).replicas
    seconds = {0: 1.0, 1: 1.02, 2: 3.0}
    paces = {number: Pace(each, layouts[number]) for number, each in seconds.items()}
    found = relative_paces(shape, paces)
    # Two percent are noise; tenths are what counts.
    assert found == ({0: 10, 1: 10, 2: 29} if by is SplitBatchBy.SPEED else {})


def test_the_throughput_of_a_plan_is_that_of_its_layout_and_split() -> None:
    shape: JobShape = job_shape()
    layout = full_layout(shape.counts, 2, 2)
    assert planned_throughput(shape, layout, (4, 4), {}) == 1.0
    assert planned_throughput(shape, layout, (2, 6), {}) == 4 / 6
