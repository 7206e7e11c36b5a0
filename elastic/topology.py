"""Who sits where: devices, worker processes, and their places in the model's grid."""

from __future__ import annotations

from dataclasses import dataclass

from health.events import DeviceId
from ntp.geometry import SlotRef

__all__ = ["Assignment", "Coordinate", "DeviceId", "Member"]


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
        return f"replica {self.replica} slot {self.slot}"


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
