"""Which worker processes exist, are ready, or are gone for good.

Pure. An identity is never reused: a member that failed stays failed, whatever a late record of its
node still says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from elastic.messages import AgentRecord
from elastic.topology import Coordinate, DeviceId, Member


class Membership:
    """Book of members by device. `homes` are the devices that the grid's places prefer; devices
    beyond them are spares. `changes` counts how often a worker became ready or went, or was to;
    `idle` are the ready workers that were not employed when that was told last.

    A node whose agent drains is to be left. Once nothing of it is needed it is dismissed: its
    workers are gone then, whatever is still heard of that life of its agent.
    """

    def __init__(self, devices: Iterable[DeviceId], homes: Mapping[Coordinate, DeviceId]) -> None:
        self.homes = homes
        self.changes = 0
        self.idle: set[Member] = set()
        self._devices = frozenset(devices)
        self._ready: dict[DeviceId, Member] = {}
        self._preferred = frozenset(homes.values())
        self._missing = set(self._preferred)
        self._gone: set[Member] = set()
        self._agents: dict[int, AgentRecord] = {}
        self._draining: dict[int, AgentRecord] = {}
        self._dismissed: set[tuple[int, int]] = set()

    def record(self, record: AgentRecord) -> set[Member]:
        """Take what an agent says of its node; returns the workers of an earlier life of it."""
        known = self._agents.get(record.node)
        ended: set[Member] = set()
        if (record.node, record.life) in self._dismissed:
            return ended
        if known is not None and record.life < known.life:
            return ended
        if known is not None and record.life > known.life:
            ended = self.remove_node(record.node)
        self._agents[record.node] = record
        if record.draining:
            self.changes += record.node not in self._draining
            self._draining[record.node] = record
        for member in record.ready:
            is_new = member not in self._gone and self._ready.get(member.device) != member
            if is_new and member.device in self._devices:
                self.idle.discard(self._ready.get(member.device, member))
                self._ready[member.device] = member
                self.idle.add(member)
                self._missing.discard(member.device)
                self.changes += 1
        return ended

    def remove(self, member: Member) -> None:
        """The member failed and is fenced."""
        self._gone.add(member)
        if self._ready.get(member.device) == member:
            del self._ready[member.device]
            self.idle.discard(member)
            if member.device in self._preferred:
                self._missing.add(member.device)
            self.changes += 1

    def employ(self, members: Set[Member]) -> None:
        """These are at work, and nobody else is until it is told again."""
        self.idle = self.alive() - members

    def remove_node(self, node: int) -> set[Member]:
        """The node's agent is gone, and its workers with it; returns those that were ready."""
        self._agents.pop(node, None)
        self._draining.pop(node, None)
        lost = {member for device, member in self._ready.items() if device.node == node}
        for member in lost:
            self.remove(member)
        return lost

    def life(self, node: int) -> int | None:
        """The number of the node's present agent; None if it has none."""
        record = self._agents.get(node)
        return record.life if record is not None else None

    def dismiss(self, node: int, life: int) -> None:
        """The agent of `node` in its life `life` may leave, or may have left."""
        self._dismissed.add((node, life))
        agent = self._agents.get(node)
        if agent is not None and agent.life == life:
            self.remove_node(node)

    @property
    def draining(self) -> tuple[AgentRecord, ...]:
        """The agents that are to leave and may not yet."""
        return tuple(self._draining.values())

    def leaving(self) -> frozenset[DeviceId]:
        """The devices of these agents."""
        return frozenset(device for agent in self.draining for device in agent.devices)

    def is_ready(self, device: DeviceId) -> bool:
        """Whether a worker is ready on the device."""
        return device in self._ready

    def is_gone(self, member: Member) -> bool:
        """Whether the member is known to have failed, or to have ended with its node."""
        return member in self._gone

    def workers(self) -> Mapping[DeviceId, Member]:
        """The ready worker of each device that has one, as of now and of later."""
        return MappingProxyType(self._ready)

    def alive(self) -> set[Member]:
        """The ready workers themselves."""
        return set(self._ready.values())

    @property
    def complete(self) -> bool:
        """Whether every device that places prefer has a ready worker to stay."""
        return not self._missing and not self._preferred & self.leaving()

    def missing(self) -> list[DeviceId]:
        """Devices without a ready worker to stay that places prefer."""
        return sorted(self._missing | (self._preferred & self.leaving()))

    @property
    def rendezvous(self) -> str:
        """host:port of the rendezvous store to use: that of the first node with a ready worker,
        if possible of one that stays."""
        staying = self._agents.keys() - self._draining.keys()
        for node in (*sorted(staying), *sorted(self._draining)):
            agent = self._agents[node]
            if not self._ready.keys().isdisjoint(agent.devices):
                return agent.rendezvous
        return ""
