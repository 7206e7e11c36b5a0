"""What the oracle knows of devices that are to be avoided: those that drain, and the quarantined.

They get no place as long as there are others; and while nodes only drain, nobody is interrupted,
so that nothing is redone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from clock import Clock
from sim_store import Told

from elastic.effects import Note
from elastic.job_shape import JobShape
from elastic.messages import AgentRecord, Failed, Quiesce
from elastic.plan import Plan
from elastic.topology import Member


class Avoidance:
    """Sees the store and the notes of leaders. `is_calm`: nothing happened yet but drains."""

    def __init__(self, clock: Clock, shape: JobShape) -> None:
        self.is_calm = True
        self._clock = clock
        self._shape = shape
        self._records: dict[int, tuple[AgentRecord, int]] = {}
        self._failed: set[Member] = set()
        self._held: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._placed: set[Member] = set()

    def observe(self, told: Told, before: Any) -> None:
        """A write to the store."""
        match told.value:
            case None if isinstance(before, AgentRecord):
                self._records.pop(before.node, None)
            case AgentRecord() as record:
                self._records[record.node] = record, told.revision
            case Failed() as failed:
                self._failed.add(failed.member)
            case Quiesce(urgent=True, reason=reason):
                self._clock.check(not self.is_calm, f"a drain alone: {reason}")

    def _copies_without(self, plan: Plan, members: set[Member]) -> int:
        """Replicas that would have a complete slot if these had no place; 2 in a job of one."""
        if self._shape.replicas == 1:
            return 2
        left = Counter(p.slot_ref for p, member in plan.placement if member not in members)
        return len({ref.replica for ref, count in left.items() if count == self._shape.stages})

    def noted(self, leader: str, note: Note) -> None:
        """A leader writes to the journal."""
        if note.event == "quarantined":
            self._held[leader][note.fields["device"]] = note.fields["release_at"]

    def planned(self, leader: str, plan: Plan, seen: int) -> None:
        """A leader that knows the store up to revision `seen` is about to publish a plan."""
        now, check = self._clock.now, self._clock.check
        check(not (self.is_calm and plan.redone), f"a drain alone: {plan.reason}")
        known = [record for record, at in self._records.values() if at <= seen]
        draining = {record.node for record in known if record.draining}
        held = {device for device, until in self._held[leader].items() if now < until}
        placed = {member for _, member in plan.placement}
        came = placed - self._placed if self._placed else set()
        self._placed = {member for _, member in plan.participants}
        avoided = {m for m in placed if m.device.node in draining}
        quarantined = {m for m in came if str(m.device) in held}
        if self._copies_without(plan, quarantined) > 1:
            avoided |= quarantined
        others = {
            member
            for record in known
            for member in record.ready
            if not record.draining and str(member.device) not in held
        }
        enough = len(others - self._failed) >= self._shape.stages
        check(
            not avoided or not enough or not self._shape.rules.tensor_across_nodes,
            f"{sorted(avoided)} are placed, which were to be avoided",
        )
