"""Who works for the same replica, and in which groups: as `elastic.worker` finds it in a plan."""

from __future__ import annotations

from elastic.plan import Plan
from elastic.topology import Assignment, Member
from ntp.groups import GroupAxis

GroupKey = tuple[GroupAxis, tuple[int, ...]]


def replica_mates(plan: Plan | None, member: Member) -> list[Assignment]:
    """Assignments of the replica that `member` works for, its own included; [] if it has none."""
    if plan is None:
        return []
    mine = {a.coordinate.replica for a in plan.placement if a.member == member}
    return [a for a in plan.placement if a.coordinate.replica in mine]


def replica_groups(plan: Plan | None, member: Member) -> dict[GroupKey, tuple[Member, ...]]:
    """The tensor-parallel and the pipeline group of `member`, with their members."""
    mates = replica_mates(plan, member)
    place = next((a.coordinate for a in mates if a.member == member), None)
    if place is None:
        return {}
    tensor = tuple(a.member for a in mates if a.coordinate.stage == place.stage)
    pipeline = tuple(a.member for a in mates if a.coordinate.slot == place.slot)
    groups = {(GroupAxis.TENSOR, (place.replica, place.stage)): tensor}
    if len(pipeline) > 1:
        groups[GroupAxis.PIPELINE, (place.replica, place.slot)] = pipeline
    return groups


def keepable(
    plan: Plan | None, member: Member, lost: tuple[Member, ...] = ()
) -> frozenset[GroupKey]:
    """The groups inside the replica of `member`, unless the replica lost somebody."""
    if any(a.member in lost for a in replica_mates(plan, member)):
        return frozenset()
    return frozenset(replica_groups(plan, member))
