"""Small clusters that lose devices: the plans before and after, without a controller."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.answers import Answers
from elastic.job_shape import JobShape, home_devices
from elastic.messages import Quiesced
from elastic.plan import NoPlan, Plan
from elastic.planner import Situation, plan_generation
from elastic.session import Session, standing
from elastic.topology import Coordinate, DeviceId, Member


def devices_on(shape: JobShape, per_node: int, spares: int = 0) -> tuple[DeviceId, ...]:
    """Nodes of so many devices each, filled in order."""
    total = shape.workers + spares
    return tuple(DeviceId(number // per_node, number % per_node) for number in range(total))


@dataclass(frozen=True)
class Cluster:
    """A run after some plans: the processes that are ready, and the history."""

    shape: JobShape
    devices: tuple[DeviceId, ...]
    workers: Mapping[DeviceId, Member]
    history: Mapping[int, Plan] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def homes(self) -> dict[Coordinate, DeviceId]:
        return home_devices(self.shape, self.devices)

    @property
    def plan(self) -> Plan:
        return self.history[max(self.history)]

    def with_settings(self, **settings: Any) -> Cluster:
        """Fields of the next situations."""
        return replace(self, settings=settings)

    def situation(self, step: int = 5) -> Situation:
        """Everybody who is placed and alive has stopped after `step`."""
        generation = max(self.history, default=0) + 1
        answers = Answers()
        for place, member in self.plan.placement if self.history else ():
            if self.workers.get(member.device) == member:
                held = standing(place.slot_ref, Session(step), generation - 1, 0)
                answers.take(Quiesced(generation, member, held, True, 0.0))
        return Situation(
            generation, self.workers, answers, self.history, "node0:7", self.homes, **self.settings
        )

    def next_plan(self) -> Plan | NoPlan:
        return plan_generation(self.shape, self.situation())

    def advance(self) -> Cluster:
        """The next plan is adopted."""
        plan = self.next_plan()
        assert isinstance(plan, Plan), plan
        return replace(self, history={**self.history, plan.generation: plan})

    def without(self, lost: Collection[DeviceId]) -> Cluster:
        """These devices are gone."""
        left = {device: m for device, m in self.workers.items() if device not in lost}
        return replace(self, workers=left)

    def without_places(self, *places: tuple[int, int, int]) -> Cluster:
        """Whoever sits in these places (replica, stage, slot) is gone."""
        now = dict(self.plan.placement)
        return self.without([now[Coordinate(*place)].device for place in places])

    def back(self, *devices: DeviceId) -> Cluster:
        """New processes on these devices."""
        new = {
            device: Member(device, 1 + max(m.incarnation for m in self.members_on(device)))
            for device in devices
        }
        return replace(self, workers={**self.workers, **new})

    def members_on(self, device: DeviceId) -> Sequence[Member]:
        """All processes that were seen on a device; at least one."""
        placed = {
            member
            for plan in self.history.values()
            for _, member in plan.participants
            if member.device == device
        }
        return sorted({Member(device, 1), *placed})


def start(shape: JobShape, per_node: int = 8, spares: int = 0) -> Cluster:
    """All devices are ready, and the first plan runs."""
    devices = devices_on(shape, per_node, spares)
    workers = {device: Member(device, 1) for device in devices}
    return Cluster(shape, devices, workers).advance()
