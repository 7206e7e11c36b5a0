"""The split of samples: nothing is done sooner, held against trying every split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.apportion import apportion

whole_costs = st.lists(st.integers(1, 12), min_size=1, max_size=5)
measured_costs = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=12)


def every_split(total: int, bearers: int) -> Iterator[tuple[int, ...]]:
    if bearers == 1:
        yield (total,)
        return
    for first in range(1, total - bearers + 2):
        for rest in every_split(total - first, bearers - 1):
            yield (first, *rest)


def done_at(shares: Sequence[int], costs: Sequence[float]) -> list[float]:
    """When the bearers are done, the last one first."""
    return sorted((share * cost for share, cost in zip(shares, costs, strict=True)), reverse=True)


def one_by_one(total: int, costs: Sequence[float]) -> tuple[int, ...]:
    """The slow way: each sample to the bearer that is done with it first."""
    shares = [1] * len(costs)
    for _ in range(total - len(costs)):
        ends = [(share + 1) * cost for share, cost in zip(shares, costs, strict=True)]
        shares[ends.index(min(ends))] += 1
    return tuple(shares)


@given(costs=whole_costs, extra=st.integers(0, 9))
def test_no_split_is_done_sooner(costs: list[int], extra: int) -> None:
    total = len(costs) + extra
    shares = apportion(total, costs)
    assert sum(shares) == total and min(shares) >= 1
    best = min(done_at(each, costs)[0] for each in every_split(total, len(costs)))
    assert done_at(shares, costs)[0] == best


@given(costs=whole_costs, extra=st.integers(0, 300))
def test_the_start_is_where_giving_out_one_by_one_passes(costs: list[int], extra: int) -> None:
    total = len(costs) + extra
    assert apportion(total, costs) == one_by_one(total, costs)


@given(costs=measured_costs, extra=st.integers(0, 200))
def test_measured_costs_of_any_size_are_split_as_well(costs: list[float], extra: int) -> None:
    total = len(costs) + extra
    shares = apportion(total, costs)
    assert sum(shares) == total and min(shares) >= 1
    slowest = done_at(one_by_one(total, costs), costs)[0]
    assert done_at(shares, costs)[0] <= slowest * (1 + 1e-12)


@given(cost=st.floats(1e-6, 1e6), bearers=st.integers(1, 40), extra=st.integers(0, 500))
def test_equal_costs_are_split_evenly_and_the_first_take_what_is_left(
    cost: float, bearers: int, extra: int
) -> None:
    shares = apportion(bearers + extra, [cost] * bearers)
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)


@given(costs=whole_costs, extra=st.integers(0, 40), data=st.data())
def test_the_order_of_the_bearers_does_not_matter(
    costs: list[int], extra: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(costs))))
    total = len(costs) + extra
    shuffled = [costs[bearer] for bearer in order]
    last = done_at(apportion(total, costs), costs)[0]
    assert done_at(apportion(total, shuffled), shuffled)[0] == last


def test_a_wounded_replica_takes_its_part() -> None:
    # Three replicas at degree 4, 4 and 3: a slot of the last has 1/3 of the model, not 1/4.
    assert apportion(33, [3, 3, 4]) == (12, 12, 9)
    # As much as a replica's slots of 3, 3 and 2 groups need: the degree alone would say 3/4.
    assert apportion(16, [2, 3]) == (10, 6)


def test_even_the_slowest_takes_a_sample() -> None:
    assert apportion(4, [1, 10_000, 10_000, 10_000]) == (1, 1, 1, 1)
    assert apportion(6, [1, 10_000, 10_000, 10_000]) == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("total", "costs", "message"),
    [
        (2, [1, 1, 1], "2 samples cannot give each of 3 replicas 1 or more; use 1 to 2"),
        (2, [], "cannot give each of 0 replicas"),
        (2, [1, 0], r"costs \(1, 0\) must all be above 0"),
        (2, [1, float("nan")], "must all be above 0"),
    ],
)
def test_what_cannot_be_split_is_refused(total: int, costs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apportion(total, costs)
