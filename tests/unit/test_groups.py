"""Process groups: order, membership and ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import AtomCounts
from ntp.geometry import ParallelLayout, SlotRef, full_layout, with_active
from ntp.groups import Coordinate, GroupAxis, GroupSpec, places, plan_groups
from ntp.sync_plan import plan_sync


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.data())
def test_groups_partition_the_world(base: int, stages: int, data: st.DataObject) -> None:
    full = full_layout(AtomCounts(12, 12, 12), base, data.draw(st.integers(1, 4)))
    some = st.sets(st.integers(0, base - 1), min_size=1)
    layout = ParallelLayout(
        base,
        tuple(with_active(replica, tuple(sorted(data.draw(some)))) for replica in full.replicas),
    )
    sync = plan_sync(layout)
    grid = places(layout, stages)
    groups = plan_groups(layout, sync, stages)
    assert groups[0] == GroupSpec(GroupAxis.WORLD, (), tuple(range(len(grid))))
    found: dict[GroupAxis, dict[tuple[int, ...], tuple[Coordinate, ...]]] = {}
    for group in groups:
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
    assert plan_groups(full, plan_sync(full), 2) == (
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
    )


def test_a_dropped_replica_has_no_group() -> None:
    full = full_layout(AtomCounts(4, 4, 4), 2, 3)
    layout = ParallelLayout(2, (full.replicas[0], full.replicas[2]))
    assert layout.slots() == (SlotRef(0, 0), SlotRef(0, 1), SlotRef(2, 0), SlotRef(2, 1))
    assert plan_groups(layout, plan_sync(layout), 1) == (
        GroupSpec(GroupAxis.WORLD, (), (0, 1, 2, 3)),
        GroupSpec(GroupAxis.TENSOR, (0, 0), (0, 1)),
        GroupSpec(GroupAxis.TENSOR, (2, 0), (2, 3)),
        GroupSpec(GroupAxis.HOME, (0, 0), (0, 2)),
        GroupSpec(GroupAxis.HOME, (0, 1), (1, 3)),
    )


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0), (-1, 0)])
def test_planted_faults_are_rejected(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending and distinct"):
        GroupSpec(GroupAxis.WORLD, (), ranks)
