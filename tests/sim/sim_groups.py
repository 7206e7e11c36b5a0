"""A worker's communicators, and which of them belong to its replica, as `elastic.worker` has it."""

from __future__ import annotations

from collections.abc import Collection

from links import Comm

from elastic.messages import Quiesce
from elastic.plan import Plan
from elastic.topology import Assignment, Member
from ntp.groups import GroupAxis

GroupKey = tuple[GroupAxis, tuple[int, ...]]


class Groups:
    """The communicators that `member` has, by axis and index, and the one that it builds."""

    def __init__(self, member: Member) -> None:
        self.comms: dict[GroupKey, Comm] = {}
        self.building: Comm | None = None
        self._member = member

    @property
    def world(self) -> Comm:
        """Everybody with a place."""
        return self.comms[GroupAxis.WORLD, ()]

    @property
    def meeting(self) -> Comm:
        """Everybody who takes part in the change."""
        return self.comms.get((GroupAxis.MEETING, ())) or self.world

    def stage(self, stage: int) -> Comm:
        """Everybody in the stage."""
        return self.comms.get((GroupAxis.STAGE, (stage,)), self.world)

    def waits_since(self) -> float | None:
        """When the wait for others began that this member is in."""
        for comm in (*self.comms.values(), self.building):
            since = comm.waits_since(self._member) if comm is not None else None
            if since is not None:
                return since
        return None

    def replica_is_intact(self, plan: Plan | None) -> bool:
        """Whether this member has the groups of its replica, as it sees them."""
        groups = replica_groups(plan, self._member)
        return bool(groups) and all(
            (live := self.comms.get(key)) is not None and live.intact(self._member, names)
            for key, names in groups.items()
        )

    def sever(self, keep: Collection[GroupKey] = ()) -> None:
        """End all but these on this member's side."""
        for key, comm in self.comms.items():
            if key not in keep:
                comm.sever(self._member)

    def close(self, keep: Collection[GroupKey] = ()) -> None:
        """End all but these, and forget them."""
        self.sever(keep)
        self.comms = {key: comm for key, comm in self.comms.items() if key in keep}


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


def kept_through(quiesce: Quiesce, plan: Plan | None, member: Member) -> frozenset[GroupKey]:
    """The groups that `member` keeps when it is told to stop at once."""
    return frozenset() if quiesce.sever_all else keepable(plan, member, quiesce.lost)


def keepable(
    plan: Plan | None, member: Member, lost: tuple[Member, ...] = ()
) -> frozenset[GroupKey]:
    """The groups inside the replica of `member`, unless the replica lost somebody."""
    if any(a.member in lost for a in replica_mates(plan, member)):
        return frozenset()
    return frozenset(replica_groups(plan, member))
