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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.effects import (
    Effect,
    Event,
    Finish,
    Limits,
    Note,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.membership import Membership
from elastic.messages import (
    Adopt,
    AgentRecord,
    ConnectionLost,
    Failed,
    FaultFired,
    Fence,
    NodeProgress,
    NodeReport,
    PhaseDone,
    Quiesce,
    Quiesced,
    RecoveryPhase,
    StepDone,
    Stop,
)
from elastic.notes import failure_note, fault_note, plan_note
from elastic.pace import PaceLog
from elastic.plan import NoPlan, Plan
from elastic.planner import JobShape, Situation, home_devices, newcomers, plan_generation
from elastic.topology import DeviceId, Member


class ProtocolError(RuntimeError):
    """An event that the controller's phase does not allow: a bug, or a foreign message."""


@dataclass(slots=True)
class _Awaited:
    """What the phase in progress waits for."""

    members: set[Member] = field(default_factory=set)
    deadline: float = float("inf")


@dataclass(frozen=True, slots=True)
class _Suspicion:
    """Workers lost a connection, and no failure explains it by `deadline`."""

    deadline: float
    cause: str


class Controller:
    """The machine. Attributes are for reading; `handle` is the only way to change them."""

    def __init__(
        self, shape: JobShape, devices: tuple[DeviceId, ...], limits: Limits, now: float
    ) -> None:
        self.phase = Phase.QUIESCING
        self.generation = 1
        self.plans: dict[int, Plan] = {}
        self.committed: dict[Member, int] = {}
        self._shape = shape
        self._limits = limits
        self._members = Membership(devices, home_devices(shape, devices))
        self._fruitless = 0
        self._progress_at_announcement = -1
        self._answers: dict[Member, Quiesced] = {}
        self._awaited = _Awaited(deadline=now + limits.spawn_timeout_seconds)
        self._phases_done: dict[RecoveryPhase, dict[Member, float]] = {}
        self._suspicion: _Suspicion | None = None
        self._pace = PaceLog(self.plans)
        self._judged = (0, 0)

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
        self._members.record(event)
        if self.phase is Phase.QUIESCING:
            return self._plan_if_quiet(now)
        if self.phase is Phase.RUNNING:
            return self._grow_if_possible(now)
        return []

    def _failed(self, event: Failed, now: float) -> list[Effect]:
        failure = event.failure
        member = Member(failure.device, failure.incarnation)
        placed = member in self._involved() or not self.plans
        self._members.remove(member)
        self._awaited.members.discard(member)
        effects: list[Effect] = [
            failure_note(
                event,
                phase=self.phase,
                step_in_flight=self._step_in_flight(),
                placed=placed,
                generation=max(self.plans, default=0),
            )
        ]
        if not self.plans:
            # Nothing to recover from yet: the agents replace it, or the start times out.
            return effects
        if member in self._involved():
            effects += self._announce(f"{failure.device} {failure.kind}", True, now)
        return effects

    def _node_report(self, event: NodeReport, now: float) -> list[Effect]:
        if event.generation != self.generation:
            return []
        for answer in event.workers:
            if answer.member in self._awaited.members:
                self._answers[answer.member] = answer
                self._awaited.members.discard(answer.member)
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
                    # A broken connection is usually the echo of a failure whose report is on its
                    # way; acting on it at once would cost a second generation.
                    self._suspicion = self._suspicion or _Suspicion(
                        now + self._limits.corroboration_seconds,
                        f"{note.member} lost a connection that no failure explains",
                    )
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
        if self._suspicion is None or now < self._suspicion.deadline:
            return []
        return self._announce(self._suspicion.cause, True, now)

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        if now < self._awaited.deadline:
            return []
        if not self.plans:
            waited = self._limits.spawn_timeout_seconds
            missing = ", ".join(str(device) for device in self._members.missing())
            return self._halt(
                f"workers on {missing} were not ready {waited:g} s after the start; "
                "see their logs, or raise health.spawn_timeout_seconds"
            )
        waited = self._limits.quiesce_timeout_seconds
        self._awaited.deadline = now + waited
        return [
            Send(Fence(member, f"stop for generation {self.generation}", waited))
            for member in sorted(self._awaited.members)
        ]

    def _stop_requested(self, event: StopRequested, now: float) -> list[Effect]:
        self.phase = Phase.HALTED
        return [Send(Stop(event.reason)), Finish("interrupted", event.reason)]

    # Transitions.

    @property
    def _adopting(self) -> bool:
        return self.phase in (
            Phase.REBUILDING,
            Phase.RESHARDING,
            Phase.RESUMING,
            Phase.RUNNING,
        )

    def _announce(self, cause: str, urgent: bool, now: float) -> list[Effect]:
        """Begin the next generation: everybody placed and alive is to stop."""
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
        self._answers = {}
        self._phases_done = {}
        self._suspicion = None
        limits = self._limits
        patience = limits.quiesce_timeout_seconds if urgent else limits.pause_timeout_seconds
        self._awaited = _Awaited(involved & alive, now + patience)
        reason = f"{cause}: {'stop at once' if urgent else 'stop after the step in flight'}"
        quiesce = Quiesce(self.generation, urgent, tuple(sorted(involved - alive)), reason)
        fields = {
            "generation": self.generation,
            "urgent": urgent,
            "lost": [str(member) for member in quiesce.lost],
            "awaited": len(self._awaited.members),
            "reason": reason,
        }
        return [Send(quiesce), Note("quiesce", fields), *self._plan_if_quiet(now)]

    def _plan_if_quiet(self, now: float) -> list[Effect]:
        if not self.plans:
            if self._members.missing():
                return []
        elif self._awaited.members:
            return []
        plan = plan_generation(self._shape, self._situation())
        if isinstance(plan, NoPlan):
            return self._halt(plan.reason)
        alive = self._members.alive()
        committed = max((self.committed[m] for m in alive & set(self.committed)), default=-1)
        self.plans[self.generation] = plan
        self.phase = Phase.REBUILDING
        self._awaited = _Awaited()
        placed = self._placed()
        self.committed = {
            member: answer.standing.committed
            for member, answer in self._answers.items()
            if answer.standing is not None and member in placed
        }
        effects: list[Effect] = [Send(Adopt(plan))]
        if self._answers:
            stopped_at = max(answer.at for answer in self._answers.values())
            quiesced = {"generation": plan.generation, "phase": "quiesce", "done_at": stopped_at}
            effects.append(Note("phase_done", quiesced))
        lost_steps = max(0, committed + 1 - plan.resume_step)
        return [*effects, plan_note(plan, self._shape.sizes, lost_steps)]

    def _situation(self) -> Situation:
        return Situation(
            generation=self.generation,
            workers=self._members.workers(),
            answers=self._answers,
            history=self.plans,
            rendezvous=self._members.rendezvous,
            homes=self._members.homes,
            paces=self._pace.paces,
        )

    def _phase_done(self, note: PhaseDone) -> list[Effect]:
        done = self._phases_done.setdefault(note.phase, {})
        done[note.member] = note.at
        if note.phase is RecoveryPhase.RESUME and self.plan and note.member in self._placed():
            before = self.committed.get(note.member, -1)
            self.committed[note.member] = max(before, self.plan.resume_step - 1)
        if set(done) != self._involved():
            return []
        effects: list[Effect] = [
            Note(
                "phase_done",
                {
                    "generation": note.generation,
                    "phase": note.phase,
                    "done_at": max(done.values()),
                },
            )
        ]
        match note.phase:
            case RecoveryPhase.REBUILD:
                self.phase = Phase.RESHARDING
            case RecoveryPhase.RESHARD:
                self.phase = Phase.RESUMING
            case RecoveryPhase.RESUME:
                self.phase = Phase.RUNNING
                effects.append(Note("running", {"generation": note.generation}))
        return effects

    def _grow_if_possible(self, now: float) -> list[Effect]:
        plan = self.plan
        # Who was not wanted is not wanted as long as nobody comes or goes.
        known = (self.generation, self._members.changes)
        if plan is None or known == self._judged or self._step_in_flight() >= self._shape.steps - 1:
            return []
        self._judged = known
        wanted = newcomers(self._shape, self._situation(), plan)
        if not wanted:
            return []
        names = ", ".join(str(member.device) for member in wanted)
        return self._announce(f"{names} can take a place", False, now)

    def _complete_if_done(self) -> list[Effect]:
        placed = self._placed()
        last = self._shape.steps - 1
        if not placed or any(self.committed.get(member, -1) < last for member in placed):
            return []
        self.phase = Phase.COMPLETED
        reason = f"all {self._shape.steps} steps are committed"
        return [Send(Stop(reason)), Finish("completed", reason)]

    def _halt(self, reason: str) -> list[Effect]:
        self.phase = Phase.HALTED
        return [Note("halt", {"reason": reason}), Send(Stop(reason)), Finish("halted", reason)]

    def _step_in_flight(self) -> int:
        return max(self.committed.values(), default=-1) + 1


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
    (Phase.QUIESCING, NodeReport): Controller._node_report,
    (Phase.QUIESCING, Tick): Controller._tick,
    **{
        (phase, event): handler
        for phase in _LIVE
        if phase is not Phase.QUIESCING
        for event, handler in ((NodeReport, Controller._ignore), (Tick, Controller._tick_adopting))
    },
    **{
        (phase, event): Controller._ignore
        for phase in (Phase.COMPLETED, Phase.HALTED)
        for event in (AgentRecord, Failed, NodeReport, NodeProgress, Tick, StopRequested)
    },
}
