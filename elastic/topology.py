"""Who sits where: devices, worker processes, and their places in the model's grid."""

from __future__ import annotations

from dataclasses import dataclass

from health.events import DeviceId
from ntp.groups import Coordinate

__all__ = ["Assignment", "Coordinate", "DeviceId", "Member"]


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One worker process. An incarnation number is never reused on its device."""

    device: DeviceId
    incarnation: int

    def __str__(self) -> str:
        return f"{self.device}#{self.incarnation}"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker process in a place; its rank is the position in the plan's placement."""

    coordinate: Coordinate
    member: Member
