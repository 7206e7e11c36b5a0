"""The communicators inside one replica, which go on as long as nobody of it is lost."""

from __future__ import annotations

from elastic.plan import Plan
from elastic.topology import Assignment, Member
from ntp.groups import GroupAxis
from ntp.process_groups import GroupKey


def replica_mates(plan: Plan, member: Member) -> list[Assignment]:
    """Assignments of the replica that `member` works for, its own included; [] if it has none."""
    replicas = {a.coordinate.replica for a in plan.placement if a.member == member}
    return [a for a in plan.placement if a.coordinate.replica in replicas]


def replica_groups(plan: Plan, member: Member) -> dict[GroupKey, tuple[str, ...]]:
    """The tensor-parallel and the pipeline group of `member`, with the names of their members."""
    mates = replica_mates(plan, member)
    place = next((a.coordinate for a in mates if a.member == member), None)
    if place is None:
        return {}
    groups: dict[GroupKey, tuple[str, ...]] = {
        (GroupAxis.TENSOR, (place.replica, place.stage)): tuple(
            str(a.member) for a in mates if a.coordinate.stage == place.stage
        )
    }
    if plan.stages > 1:
        groups[GroupAxis.PIPELINE, (place.replica, place.slot)] = tuple(
            str(a.member) for a in mates if a.coordinate.slot == place.slot
        )
    return groups
