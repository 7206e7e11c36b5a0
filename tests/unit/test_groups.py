"""Process groups: order, membership and ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import AtomCounts
from ntp.geometry import ParallelLayout, SlotRef, full_layout, with_active
from ntp.groups import Coordinate, GroupAxis, GroupSpec, groups_of, places
from ntp.sync_plan import plan_sync


def all_groups(layout: ParallelLayout, stages: int, donors: int = 0) -> list[GroupSpec]:
    """Every group that some rank is in, once; asserts that its members agree, and on an order."""
    sync = plan_sync(layout)
    ranks = range(len(places(layout, stages)) + donors)
    of = {rank: groups_of(rank, layout, sync, stages, donors) for rank in ranks}
    groups = list(dict.fromkeys(group for own in of.values() for group in own))
    order = list(GroupAxis)
    for rank, own in of.items():
        assert {group for group in groups if rank in group.ranks} == set(own)
        # With at most one group of each axis, in one order, nobody waits in a circle.
        positions = [order.index(group.axis) for group in own]
        assert positions == sorted(set(positions))
    return groups


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.data())
def test_groups_partition_the_world(base: int, stages: int, data: st.DataObject) -> None:
    full = full_layout(AtomCounts(12, 12, 12), base, data.draw(st.integers(1, 4)))
    some = st.sets(st.integers(0, base - 1), min_size=1)
    layout = ParallelLayout(
        base,
        tuple(with_active(replica, tuple(sorted(data.draw(some)))) for replica in full.replicas),
    )
    donors = data.draw(st.integers(0, 2))
    sync = plan_sync(layout)
    grid = places(layout, stages)
    groups = all_groups(layout, stages, donors)
    assert groups[0] == GroupSpec(GroupAxis.WORLD, (), tuple(range(len(grid))))
    meetings = [group for group in groups if group.axis is GroupAxis.MEETING]
    everyone = tuple(range(len(grid) + donors))
    assert meetings == [GroupSpec(GroupAxis.MEETING, (), everyone)][: min(donors, 1)]
    found: dict[GroupAxis, dict[tuple[int, ...], tuple[Coordinate, ...]]] = {}
    for group in groups:
        if group.axis is GroupAxis.MEETING:
            continue
        ranks = tuple(grid[rank] for rank in group.ranks)
        assert group.index not in found.setdefault(group.axis, {})
        found[group.axis][group.index] = ranks

    def slow(*axes: str) -> dict[tuple[int, ...], tuple[Coordinate, ...]]:
        cells: dict[tuple[int, ...], tuple[Coordinate, ...]] = {}
        for place in grid:
            key = tuple(getattr(place, axis) for axis in axes)
            cells[key] = (*cells.get(key, ()), place)
        return cells

    assert found[GroupAxis.TENSOR] == slow("replica", "stage")
    if stages == 1:
        assert found.keys() <= {GroupAxis.WORLD, GroupAxis.TENSOR, GroupAxis.HOME}
    else:
        assert found[GroupAxis.STAGE] == slow("stage")
        assert found[GroupAxis.PIPELINE] == slow("replica", "slot")
        in_stage = [place.slot_ref for place in found[GroupAxis.STAGE][0,]]
        assert tuple(in_stage) == layout.slots()
    assert found.get(GroupAxis.HOME, {}) == {
        (stage, home.home): tuple(Coordinate(m.replica, stage, m.slot) for m in home.members)
        for stage in range(stages)
        for home in sync.homes
        if len(home.members) > 1
    }


def test_two_stages_of_two_replicas() -> None:
    full = full_layout(AtomCounts(4, 4, 4), 2, 2)
    assert places(full, 2)[:4] == tuple(Coordinate(0, s, t) for s in (0, 1) for t in (0, 1))
    assert set(all_groups(full, 2)) == {
        GroupSpec(GroupAxis.WORLD, (), tuple(range(8))),
        GroupSpec(GroupAxis.STAGE, (0,), (0, 1, 4, 5)),
        GroupSpec(GroupAxis.STAGE, (1,), (2, 3, 6, 7)),
        GroupSpec(GroupAxis.TENSOR, (0, 0), (0, 1)),
        GroupSpec(GroupAxis.TENSOR, (0, 1), (2, 3)),
        GroupSpec(GroupAxis.PIPELINE, (0, 0), (0, 2)),
        GroupSpec(GroupAxis.PIPELINE, (0, 1), (1, 3)),
        GroupSpec(GroupAxis.TENSOR, (1, 0), (4, 5)),
        GroupSpec(GroupAxis.TENSOR, (1, 1), (6, 7)),
        GroupSpec(GroupAxis.PIPELINE, (1, 0), (4, 6)),
        GroupSpec(GroupAxis.PIPELINE, (1, 1), (5, 7)),
        GroupSpec(GroupAxis.HOME, (0, 0), (0, 4)),
        GroupSpec(GroupAxis.HOME, (1, 0), (2, 6)),
        GroupSpec(GroupAxis.HOME, (0, 1), (1, 5)),
        GroupSpec(GroupAxis.HOME, (1, 1), (3, 7)),
    }


def test_a_dropped_replica_has_no_group() -> None:
    full = full_layout(AtomCounts(4, 4, 4), 2, 3)
    layout = ParallelLayout(2, (full.replicas[0], full.replicas[2]))
    assert layout.slots() == (SlotRef(0, 0), SlotRef(0, 1), SlotRef(2, 0), SlotRef(2, 1))
    assert set(all_groups(layout, 1)) == {
        GroupSpec(GroupAxis.WORLD, (), (0, 1, 2, 3)),
        GroupSpec(GroupAxis.TENSOR, (0, 0), (0, 1)),
        GroupSpec(GroupAxis.TENSOR, (2, 0), (2, 3)),
        GroupSpec(GroupAxis.HOME, (0, 0), (0, 2)),
        GroupSpec(GroupAxis.HOME, (0, 1), (1, 3)),
    }


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0), (-1, 0)])
def test_planted_faults_are_rejected(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending and distinct"):
        GroupSpec(GroupAxis.WORLD, (), ranks)


def test_a_rank_that_is_not_there() -> None:
    full = full_layout(AtomCounts(4, 4, 4), 2, 1)
    with pytest.raises(ValueError, match=r"rank 3 is not one of 0\.\.2"):
        groups_of(3, full, plan_sync(full), 1, donors=1)
