"""Layout -> process groups, as ordered lists of ranks.

Creating communicators is collective, so every rank must make the same groups in the same order.
This module fixes that order as data: the world; one tensor-parallel group per replica, also when it
has a single member; then, per home slot, the ranks of that slot in all replicas where it is active,
which all-reduce the gradients of its home atoms. A home group of one has nobody to reduce with and
is left out. A rank is a position in `layout.slots()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ntp.geometry import ParallelLayout


class GroupAxis(StrEnum):
    """What the members of a group have in common."""

    WORLD = "world"
    TENSOR = "tensor"
    HOME = "home"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One process group. `index`: replica for TENSOR, home slot for HOME, 0 for WORLD.

    Raises ValueError unless `ranks` are one or more, ascending and distinct.
    """

    axis: GroupAxis
    index: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 0:
            raise ValueError(
                f"ranks {self.ranks} of group {self.axis} {self.index} must be one or more, "
                "from 0, ascending and distinct"
            )


def plan_groups(layout: ParallelLayout) -> tuple[GroupSpec, ...]:
    """Groups in creation order: WORLD, TENSOR by replica, HOME by slot (of two members or more)."""
    slots = layout.slots()
    groups = [GroupSpec(GroupAxis.WORLD, 0, tuple(range(len(slots))))]
    for replica in layout.replicas:
        ranks = tuple(rank for rank, ref in enumerate(slots) if ref.replica == replica.replica)
        groups.append(GroupSpec(GroupAxis.TENSOR, replica.replica, ranks))
    for home in range(layout.tp_base):
        ranks = tuple(rank for rank, ref in enumerate(slots) if ref.slot == home)
        if len(ranks) >= 2:
            groups.append(GroupSpec(GroupAxis.HOME, home, ranks))
    return tuple(groups)
