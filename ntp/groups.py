"""Layout -> the process groups of a rank, in order.

Creating communicators is collective, so every rank must make the same groups in the same order.
This module fixes that order as data: the world; one group per pipeline stage, in which gradients
are summed and shards travel; per replica a tensor-parallel group in each stage, also when it has a
single member, and a pipeline group per slot; then, per home slot and stage, the members that the
sync plan names, which all-reduce the gradients of its home atoms. With one stage the world is the
stage and nothing is in a pipeline, so those groups are left out, as is a home group of one, which
has nobody to reduce with.

Now and then a worker that has no place any more holds what others need: a *donor*. Its rank follows
those of the world, and it is only in the meeting, a group of all that take part in the change of
layout; without donors that is the world itself.

A rank of the world is a position in `places`; within a stage it is a position in `layout.slots()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from operator import itemgetter, lt
from typing import NamedTuple

from ntp.geometry import ParallelLayout, SlotRef
from ntp.sync_plan import SyncPlan


class GroupAxis(StrEnum):
    """What the members of a group have in common."""

    WORLD = "world"
    MEETING = "meeting"
    STAGE = "stage"
    TENSOR = "tensor"
    PIPELINE = "pipeline"
    HOME = "home"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One process group.

    `index`: () for WORLD and MEETING, (stage,) for STAGE, (replica, stage) for TENSOR,
    (replica, slot) for PIPELINE, (stage, home slot) for HOME. Raises ValueError unless `ranks` are
    one or more, ascending and distinct.
    """

    axis: GroupAxis
    index: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(map(lt, self.ranks, self.ranks[1:]))
        if not self.ranks or not ascending or self.ranks[0] < 0:
            raise ValueError(
                f"ranks {self.ranks} of group {self.axis} {self.index} must be one or more, "
                "from 0, ascending and distinct"
            )


class Coordinate(NamedTuple):
    """A place in the grid of replicas, pipeline stages and tensor-parallel slots."""

    replica: int
    stage: int
    slot: int

    @property
    def slot_ref(self) -> SlotRef:
        """The place without its stage, as the geometry of one stage names it."""
        return SlotRef(self.replica, self.slot)

    def __str__(self) -> str:
        stage = f" stage {self.stage}" if self.stage else ""
        return f"replica {self.replica}{stage} slot {self.slot}"


def places(layout: ParallelLayout, stages: int) -> tuple[Coordinate, ...]:
    """All places that a worker fills, by rank of the world. All stages have the same layout."""
    return tuple(
        Coordinate(replica.replica, stage, slot)
        for replica in layout.replicas
        for stage in range(stages)
        for slot in replica.active
    )


def groups_of(
    rank: int, layout: ParallelLayout, sync: SyncPlan, stages: int, donors: int = 0
) -> tuple[GroupSpec, ...]:
    """The groups that `rank` is in, in creation order; see the module's docstring.

    `sync` is the sync plan of `layout`. Raises ValueError if there is no such rank.
    """
    # A replica's ranks: those of its first stage, then those of the next, and so on.
    begins: dict[int, int] = {}
    world = 0
    for replica in layout.replicas:
        begins[replica.replica] = world
        world += replica.degree * stages
    if not 0 <= rank < world + donors:
        raise ValueError(f"rank {rank} is not one of 0..{world + donors - 1}")
    meeting = [GroupSpec(GroupAxis.MEETING, (), tuple(range(world + donors)))] if donors else []
    if rank >= world:
        return tuple(meeting)
    number, begin = max((each for each in begins.items() if each[1] <= rank), key=itemgetter(1))
    mine = layout.replica(number)
    stage, position = divmod(rank - begin, mine.degree)
    slot = mine.active[position]

    groups = [GroupSpec(GroupAxis.WORLD, (), tuple(range(world))), *meeting]
    if stages > 1:
        ranks = tuple(
            begins[replica.replica] + stage * replica.degree + at
            for replica in layout.replicas
            for at in range(replica.degree)
        )
        groups.append(GroupSpec(GroupAxis.STAGE, (stage,), ranks))
    first = begin + stage * mine.degree
    ranks = tuple(range(first, first + mine.degree))
    groups.append(GroupSpec(GroupAxis.TENSOR, (number, stage), ranks))
    if stages > 1:
        ranks = tuple(range(begin + position, begin + stages * mine.degree, mine.degree))
        groups.append(GroupSpec(GroupAxis.PIPELINE, (number, slot), ranks))
    members = [layout.replica(member.replica) for member in sync.homes[slot].members]
    if mine in members and len(members) > 1:
        ranks = tuple(
            begins[member.replica] + stage * member.degree + member.active.index(slot)
            for member in members
        )
        groups.append(GroupSpec(GroupAxis.HOME, (stage, slot), ranks))
    return tuple(groups)
