"""Process groups: order, membership and ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import AtomCounts
from ntp.geometry import ParallelLayout, SlotRef, full_layout, with_active
from ntp.groups import GroupAxis, GroupSpec, plan_groups


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.data())
def test_groups_partition_the_world(base: int, data: st.DataObject) -> None:
    full = full_layout(AtomCounts(12, 12, 12), base, data.draw(st.integers(1, 4)))
    some = st.sets(st.integers(0, base - 1), min_size=1)
    layout = ParallelLayout(
        base,
        tuple(with_active(replica, tuple(sorted(data.draw(some)))) for replica in full.replicas),
    )
    slots = layout.slots()
    world, *rest = plan_groups(layout)
    assert world == GroupSpec(GroupAxis.WORLD, 0, tuple(range(len(slots))))
    tensor = [group for group in rest if group.axis is GroupAxis.TENSOR]
    home = [group for group in rest if group.axis is GroupAxis.HOME]
    assert rest == tensor + home
    assert sum((group.ranks for group in tensor), ()) == world.ranks
    assert [group.index for group in tensor] == [replica.replica for replica in layout.replicas]
    for group in tensor:
        assert {slots[rank].replica for rank in group.ranks} == {group.index}
    assert [group.index for group in home] == sorted({group.index for group in home})
    for slot in range(base):
        ranks = tuple(rank for rank, ref in enumerate(slots) if ref.slot == slot)
        found = [group.ranks for group in home if group.index == slot]
        assert found == ([ranks] if len(ranks) > 1 else [])


def test_one_vacant_slot_and_a_dropped_replica() -> None:
    full = full_layout(AtomCounts(4, 4, 4), 2, 3)
    replicas = (full.replicas[0], with_active(full.replicas[2], (1,)))
    layout = ParallelLayout(2, replicas)
    assert layout.slots() == (SlotRef(0, 0), SlotRef(0, 1), SlotRef(2, 1))
    assert plan_groups(layout) == (
        GroupSpec(GroupAxis.WORLD, 0, (0, 1, 2)),
        GroupSpec(GroupAxis.TENSOR, 0, (0, 1)),
        GroupSpec(GroupAxis.TENSOR, 2, (2,)),
        GroupSpec(GroupAxis.HOME, 1, (1, 2)),
    )


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0), (-1, 0)])
def test_planted_faults_are_rejected(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending and distinct"):
        GroupSpec(GroupAxis.WORLD, 0, ranks)
