"""A controller on a stage: its events are written as calls, its effects come out as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from elastic.controller import Controller
from elastic.effects import (
    AgentGone,
    Effect,
    Event,
    Finish,
    ForgetNode,
    ForgetPlan,
    Limits,
    NodeLost,
    Note,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.job_shape import JobShape
from elastic.keys import agent_key, key_of, plan_key
from elastic.messages import (
    Adopt,
    AgentRecord,
    ComponentFault,
    ConnectionLost,
    Failed,
    Fence,
    Leave,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PhaseDone,
    PlanChange,
    Quiesce,
    Quiesced,
    RecoveryPhase,
    StepDone,
    Stop,
    StoreMessage,
    WholePlan,
    WorkerStatus,
)
from elastic.notes import EntryId, entry_id
from elastic.plan import Plan
from elastic.recorded import read_messages
from elastic.session import Session, Standing, standing
from elastic.topology import INCARNATIONS_PER_LIFE, DeviceId, Member
from elastic.worker_status import fresh_status, summed_up
from health.classify import ProcessExited, StoppedAnswering, classify
from health.events import FailureEvent
from health.heartbeat import Activity
from health.liveness import Stalled
from health.policy import Deadline, QuarantinePolicy
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import SlotRef

LIMITS = Limits(
    spawn_timeout_seconds=60.0,
    quiesce_timeout_seconds=10.0,
    pause_timeout_seconds=10.0,
    corroboration_seconds=1.0,
    agent_timeout_seconds=0.5,
    max_recoveries=5,
    max_fruitless_recoveries=4,
    quarantine=QuarantinePolicy(100.0, 20.0, 60.0),
)
VOTE = (8.0, 0.0)
SILENT_FIELDS = {"digest", "slots", "quiesced_at", "done_at", "moved_elements", "detected_at", "id"}


def job_shape(tensor: int = 2, replicas: int = 2, steps: int = 10, stages: int = 1) -> JobShape:
    return JobShape(
        counts=AtomCounts(4, 6, 5),
        sizes=(AtomSizes(7, 3, 2, 5),) * stages,
        tensor=tensor,
        stages=stages,
        replicas=replicas,
        global_batch_size=8,
        micro_batch_size=2,
        steps=steps,
    )


def node_devices(shape: JobShape) -> tuple[DeviceId, ...]:
    """One node per replica."""
    return tuple(
        DeviceId(node, index)
        for node in range(shape.replicas)
        for index in range(shape.tensor * shape.stages)
    )


def committed(step: int) -> Session:
    """A session between steps that committed `step` last."""
    if step < 0:
        return Session()
    return Session(committed=step - 1).start().prepare().hold_vote(VOTE).commit()


def prepared(step: int) -> Session:
    """A session that holds the reduced gradients of `step`."""
    return committed(step - 1).start().prepare()


def keeping(step: int, generation: int) -> Session:
    """A session that stopped behind the backward of `step`, whose gradients it keeps."""
    return committed(step - 1).start().keep(generation)


def failure_of(member: Member, *, at: float, hang: bool = False) -> FailureEvent:
    signal = (
        StoppedAnswering(member.device, member.incarnation, "stop", 10.0)
        if hang
        else ProcessExited(member.device, member.incarnation, -9, "")
    )
    return classify(signal, device_healthy=False, now=at)


class Stage:
    """Drives one controller. `lines` is the transcript, `stored` what the store would hold.

    With `successors`, each event but the passing of time, which deadlines count from their start,
    is taken by a new controller, built on what is stored. `spares`: devices of one more node.
    """

    successors = False

    def __init__(self, shape: JobShape, limits: Limits = LIMITS, spares: int = 0) -> None:
        self.shape = shape
        self.devices = node_devices(shape)
        self.devices += tuple(DeviceId(shape.replicas, index) for index in range(spares))
        self.controller = Controller(shape, self.devices, limits, 0.0)
        self.limits = limits
        self.stored: dict[str, StoreMessage] = {}
        self.journaled: set[EntryId] = set()
        self._statuses: dict[Member, WorkerStatus] = {}
        self.lines: list[str] = []
        self.effects: list[Effect] = []
        self.now = 0.0
        self._ready = {device: Member(device, 1) for device in self.devices}
        self._lives = dict.fromkeys((device.node for device in self.devices), 1)
        self._draining: set[int] = set()

    def member(self, node: int, index: int, incarnation: int = 1) -> Member:
        return Member(DeviceId(node, index), incarnation)

    @property
    def plan(self) -> Plan:
        plan = self.controller.plan
        assert plan is not None
        return plan

    @property
    def placed(self) -> list[Member]:
        return [assignment.member for assignment in self.plan.placement]

    def handle(self, text: str, event: Event) -> list[Effect]:
        """One event; writes it and what came of it."""
        self.lines.append(f"{self.now:g} {text}")
        before = self.controller.phase
        over = before in (Phase.COMPLETED, Phase.HALTED)
        if self.successors and self.stored and not over and not isinstance(event, Tick):
            self.succeed()
        self.effects = self.controller.handle(event, self.now)
        self._store(event)
        self.lines += [
            f"    {effect_text(effect, self.controller.plan)}" for effect in self.effects
        ]
        if self.controller.phase is not before:
            self.lines.append(f"    -> {self.controller.phase}")
        return self.effects

    def succeed(self) -> list[Effect]:
        """Another controller takes over, from the store alone."""
        recorded = read_messages(self.stored.values())
        self.controller = Controller(self.shape, self.devices, self.limits, self.now, recorded)
        effects = self.controller.begin(self.journaled, self.now)
        self._keep(effects)
        return effects

    def _store(self, event: Event) -> None:
        match event:
            case Failed():
                self.stored[key_of("job", event)] = event
            case NodeProgress(node, notes, _, stall):
                for note in notes:
                    known = self._statuses.get(note.member, fresh_status(note.member))
                    self._statuses[note.member] = summed_up(known, note)
                summed = NodeProgress(node, notes, tuple(self._statuses.values()), stall)
                self.stored[key_of("job", summed)] = summed
            case AgentRecord() | NodeReport() | NodeAlive() | ComponentFault():
                self.stored[key_of("job", event)] = event
            case NodeLost(node):
                self.stored.pop(agent_key("job", node), None)
            case _:
                pass
        self._keep(self.effects)

    def _keep(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.stored[key_of("job", effect.message)] = effect.message
            elif isinstance(effect, ForgetNode):
                self.stored.pop(agent_key("job", effect.node), None)
            elif isinstance(effect, ForgetPlan):
                self.stored.pop(plan_key("job", effect.generation), None)
            elif isinstance(effect, Note):
                identity = entry_id(effect.event, effect.fields)
                self.journaled |= {identity} if identity else set()

    def wait(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.handle("tick", Tick())

    def ready(self, node: int) -> list[Effect]:
        members = tuple(m for device, m in sorted(self._ready.items()) if device.node == node)
        devices = tuple(device for device in self.devices if device.node == node)
        draining = node in self._draining
        return self.handle(
            f"node{node} {'drains, ' * draining}has ready: {listed(members)}",
            AgentRecord(node, self._lives[node], devices, members, f"node{node}:7", draining),
        )

    def newcomers(self, node: int) -> dict[Member, Session | None]:
        """The ready workers of a node, which hold no state."""
        return {member: None for device, member in self._ready.items() if device.node == node}

    def drains(self, node: int) -> list[Effect]:
        self._draining.add(node)
        return self.ready(node)

    def returns(self, node: int, index: int, incarnation: int) -> list[Effect]:
        self._ready[DeviceId(node, index)] = self.member(node, index, incarnation)
        return self.ready(node)

    def failed(self, member: Member, *, hang: bool = False) -> list[Effect]:
        self._ready.pop(member.device, None)
        failure = failure_of(member, at=self.now, hang=hang)
        return self.handle(f"{member} failed: {failure.kind}", Failed(failure, None, None, None))

    def answers(
        self,
        sessions: Mapping[Member, Session | None],
        *,
        generation: int | None = None,
        intact: bool = True,
    ) -> list[Effect]:
        """One report a node; None: the worker holds no state. All hold the newest layout."""
        effects: list[Effect] = []
        generation = generation or self.controller.generation
        for node in sorted({member.device.node for member in sessions}):
            workers = tuple(
                Quiesced(generation, member, self._standing(member, session), intact, self.now)
                for member, session in sessions.items()
                if member.device.node == node
            )
            names = listed(worker.member for worker in workers)
            text = f"node{node} answers {generation} for {names}"
            effects += self.handle(text, NodeReport(generation, node, workers))
        return effects

    def _standing(self, member: Member, session: Session | None) -> Standing | None:
        if session is None:
            return None
        slot = next(a.coordinate.slot_ref for a in self.plan.placement if a.member == member)
        return standing(slot, session, self.plan.generation, 0)

    def initial_answers(self, members: Iterable[Member], *, received: bool) -> list[NodeReport]:
        """Reports of workers that passed no barrier yet; `received`: the first shards in full."""
        reports: dict[int, tuple[Quiesced, ...]] = {}
        for member in members:
            held = standing(slot_of(member), Session(), 0, 1) if received else None
            answer = Quiesced(self.controller.generation, member, held, False, self.now)
            node = member.device.node
            reports[node] = (*reports.get(node, ()), answer)
        return [NodeReport(self.controller.generation, n, r) for n, r in reports.items()]

    def phases(self, *phases: RecoveryPhase) -> None:
        """All placed workers finish these parts of the recovery."""
        for phase in phases or (RecoveryPhase.REBUILD, RecoveryPhase.RESHARD, RecoveryPhase.RESUME):
            notes = tuple(
                PhaseDone(self.controller.generation, member, phase, self.now)
                for _, member in self.plan.participants
            )
            self.handle(f"all finish {phase}", NodeProgress(0, notes))

    def steps(self, step: int, members: Iterable[Member] | None = None) -> list[Effect]:
        members = self.placed if members is None else list(members)
        notes = tuple(step_done(self.controller.generation, m, step, self.now) for m in members)
        return self.handle(f"step {step} by {listed(members)}", NodeProgress(0, notes))

    def connection_lost(self, member: Member, generation: int | None = None) -> list[Effect]:
        generation = generation or self.controller.generation
        note = ConnectionLost(generation, member, "closed by peer")
        return self.handle(f"{member} lost a connection in {generation}", NodeProgress(0, (note,)))

    def stalled(self, node: int, generation: int, seconds: float = 11.0) -> list[Effect]:
        """A worker of `node` waits that long, and no other there can go on."""
        stall = Stalled(
            device=DeviceId(node, 0),
            incarnation=1,
            activity=Activity.GRADIENT_SYNC,
            step=4,
            generation=generation,
            waiting_seconds=seconds,
            deadline=Deadline(10.0, "floor"),
        )
        text = f"node{node} is stalled in {generation} for {seconds:g} s"
        return self.handle(text, NodeProgress(node, (), (), stall))

    def goes_on(self, node: int) -> list[Effect]:
        return self.handle(f"node{node} goes on", NodeProgress(node, ()))

    def node_lost(self, node: int) -> list[Effect]:
        self._ready = {d: m for d, m in self._ready.items() if d.node != node}
        return self.handle(f"node{node} is gone", NodeLost(node, "its agent's lease ended"))

    def agent_gone(self, node: int, life: int | None = None) -> list[Effect]:
        """By default the present one, whose workers end with it."""
        if life is None:
            life = self._lives[node]
            self._ready = {d: m for d, m in self._ready.items() if d.node != node}
        return self.handle(f"nobody listens for life {life} of node{node}", AgentGone(node, life))

    def node_alive(self, node: int) -> list[Effect]:
        return self.handle(
            f"the agent of node{node} answers", NodeAlive(self.controller.generation, node)
        )

    def node_returns(self, node: int) -> list[Effect]:
        incarnation = self._lives[node] * INCARNATIONS_PER_LIFE + 1
        self._lives[node] += 1
        self._draining.discard(node)
        for device in self.devices:
            if device.node == node:
                self._ready[device] = Member(device, incarnation)
        return self.ready(node)

    def stop(self, reason: str) -> list[Effect]:
        return self.handle(f"stop requested: {reason}", StopRequested(reason))

    def start(self) -> None:
        """All workers become ready and the first generation runs."""
        for node in sorted({device.node for device in self.devices}):
            self.now += 1
            self.ready(node)
        self.phases()


def step_done(generation: int, member: Member, step: int, at: float, **changes: Any) -> StepDone:
    fields: dict[str, Any] = {
        "generation": generation,
        "member": member,
        "replica": member.device.node,
        "step": step,
        "loss": 2.0,
        "grad_norm": 1.0,
        "tokens": 64,
        "sample_digest": "cafe",
        "sharded_digest": None,
        "replicated_digest": None,
        "started_at": at - 1,
        "compute_seconds": 0.5,
        "at": at,
    }
    return StepDone(**(fields | changes))


def listed(members: Iterable[Member]) -> str:
    return ", ".join(str(member) for member in members) or "nobody"


def effect_text(effect: Effect, plan: Plan | None) -> str:
    """`plan` is the newest one."""
    match effect:
        case Send(Quiesce(generation, urgent, lost, _, ask_agents, sever_all)):
            asked = ", agents are to answer" if ask_agents else ""
            asked += ", no group is kept" if sever_all else ""
            how = "now" if urgent else "gently"
            return f"send quiesce {generation} {how}, lost {listed(lost)}{asked}"
        case Send(Adopt() | PlanChange()):
            assert plan is not None
            return f"send plan {plan.generation} to {listed(a.member for a in plan.placement)}"
        case Send(WholePlan(oldest)):
            return f"send plan {oldest.generation} as a whole"
        case ForgetPlan(generation):
            return f"forget plan {generation}"
        case Send(Fence(member, asked_to, waited)):
            return f"send fence {member}: did not {asked_to} in {waited:g} s"
        case Send(Leave(node, life)):
            return f"send leave to node{node} in its life {life}"
        case Send(Stop(reason, outcome)):
            return f"send stop, {outcome}: {reason}"
        case ForgetNode(node):
            return f"forget node{node}"
        case Finish(outcome, reason):
            return f"finish {outcome}: {reason}"
        case Note(event, fields):
            shown = {k: v for k, v in fields.items() if k not in SILENT_FIELDS and v is not None}
            return f"note {event}: " + "; ".join(f"{k} {_plain(v)}" for k, v in shown.items())
    raise AssertionError(effect)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(each) for each in value) + "]"
    return str(value)


def slot_of(member: Member) -> SlotRef:
    return SlotRef(member.device.node, member.device.index)
