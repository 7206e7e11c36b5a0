"""A worker's communicators, and which of them belong to its replica, as `elastic.worker` has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

from links import Broken, Comm
from sim_process import Wait

from elastic.messages import Quiesce
from elastic.plan import Plan
from elastic.topology import Assignment, Member
from ntp.groups import GroupAxis

GroupKey = tuple[GroupAxis, tuple[int, ...]]

BUILD_SECONDS = 3.0
"""How long a worker waits for the others of a group."""


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
        return bool(groups) and not self.broken(groups)

    @property
    def unbroken(self) -> bool:
        """Whether this member has communicators, and severed none of them."""
        return bool(self.comms) and not self.broken(
            {key: comm.members for key, comm in self.comms.items()}
        )

    def broken(self, groups: Mapping[GroupKey, tuple[Member, ...]]) -> set[GroupKey]:
        """Those that this member does not have, or severed."""
        return {
            key
            for key, names in groups.items()
            if (live := self.comms.get(key)) is None or not live.intact(self._member, names)
        }

    def shrinking(
        self, plan: Plan, wanted: Mapping[GroupKey, tuple[Member, ...]]
    ) -> dict[GroupKey, tuple[Member, ...]]:
        """The members, up to now, of the groups that only lose some; none if any group broke."""
        return self.smaller(wanted) if plan.unbroken else {}

    def smaller(
        self, wanted: Mapping[GroupKey, tuple[Member, ...]]
    ) -> dict[GroupKey, tuple[Member, ...]]:
        """The members, up to now, of the groups that only lose some."""
        return {
            key: live.members
            for key, live in self.comms.items()
            if (names := wanted.get(key)) is not None
            and len(names) < len(live.members)
            and tuple(member for member in live.members if member in names) == names
        }

    def adopt(
        self,
        plan: Plan,
        wanted: Mapping[GroupKey, tuple[Member, ...]],
        kept: Collection[GroupKey],
        communicator: Callable[..., Comm],
    ) -> Generator[Wait, Any, None]:
        """Have the groups that are wanted; `communicator` is `World.communicator`."""
        shrunk = self.shrinking(plan, wanted)
        held = {key: wanted[key] for key in kept} | shrunk
        self.close(held)
        for key, names in wanted.items():
            if key in held and self.broken({key: held[key]}):
                raise Broken(f"{key} was to go on, but was severed meanwhile")
            if key in kept:
                continue
            self.building = communicator(plan, key, names, shrunk=key in shrunk)
            try:
                made = yield self.building.build(self._member, BUILD_SECONDS)
            finally:
                self.building = None
            if key in shrunk:
                self.comms[key].sever(self._member)
            self.comms[key] = made

    def stop(self, keep: Collection[GroupKey]) -> None:
        """End all but these on this member's side, and the wait for one that is being made."""
        self.sever(keep)
        if self.building is not None:
            self.building.sever(self._member)

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
