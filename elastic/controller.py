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
the present one was doing. The job starts as a generation 1 for which everybody is awaited and
nobody has to stop.

Everything that the machine decides is written to the store before anybody acts on it, so another
controller can go on from what is recorded there (`begin`), in whatever phase this one was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

from elastic.adoption import Adoption
from elastic.effects import (
    Effect,
    Event,
    Finish,
    ForgetNode,
    Limits,
    NodeLost,
    Note,
    Outage,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.membership import Membership
from elastic.messages import (
    Adopt,
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
    Quiesce,
    RecoveryPhase,
    StepDone,
    Stop,
)
from elastic.notes import component_fault_note, failure_note, fault_note, plan_note
from elastic.pace import PaceLog
from elastic.plan import NoPlan, Plan
from elastic.planner import JobShape, Situation, complete_slots, home_devices, plan_generation
from elastic.quiescence import Quiescence
from elastic.recorded import NOTHING_RECORDED, Recorded
from elastic.topology import DeviceId, Member
from health.classify import NodeGone, classify


class ProtocolError(RuntimeError):
    """An event that the controller's phase does not allow: a bug, or a foreign message."""


class Controller:
    """The machine. Attributes are for reading; `handle` is the only way to change them."""

    def __init__(
        self,
        shape: JobShape,
        devices: tuple[DeviceId, ...],
        limits: Limits,
        now: float,
        recorded: Recorded = NOTHING_RECORDED,
    ) -> None:
        self.phase = Phase.QUIESCING
        self.generation = max(1, recorded.generation)
        self.plans: dict[int, Plan] = dict(recorded.plans)
        self.committed = dict(recorded.committed)
        self._shape = shape
        self._limits = limits
        self._members = Membership(home_devices(shape, devices))
        self._fruitless = 0
        self._progress_at_announcement = -1
        self._quiescence = Quiescence((), now + limits.spawn_timeout_seconds)
        self._adoption = Adoption(self.generation, ())
        self._pace = PaceLog(self.plans)
        self._agent_faults: dict[int, ComponentFault] = {}
        self._recorded = recorded

    def begin(self, journaled: Collection[str], now: float) -> list[Effect]:
        """Go on from what was recorded, before the first event.

        `journaled` are the ids of failures that the journal has already.
        """
        recorded = self._recorded
        for record in recorded.nodes:
            self._members.record(record)
        for failed in recorded.failures:
            self._members.remove(_member(failed))
        placed = self._placed()
        self.committed = {m: step for m, step in self.committed.items() if m in placed}
        effects: list[Effect] = [
            self._failure_note(failed)
            for failed in recorded.failures
            if failed.failure.id not in journaled
        ]
        if recorded.generation:
            fields = {"generation": self.generation, "step": self._step_in_flight()}
            effects.append(Note("took_over", fields))
        if recorded.announced is not None:
            patience = self._limits.pause_timeout_seconds
            awaited = self._involved() & self._members.alive()
            self._quiescence = Quiescence(awaited, now + patience)
            if recorded.announced.ask_agents:
                self._ask_agents(now)
            for report in recorded.reports:
                self._quiescence.take(report)
            for node in recorded.heard:
                self._quiescence.hear(node)
            return effects + self._plan_if_quiet(now)
        if not self.plans:
            return effects + self._plan_if_quiet(now)
        return effects + self._go_on(now)

    def _go_on(self, now: float) -> list[Effect]:
        """Nothing was announced since the newest plan: find out how far its workers came."""
        involved = self._involved()
        self.phase = Phase.REBUILDING
        self._adoption = Adoption(self.generation, involved)
        current = [
            status
            for status in self._recorded.statuses.values()
            if status.generation == self.generation and status.member in involved
        ]
        for phase in RecoveryPhase:
            for status in current:
                if phase in status.phases:
                    self._phase_done(PhaseDone(self.generation, status.member, phase, now))
        if lost := sorted(self._involved() - self._members.alive()):
            names = ", ".join(str(member.device) for member in lost)
            return self._announce(f"{names} failed while nobody led", True, now)
        for status in current:
            if status.broken:
                self._suspect(status.member, now)
        return self._complete_if_done() or self._grow_if_possible(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; returns the effects in the order in which they must be performed."""
        handler = _TABLE.get((self.phase, type(event)))
        if handler is None:
            raise ProtocolError(f"{type(event).__name__} in phase {self.phase}")
        return handler(self, event, now)

    @property
    def plan(self) -> Plan | None:
        """The newest plan."""
        return self.plans[max(self.plans)] if self.plans else None

    def _placed(self) -> set[Member]:
        plan = self.plan
        return {assignment.member for assignment in plan.placement} if plan else set()

    def _involved(self) -> set[Member]:
        """Who must live for the newest plan: until it runs, its donors too."""
        plan = self.plan
        if plan is None or self.phase is Phase.RUNNING:
            return self._placed()
        return {assignment.member for assignment in plan.participants}

    # Events.

    def _ignore(self, event: Event, now: float) -> list[Effect]:
        return []

    def _agent_record(self, event: AgentRecord, now: float) -> list[Effect]:
        ended = self._members.record(event)
        if ended & self._involved():
            # Its agent was gone and is back, and nobody saw the time between.
            names = ", ".join(str(member.device) for member in sorted(ended))
            return self._announce(f"the agent of {names} began anew", True, now)
        if self.phase is Phase.QUIESCING:
            return self._plan_if_quiet(now)
        if self.phase is Phase.RUNNING:
            return self._grow_if_possible(now)
        return []

    def _failed(self, event: Failed, now: float) -> list[Effect]:
        member = _member(event)
        involved = member in self._involved()
        self._members.remove(member)
        self._quiescence.drop(member)
        effects: list[Effect] = [self._failure_note(event)]
        if involved and self.plans:
            device, kind = event.failure.device, event.failure.kind
            effects += self._announce(f"{device} {kind}", True, now)
        # Without a plan there is nothing to recover: agents replace it, or the start times out.
        return effects

    def _node_lost(self, event: NodeLost, now: float) -> list[Effect]:
        lost = self._members.remove_node(event.node)
        hit = bool(lost & self._involved()) and bool(self.plans)
        effects: list[Effect] = []
        fault = self._agent_faults.pop(event.node, None)
        cause = (fault.fault, fault.at, None, fault.step) if fault else (None, None, None, None)
        for member in sorted(lost):
            self._quiescence.drop(member)
            gone = NodeGone(member.device, member.incarnation, event.evidence)
            failure = classify(gone, device_healthy=False, now=now)
            effects.append(self._failure_note(Failed(failure, *cause)))
        if hit:
            effects += self._announce(f"node{event.node} is lost", True, now)
        return effects

    def _component_fault(self, event: ComponentFault, now: float) -> list[Effect]:
        if event.node is not None:
            self._agent_faults[event.node] = event
        return [component_fault_note(event)]

    def _node_alive(self, event: NodeAlive, now: float) -> list[Effect]:
        if event.generation == self.generation:
            self._quiescence.hear(event.node)
        return []

    def _node_report(self, event: NodeReport, now: float) -> list[Effect]:
        if event.generation != self.generation:
            return []
        self._quiescence.take(event)
        return self._plan_if_quiet(now)

    def _node_progress(self, event: NodeProgress, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for note in event.notes:
            match note:
                case StepDone():
                    self.committed[note.member] = note.step
                    self._pace.take(note)
                case PhaseDone() if note.generation == self.generation:
                    effects += self._phase_done(note)
                case ConnectionLost() if note.generation == self.generation and self._adopting:
                    detail = {"member": str(note.member), "detail": note.detail}
                    effects.append(Note("connection_lost", detail))
                    self._suspect(note.member, now)
                case FaultFired():
                    effects.append(fault_note(note))
                case _:
                    # A late word of an earlier generation.
                    continue
        if self._adopting:
            effects += self._complete_if_done()
        if self.phase is Phase.RUNNING:
            effects += self._grow_if_possible(now)
        return effects

    def _tick_adopting(self, event: Tick, now: float) -> list[Effect]:
        if (suspicion := self._adoption.overdue(now)) is None:
            return []
        return self._announce(suspicion.cause, True, now, ask_agents=True)

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        limits = self._limits
        effects: list[Effect] = []
        for node in self._quiescence.silent(now):
            waited = limits.agent_timeout_seconds
            evidence = f"its agent did not answer for {waited:g} s while peers lost connections"
            effects += [ForgetNode(node), *self._node_lost(NodeLost(node, evidence), now)]
        if effects:
            return effects
        if not self._quiescence.is_late(now):
            return []
        if not self.plans:
            waited = limits.spawn_timeout_seconds
            missing = ", ".join(str(device) for device in self._members.missing())
            return self._halt(
                f"workers on {missing} were not ready {waited:g} s after the start; "
                "see their logs, or raise health.spawn_timeout_seconds"
            )
        waited = limits.quiesce_timeout_seconds
        self._quiescence.extend(now + waited)
        asked_to = f"stop for generation {self.generation}"
        late = sorted(self._quiescence.awaited)
        return [Send(Fence(member, asked_to, waited)) for member in late]

    def _outage(self, event: Outage, now: float) -> list[Effect]:
        """Nobody could report for a while, so nobody is late for it."""
        self._quiescence.postpone(event.seconds)
        self._adoption.postpone(event.seconds)
        return [Note("store_outage", {"seconds": event.seconds})]

    def _stop_requested(self, event: StopRequested, now: float) -> list[Effect]:
        self.phase = Phase.HALTED
        return _end(event.outcome, event.reason)

    # Transitions.

    @property
    def _adopting(self) -> bool:
        return self.phase in (
            Phase.REBUILDING,
            Phase.RESHARDING,
            Phase.RESUMING,
            Phase.RUNNING,
        )

    def _suspect(self, member: Member, now: float) -> None:
        self._adoption.suspect(member, now + self._limits.corroboration_seconds)

    def _ask_agents(self, now: float) -> None:
        nodes = {member.device.node for member in self._quiescence.awaited}
        self._quiescence.expect_agents(nodes, now + self._limits.agent_timeout_seconds)

    def _announce(
        self, cause: str, urgent: bool, now: float, *, ask_agents: bool = False
    ) -> list[Effect]:
        """Begin the next generation: everybody placed and alive is to stop.

        `ask_agents`: nobody knows who is gone, so the agents are to say that they live.
        """
        self.generation += 1
        if self.generation - 1 > self._limits.max_recoveries:
            return self._halt(
                f"{cause}, after {self._limits.max_recoveries} recoveries; "
                "raise health.max_recoveries to go on"
            )
        progress = max(self.committed.values(), default=-1)
        stuck = urgent and progress == self._progress_at_announcement
        self._fruitless = self._fruitless + 1 if stuck else 0
        self._progress_at_announcement = progress
        if self._fruitless > self._limits.max_fruitless_recoveries:
            return self._halt(
                f"{cause}, after {self._limits.max_fruitless_recoveries} recoveries in a row "
                "without a committed step; the journal and the workers' logs say what fails again"
            )
        alive = self._members.alive()
        involved = self._involved()
        self.phase = Phase.QUIESCING
        limits = self._limits
        patience = limits.quiesce_timeout_seconds if urgent else limits.pause_timeout_seconds
        self._quiescence = Quiescence(involved & alive, now + patience)
        if ask_agents:
            self._ask_agents(now)
        reason = f"{cause}: {'stop at once' if urgent else 'stop after the step in flight'}"
        lost = tuple(sorted(involved - alive))
        quiesce = Quiesce(self.generation, urgent, lost, reason, ask_agents)
        fields = {
            "generation": self.generation,
            "urgent": urgent,
            "lost": [str(member) for member in quiesce.lost],
            "awaited": len(self._quiescence.awaited),
            "reason": reason,
        }
        return [Send(quiesce), Note("quiesce", fields), *self._plan_if_quiet(now)]

    def _plan_if_quiet(self, now: float) -> list[Effect]:
        incomplete = self._quiescence.awaited if self.plans else self._members.missing()
        if incomplete:
            return []
        answers = self._quiescence.answers
        situation = Situation(
            generation=self.generation,
            workers=self._members.workers(),
            answers=answers,
            history=self.plans,
            rendezvous=self._members.rendezvous,
            paces=self._pace.paces,
        )
        plan = plan_generation(self._shape, situation)
        if isinstance(plan, NoPlan):
            return self._halt(plan.reason)
        alive = self._members.alive()
        committed = max((self.committed[m] for m in alive & set(self.committed)), default=-1)
        self.plans[self.generation] = plan
        self.phase = Phase.REBUILDING
        self._adoption = Adoption(self.generation, self._involved())
        placed = self._placed()
        self.committed = {
            member: answer.standing.committed
            for member, answer in answers.items()
            if answer.standing is not None and member in placed
        }
        effects: list[Effect] = [Send(Adopt(plan))]
        if answers:
            stopped_at = max(answer.at for answer in answers.values())
            quiesced = {"generation": plan.generation, "phase": "quiesce", "done_at": stopped_at}
            effects.append(Note("phase_done", quiesced))
        lost_steps = max(0, committed + 1 - plan.resume_step)
        return [*effects, plan_note(plan, self._shape.sizes, lost_steps)]

    def _phase_done(self, note: PhaseDone) -> list[Effect]:
        if note.phase is RecoveryPhase.RESUME and self.plan and note.member in self._placed():
            before = self.committed.get(note.member, -1)
            self.committed[note.member] = max(before, self.plan.resume_step - 1)
        done_at = self._adoption.take(note)
        if done_at is None:
            return []
        self.phase = self._adoption.phase
        fields = {"generation": note.generation, "phase": note.phase, "done_at": done_at}
        effects: list[Effect] = [Note("phase_done", fields)]
        if self.phase is Phase.RUNNING:
            effects.append(Note("running", {"generation": note.generation}))
        return effects

    def _grow_if_possible(self, now: float) -> list[Effect]:
        workers = self._members.workers()
        active = set(self.plan.layout.slots()) if self.plan else set()
        returned = set(complete_slots(self._shape, workers)) - active
        if not returned or self._step_in_flight() >= self._shape.steps - 1:
            return []
        placed = self._placed()
        newcomers = [
            member
            for coordinate, member in workers.items()
            if coordinate.slot_ref in returned and member not in placed
        ]
        names = ", ".join(str(member.device) for member in newcomers)
        return self._announce(f"{names} is ready again", False, now)

    def _complete_if_done(self) -> list[Effect]:
        placed = self._placed()
        last = self._shape.steps - 1
        if not placed or any(self.committed.get(member, -1) < last for member in placed):
            return []
        self.phase = Phase.COMPLETED
        reason = f"all {self._shape.steps} steps are committed"
        return _end("completed", reason)

    def _halt(self, reason: str) -> list[Effect]:
        self.phase = Phase.HALTED
        return [Note("halt", {"reason": reason}), *_end("halted", reason)]

    def _step_in_flight(self) -> int:
        return max(self.committed.values(), default=-1) + 1

    def _failure_note(self, failed: Failed) -> Note:
        return failure_note(
            failed,
            phase=self.phase,
            step_in_flight=self._step_in_flight(),
            placed=_member(failed) in self._involved() or not self.plans,
            generation=max(self.plans, default=0),
        )


def _end(outcome: str, reason: str) -> list[Effect]:
    return [Send(Stop(reason, outcome)), Finish(outcome, reason)]


def _member(failed: Failed) -> Member:
    return Member(failed.failure.device, failed.failure.incarnation)


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
