"""Who sits where: devices, worker processes, and their places in the model's grid.

Named tuples, as tens of thousands are hashed and compared in every plan of a large job.
"""

from __future__ import annotations

from typing import NamedTuple

from health.events import DeviceId
from ntp.groups import Coordinate

__all__ = ["INCARNATIONS_PER_LIFE", "Assignment", "Coordinate", "DeviceId", "Member"]


INCARNATIONS_PER_LIFE = 1_000_000
"""Each life of an agent numbers its processes in a range of its own, so no number is used twice."""


class Member(NamedTuple):
    """One worker process. An incarnation number is never reused on its device."""

    device: DeviceId
    incarnation: int

    @property
    def life(self) -> int:
        """The life of its node's agent that started it, from 1."""
        return (self.incarnation - 1) // INCARNATIONS_PER_LIFE + 1

    def __str__(self) -> str:
        return f"{self.device}#{self.incarnation}"


class Assignment(NamedTuple):
    """A worker process in a place; its rank is the position in the plan's placement."""

    coordinate: Coordinate
    member: Member
