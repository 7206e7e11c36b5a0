"""The controller: one pure state machine that takes a job from failure to failure.

Events go in with the time, effects come out; the driver performs them. The machine is the table
`_TABLE`: what is not in it is a protocol error that names event and phase.

    QUIESCING   a generation was announced; each placed worker is to stop and say where it stands
    REBUILDING  its plan is published; workers make groups
    RESHARDING  all have groups; shards move
    RESUMING    all hold their shards; the first step is under way
    RUNNING     all run steps of this generation
    COMPLETED   every worker committed the last step
    HALTED      nothing could be done; the reason says why

A failure of a placed worker in any phase but the last two announces the next generation, whatever
the present one was doing. While RUNNING, so does a worker that could take a place, and a node that
is to be left; both let the step in flight end. The job starts as a generation 1 for which everybody
is awaited and nobody has to stop.

Everything that the machine decides is written to the store before anybody acts on it, so another
controller can go on from what is recorded there (`begin`), in whatever phase this one was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, get_args

from elastic import notes
from elastic.adoption import Adoption
from elastic.effects import (
    AgentGone,
    Effect,
    Event,
    ForgetNode,
    ForgetPlan,
    Limits,
    NodeLost,
    Note,
    Outage,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.job import Job, end
from elastic.job_shape import JobShape
from elastic.messages import (
    AgentRecord,
    ComponentFault,
    ConnectionLost,
    Failed,
    FaultFired,
    Fence,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PhaseDone,
    RecoveryPhase,
    StepDone,
)
from elastic.plan import Plan
from elastic.recorded import NOTHING_RECORDED, Recorded
from elastic.topology import DeviceId, Member
from health.classify import NodeGone, classify


class ProtocolError(RuntimeError):
    """An event that the controller's phase does not allow: a bug, or a foreign message."""


class Controller:
    """The machine. `begin` comes first, and then `handle`, event by event."""

    def __init__(
        self,
        shape: JobShape,
        devices: tuple[DeviceId, ...],
        limits: Limits,
        now: float,
        recorded: Recorded = NOTHING_RECORDED,
    ) -> None:
        self._job = Job(shape, devices, limits, now, recorded)
        # By the node and the life of the agent that was struck.
        self._agent_faults = {
            (fault.node, fault.life): fault
            for fault in recorded.component_faults
            if fault.node is not None
        }
        self._recorded = recorded

    def begin(self, journaled: Collection[notes.EntryId], now: float) -> list[Effect]:
        """Go on from what was recorded, before the first event.

        `journaled` are the entries that the journal has already.
        """
        return [
            effect
            for effect in self._begin(journaled, now)
            if not isinstance(effect, Note)
            or (identity := notes.entry_id(effect.event, effect.fields)) is None
            or identity not in journaled
        ]

    def _begin(self, journaled: Collection[notes.EntryId], now: float) -> list[Effect]:
        recorded, members = self._recorded, self._job.members
        for node, life in recorded.dismissed:
            members.dismiss(node, life)
        for record in recorded.nodes:
            members.record(record)
        for failed in recorded.failures:
            members.remove(failed.member)
        self._job.probation.recall(recorded.failures, members.is_ready, now)
        effects: list[Effect] = [self._job.failure_note(failed) for failed in recorded.failures]
        effects += (notes.drained_note(node, life) for node, life in sorted(recorded.dismissed))
        gone = self._job.placed() - members.alive()
        effects += self._mourn(
            {
                member
                for member in gone - {failed.member for failed in recorded.failures}
                if notes.entry_id("failure", {"id": str(member)}) not in journaled
            },
            "its agent was gone when another controller began to lead",
            now,
        )
        effects += map(ForgetPlan, recorded.outdated)
        if recorded.generation:
            fields = {"generation": self._job.generation, "step": self._job.step_in_flight()}
            effects.append(Note("took_over", fields))
        if recorded.announced is not None:
            announced = recorded.announced
            effects.append(self._job.quiesce(announced, now))
            if self._job.plans and not announced.sever_all:
                self._job.watch_stalls()
            for report in recorded.reports:
                self._job.quiescence.take(report)
            for node in recorded.heard:
                self._job.quiescence.hear(node)
            if self._job.plans and (unnamed := sorted(gone.difference(announced.lost))):
                effects += self._announce_lost(unnamed, now)
            else:
                effects += self._job.plan_if_quiet(now)
        elif not self._job.plans:
            effects += self._job.plan_if_quiet(now)
        else:
            effects += self._go_on(now)
        for node, stall in recorded.stalls.items():
            self._job.stalls.take(node, stall)
        return effects + self._job.dismiss()

    def _go_on(self, now: float) -> list[Effect]:
        """Nothing was announced since the newest plan: find out how far its workers came."""
        effects: list[Effect] = [*notes.newest_plan_notes(self._recorded, self._job.shape.sizes)]
        everybody = self._job.involved()
        current = [
            status
            for status in self._recorded.statuses.values()
            if status.generation == self._job.generation and status.member in everybody
        ]
        # Behind the barrier that one passed nobody waits for the donors, who may be gone.
        passed = any(RecoveryPhase.RESUME in status.phases for status in current)
        involved = self._job.placed() if passed else everybody
        self._job.phase = Phase.REBUILDING
        self._job.adoption = Adoption(self._job.generation, involved)
        for phase in RecoveryPhase:
            for status in current:
                if phase in status.phases:
                    done = PhaseDone(self._job.generation, status.member, phase, now)
                    effects += self._job.phase_done(done)
        if lost := sorted(involved - self._job.members.alive()):
            return effects + self._announce_lost(lost, now)
        for status in current:
            if status.broken:
                self._job.suspect(status.member, now)
        effects += self._job.complete_if_done()
        return effects + self._job.improve(now) if self._job.phase is Phase.RUNNING else effects

    def _announce_lost(self, lost: Iterable[Member], now: float) -> list[Effect]:
        names = ", ".join(str(member.device) for member in lost)
        return self._job.announce(f"{names} failed while nobody led", True, now)

    @property
    def phase(self) -> Phase:
        """The machine's state."""
        return self._job.phase

    @property
    def generation(self) -> int:
        """The newest generation that was announced."""
        return self._job.generation

    @property
    def plans(self) -> Mapping[int, Plan]:
        """The last plans of the job, by generation; the same object all along."""
        return self._job.plans

    @property
    def plan(self) -> Plan | None:
        """The newest plan."""
        return self._job.plan

    @property
    def committed(self) -> Mapping[Member, int]:
        """The last step that each placed worker is known to have committed."""
        return self._job.commits.steps

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; returns the effects in the order in which they must be performed."""
        handler = _TABLE.get((self._job.phase, type(event)))
        if handler is None:
            raise ProtocolError(f"{type(event).__name__} in phase {self._job.phase}")
        return [*handler(self, event, now), *self._job.dismiss()]

    # Events.

    def _ignore(self, event: Event, now: float) -> list[Effect]:
        return []

    def _agent_record(self, event: AgentRecord, now: float) -> list[Effect]:
        ended = self._job.members.record(event)
        for device in filter(self._job.members.is_ready, event.devices):
            self._job.probation.returned(device, now)
        # Its agent was gone and is back, and nobody saw the time between.
        effects = self._mourn(ended, "its agent was gone, and another one is there", now)
        if ended & self._job.involved():
            names = ", ".join(str(member.device) for member in sorted(ended))
            return effects + self._job.announce(f"the agent of {names} began anew", True, now)
        if self._job.phase is Phase.QUIESCING:
            return effects + self._job.plan_if_quiet(now)
        if self._job.phase is Phase.RUNNING:
            return effects + self._job.improve(now)
        return effects

    def _failed(self, event: Failed, now: float) -> list[Effect]:
        member = event.member
        involved = member in self._job.involved()
        is_new = not self._job.members.is_gone(member)
        self._job.members.remove(member)
        self._job.quiescence.drop(member)
        effects: list[Effect] = [self._job.failure_note(event)]
        if is_new:
            effects += self._job.probation.failed(event.failure, now)
        if involved and self._job.plans:
            device, kind = event.failure.device, event.failure.kind
            effects += self._job.announce(f"{device} {kind}", True, now)
        # Without a plan there is nothing to recover: agents replace it, or the start times out.
        return effects

    def _node_lost(self, event: NodeLost, now: float) -> list[Effect]:
        lost = self._job.members.remove_node(event.node)
        hit = bool(lost & self._job.involved()) and bool(self._job.plans)
        effects = self._mourn(lost, event.evidence, now)
        if hit:
            effects += self._job.announce(f"node{event.node} is lost", True, now)
        return effects

    def _mourn(self, lost: Collection[Member], evidence: str, now: float) -> list[Effect]:
        """These workers are gone with the agents of their nodes, so nobody reports them."""
        effects: list[Effect] = []
        for member in sorted(lost):
            self._job.members.remove(member)
            self._job.quiescence.drop(member)
            gone = NodeGone(member.device, member.incarnation, evidence)
            failure = classify(gone, device_healthy=False, now=now)
            fault = self._agent_faults.get((member.device.node, member.life))
            cause = (fault.fault, fault.at, None, fault.step) if fault else (None, None, None, None)
            effects.append(self._job.failure_note(Failed(failure, *cause)))
            effects += self._job.probation.failed(failure, now)
            if self._job.members.is_ready(member.device):
                # Another life of its agent has a new one there already.
                self._job.probation.returned(member.device, now)
        return effects

    def _agent_gone(self, event: AgentGone, now: float) -> list[Effect]:
        if self._job.members.life(event.node) != event.life:
            return []
        lost = NodeLost(event.node, "its agent's connections closed, and nobody listens there")
        return [ForgetNode(event.node), *self._node_lost(lost, now)]

    def _component_fault(self, event: ComponentFault, now: float) -> list[Effect]:
        if event.node is not None:
            self._agent_faults[event.node, event.life] = event
        return [notes.component_fault_note(event)]

    def _node_alive(self, event: NodeAlive, now: float) -> list[Effect]:
        if event.generation == self._job.generation:
            self._job.quiescence.hear(event.node)
        return []

    def _node_report(self, event: NodeReport, now: float) -> list[Effect]:
        if event.generation != self._job.generation:
            return []
        self._job.quiescence.take(event)
        return self._job.plan_if_quiet(now)

    def _node_progress(self, event: NodeProgress, now: float) -> list[Effect]:
        job = self._job
        effects: list[Effect] = []
        for note in event.notes:
            match note:
                case StepDone():
                    job.commits.take(note.member, note.step)
                    job.pace.take(note)
                case PhaseDone() if note.generation == job.generation:
                    effects += job.phase_done(note)
                case ConnectionLost() if note.generation == job.generation and job.adopting:
                    detail = {"member": str(note.member), "detail": note.detail}
                    effects.append(Note("connection_lost", detail))
                    job.suspect(note.member, now)
                case FaultFired():
                    effects.append(notes.fault_note(note))
                case _:
                    # A late word of an earlier generation.
                    continue
        job.stalls.take(event.node, event.stall)
        if job.adopting:
            effects += job.complete_if_done()
        if job.phase is Phase.RUNNING:
            effects += job.improve(now)
        return effects

    def _tick_adopting(self, event: Tick, now: float) -> list[Effect]:
        effects = self._job.probation.release(now)
        if (suspicion := self._job.adoption.overdue(now)) is not None:
            return effects + self._job.announce(suspicion.cause, True, now, ask_agents=True)
        effects += self._job.break_stall(now)
        if self._job.phase is Phase.RUNNING:
            effects += self._job.improve(now)
        return effects

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        limits = self._job.limits
        effects: list[Effect] = []
        for node in self._job.quiescence.silent(now):
            waited = limits.agent_timeout_seconds
            evidence = f"its agent did not answer for {waited:g} s when all were asked"
            effects += [ForgetNode(node), *self._node_lost(NodeLost(node, evidence), now)]
        effects = effects or self._job.break_stall(now)
        if effects:
            return effects
        if not self._job.quiescence.is_late(now):
            return []
        if not self._job.plans:
            return self._job.start_late(now)
        waited = self._job.quiescence.patience
        self._job.quiescence.extend(now, limits.quiesce_timeout_seconds)
        asked_to = f"stop for generation {self._job.generation}"
        late = sorted(self._job.quiescence.awaited)
        return [Send(Fence(member, asked_to, waited)) for member in late]

    def _outage(self, event: Outage, now: float) -> list[Effect]:
        """Nobody could report for a while, so nobody is late for it."""
        self._job.quiescence.postpone(event.seconds)
        self._job.adoption.postpone(event.seconds)
        self._job.stalls.postpone(event.seconds)
        return [Note("store_outage", {"seconds": event.seconds})]

    def _stop_requested(self, event: StopRequested, now: float) -> list[Effect]:
        self._job.phase = Phase.HALTED
        return end(event.outcome, event.reason)


_Handler = Callable[[Controller, Any, float], list[Effect]]

_LIVE = (
    Phase.QUIESCING,
    Phase.REBUILDING,
    Phase.RESHARDING,
    Phase.RESUMING,
    Phase.RUNNING,
)

_TABLE: Mapping[tuple[Phase, type[Any]], _Handler] = {
    **{(phase, AgentRecord): Controller._agent_record for phase in _LIVE},
    **{(phase, Failed): Controller._failed for phase in _LIVE},
    **{(phase, NodeProgress): Controller._node_progress for phase in _LIVE},
    **{(phase, StopRequested): Controller._stop_requested for phase in _LIVE},
    **{(phase, NodeLost): Controller._node_lost for phase in _LIVE},
    **{(phase, AgentGone): Controller._agent_gone for phase in _LIVE},
    **{(phase, ComponentFault): Controller._component_fault for phase in _LIVE},
    **{(phase, Outage): Controller._outage for phase in _LIVE},
    (Phase.QUIESCING, NodeReport): Controller._node_report,
    (Phase.QUIESCING, NodeAlive): Controller._node_alive,
    (Phase.QUIESCING, Tick): Controller._tick,
    **{
        (phase, event): handler
        for phase in _LIVE
        if phase is not Phase.QUIESCING
        for event, handler in (
            (NodeReport, Controller._ignore),
            (NodeAlive, Controller._ignore),
            (Tick, Controller._tick_adopting),
        )
    },
    **{
        (phase, event): Controller._ignore
        for phase in (Phase.COMPLETED, Phase.HALTED)
        for event in get_args(Event)
    },
}
