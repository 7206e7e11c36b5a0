"""Which worker processes exist, are ready, or are gone for good.

Pure. An identity is never reused: a member that failed stays failed, whatever a late record of its
node still says of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from elastic.messages import AgentRecord
from elastic.topology import Coordinate, DeviceId, Member


class Membership:
    """Book of members, by the devices that the grid's places belong to."""

    def __init__(self, places: Mapping[DeviceId, Coordinate]) -> None:
        self._places = dict(places)
        self._ready: dict[DeviceId, Member] = {}
        self._gone: set[Member] = set()
        self._agents: dict[int, AgentRecord] = {}

    def record(self, record: AgentRecord) -> set[Member]:
        """Take what an agent says of its node; returns the workers of an earlier life of it."""
        known = self._agents.get(record.node)
        ended: set[Member] = set()
        if known is not None and record.life < known.life:
            return ended
        if known is not None and record.life > known.life:
            ended = self.remove_node(record.node)
        self._agents[record.node] = record
        for member in record.ready:
            if member not in self._gone and member.device in self._places:
                self._ready[member.device] = member
        return ended

    def remove(self, member: Member) -> None:
        """The member failed and is fenced."""
        self._gone.add(member)
        if self._ready.get(member.device) == member:
            del self._ready[member.device]

    def remove_node(self, node: int) -> set[Member]:
        """The node's agent is gone, and its workers with it; returns those that were ready."""
        self._agents.pop(node, None)
        lost = {member for device, member in self._ready.items() if device.node == node}
        for member in lost:
            self.remove(member)
        return lost

    def workers(self) -> dict[Coordinate, Member]:
        """Ready workers by place, in order of place."""
        found = {self._places[device]: member for device, member in self._ready.items()}
        return dict(sorted(found.items()))

    def alive(self) -> set[Member]:
        """The ready workers themselves."""
        return set(self._ready.values())

    def missing(self) -> list[DeviceId]:
        """Devices whose place has no ready worker."""
        return [device for device in self._places if device not in self._ready]

    @property
    def rendezvous(self) -> str:
        """host:port of the rendezvous store to use: that of the first node with a ready worker."""
        nodes = sorted({device.node for device in self._ready} & set(self._agents))
        return self._agents[nodes[0]].rendezvous if nodes else ""
