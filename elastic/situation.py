"""What is known when a plan is made, and which devices it had better not use.

Pure. Two kinds of devices are avoided. A *quarantined* one has failed too often of late; it is kept
out, which says nothing about who runs on another. A *leaving* one is to be given up soon: its
worker is placed nowhere, but hands over what it holds. Either is used all the same where there is
no plan without it, as a job that goes on is worth more; so is a second copy of the state, for which
a quarantined device is used too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from elastic.answers import Answers
from elastic.pace import Pace
from elastic.plan import Plan
from elastic.topology import Coordinate, DeviceId, Member


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a plan is made.

    `workers` are the ready processes by device; `answers` what those of them that were running said
    when they stopped, and nothing of those that are gone; `history` the plans of this run by
    generation; `homes` the device that each place prefers; `paces` how fast those replicas were
    that have been measured; `checkpoint` is the last step that can be restored. If there is a plan
    without them, `quarantined` devices take no part, whoever runs on them, and `leaving` ones only
    hand over what they hold.

    Two things follow from that and are looked for if they are None, among all workers: the members
    of the newest plan that are `silent`, without an answer, and the workers that are `idle`, which
    were not asked for one.
    """

    generation: int
    workers: Mapping[DeviceId, Member]
    answers: Answers
    history: Mapping[int, Plan]
    rendezvous: str
    homes: Mapping[Coordinate, DeviceId]
    paces: Mapping[int, Pace] = field(default_factory=dict)
    quarantined: frozenset[DeviceId] = frozenset()
    leaving: frozenset[DeviceId] = frozenset()
    checkpoint: int | None = None
    silent: Set[Member] | None = None
    idle: Collection[Member] | None = None

    @property
    def previous(self) -> Plan | None:
        """The newest plan."""
        return self.history[max(self.history)] if self.history else None

    @property
    def avoided(self) -> frozenset[DeviceId]:
        """The devices that nobody is to be placed on."""
        return self.quarantined | self.leaving

    @property
    def admitted(self) -> Mapping[DeviceId, Member]:
        """The workers that may have a place."""
        avoided = self.avoided
        if not avoided:
            return self.workers
        return {device: member for device, member in self.workers.items() if device not in avoided}

    def without_quarantine(self) -> Situation:
        """The same, with quarantined devices like all others."""
        return replace(self, quarantined=frozenset())

    def less_avoided(self) -> Iterator[Situation]:
        """What to try, in this order, if there is no plan without the devices to be avoided."""
        if self.quarantined:
            yield self.without_quarantine()
        if self.leaving:
            yield replace(self, leaving=frozenset())
        if self.quarantined and self.leaving:
            yield replace(self, quarantined=frozenset(), leaving=frozenset())
