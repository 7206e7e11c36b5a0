"""Who sits where: devices, worker processes, and their places in the model's grid.

Named tuples, as tens of thousands are hashed and compared in every plan of a large job.
"""

from __future__ import annotations

from typing import NamedTuple

from health.events import DeviceId
from ntp.groups import Coordinate

__all__ = ["Assignment", "Coordinate", "DeviceId", "Member"]


class Member(NamedTuple):
    """One worker process. An incarnation number is never reused on its device."""

    device: DeviceId
    incarnation: int

    def __str__(self) -> str:
        return f"{self.device}#{self.incarnation}"


class Assignment(NamedTuple):
    """A worker process in a place; its rank is the position in the plan's placement."""

    coordinate: Coordinate
    member: Member
