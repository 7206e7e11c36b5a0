"""Layout -> process groups, as ordered lists of ranks.

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

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from operator import lt

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


@dataclass(frozen=True, slots=True, order=True)
class Coordinate:
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


def plan_groups(
    layout: ParallelLayout, sync: SyncPlan, stages: int, donors: int = 0
) -> tuple[GroupSpec, ...]:
    """The groups in creation order; see the module's docstring."""
    # Base of a slot is its rank in the first stage; in the next stage it is `degree` further on.
    bases: dict[int, dict[int, int]] = {}
    begin = 0
    for replica in layout.replicas:
        bases[replica.replica] = {slot: begin + at for at, slot in enumerate(replica.active)}
        begin += replica.degree * stages
    degrees = {replica.replica: replica.degree for replica in layout.replicas}
    groups = [GroupSpec(GroupAxis.WORLD, (), tuple(range(begin)))]
    if donors:
        groups.append(GroupSpec(GroupAxis.MEETING, (), tuple(range(begin + donors))))
    if stages > 1:
        strides = [(base, degrees[number]) for number, of in bases.items() for base in of.values()]
        groups += _in_each_stage(GroupAxis.STAGE, (), strides, stages)
    for number, of in bases.items():
        degree, first = degrees[number], min(of.values())
        for stage in range(stages):
            ranks = tuple(range(first + stage * degree, first + (stage + 1) * degree))
            groups.append(GroupSpec(GroupAxis.TENSOR, (number, stage), ranks))
        if stages > 1:
            for slot, base in of.items():
                ranks = tuple(range(base, base + stages * degree, degree))
                groups.append(GroupSpec(GroupAxis.PIPELINE, (number, slot), ranks))
    for home in sync.homes:
        if len(home.members) >= 2:
            strides = [(bases[m.replica][m.slot], degrees[m.replica]) for m in home.members]
            groups += _in_each_stage(GroupAxis.HOME, (home.home,), strides, stages)
    return tuple(groups)


def _in_each_stage(
    axis: GroupAxis, index: tuple[int, ...], strides: list[tuple[int, int]], stages: int
) -> Iterator[GroupSpec]:
    """One group a stage; `strides` has the base and the degree of each member."""
    for stage in range(stages):
        ranks = tuple([base + stage * degree for base, degree in strides])
        yield GroupSpec(axis, (stage, *index), ranks)
