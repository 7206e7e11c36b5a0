"""A simulated cluster in virtual time around the real controller.

Real: Controller, planner, Membership, Session, decide_resume, layouts and reshard plans. Simulated:
workers (`sim_worker`), communicators (`links`), agents and the network (here). Everything random
comes from one seed, so a seed is a story that can be told again.

The world holds the invariants of DESIGN.md sections 1, 5 and 6 against every event; the first
that is broken raises Violation, with the story so far.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from links import Comm
from sim_worker import REPLICATED, GroupKey, Piece, SimWorker, mix, pieces_owned
from strikes import Strike, new_strike

from elastic.controller import Controller
from elastic.effects import Event, Finish, Limits, Note, Phase, Send, Tick
from elastic.messages import (
    Adopt,
    AgentMessage,
    AgentRecord,
    Failed,
    Fence,
    NodeProgress,
    NodeReport,
    Quiesce,
    Quiesced,
    Ready,
    Stop,
)
from elastic.plan import Plan
from elastic.planner import JobShape, PlacementRules
from elastic.session import SessionError
from elastic.topology import DeviceId, Member
from elastic.workload import SplitBatchBy
from health.classify import ProcessExited, StoppedAnswering, classify
from ntp.atoms import AtomCounts, AtomSizes, Axis

TICK_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
"""Virtual time after which a job that neither ended nor halted is stuck."""

LIMITS = Limits(
    spawn_timeout_seconds=60.0,
    quiesce_timeout_seconds=6.0,
    pause_timeout_seconds=9.0,
    corroboration_seconds=1.0,
    max_recoveries=200,
    max_fruitless_recoveries=50,
)
GRIDS = ((2, 1, 2), (2, 1, 2), (3, 1, 2), (2, 1, 3), (4, 1, 2), (1, 1, 3), (2, 2, 2), (2, 3, 2))
"""Tensor-parallel degree, pipeline stages and replicas."""
SPARES = (0, 0, 0, 1, 2)
"""Devices beyond the grid."""


class Violation(AssertionError):
    """An invariant is broken."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a simulated run ended."""

    outcome: str
    reason: str
    generations: int
    at: float


@dataclass(slots=True)
class _Agent:
    """One node: its processes, and its part of the protocol (see `elastic.agent`)."""

    node: int
    devices: tuple[DeviceId, ...]
    incarnations: Counter[DeviceId] = field(default_factory=Counter)
    processes: dict[DeviceId, SimWorker] = field(default_factory=dict)
    ready: set[Member] = field(default_factory=set)
    fenced: dict[Member, StoppedAnswering] = field(default_factory=dict)
    answering: int = 0
    awaited: set[Member] = field(default_factory=set)
    given: list[Quiesced] = field(default_factory=list)
    up_at: float = 0.0
    down_at: float = 0.0


class World:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.seed = seed
        self.now = 0.0
        self.build_timeout = 3.0
        self.story: list[tuple[float, str, tuple[Any, ...]]] = []
        self.finished: Finish | None = None
        self.kept_groups_gone = 0
        rng = self.rng
        tensor, stages, replicas = rng.choice(GRIDS)
        self.shape = JobShape(
            counts=AtomCounts(4, rng.randint(4, 7), rng.randint(4, 6)),
            sizes=(AtomSizes(7, 3, 2, 5),) * stages,
            tensor=tensor,
            stages=stages,
            replicas=replicas,
            global_batch_size=2 * rng.randint(replicas, 6),
            micro_batch_size=2,
            steps=rng.randint(6, 12),
            split_batch_by=list(SplitBatchBy)[seed % len(SplitBatchBy)],
            rules=PlacementRules(tensor_across_nodes=seed % 4 != 0),
        )
        self._pieces: list[Piece] = [REPLICATED]
        self._pieces += [(a, i) for a in Axis for i in range(self.shape.counts.of(a))]
        self._reference = [
            {
                (stage, piece): self.initial(piece, stage)
                for stage in range(stages)
                for piece in self._pieces
            }
        ]
        size = tensor * stages * replicas + rng.choice(SPARES)
        per_node = rng.choice((1, tensor, size))
        devices = tuple(DeviceId(rank // per_node, rank % per_node) for rank in range(size))
        self._agents = {
            node: _Agent(node, tuple(d for d in devices if d.node == node))
            for node in sorted({device.node for device in devices})
        }
        self._controller = Controller(self.shape, devices, LIMITS, 0.0)
        self._communicators: dict[tuple[int, GroupKey], Comm] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._committed: dict[Member, int] = {}
        self._gone: set[Member] = set()
        self._plans: dict[int, Plan] = {}
        self._phases: Counter[str] = Counter()
        self._strikes = [new_strike(rng, self.shape.steps) for _ in range(rng.randint(1, 5))]

    def run(self) -> Ended:
        """Play the whole story."""
        for agent in self._agents.values():
            for device in agent.devices:
                self._spawn(agent, device)
        self.after(TICK_SECONDS, self._tick)
        for strike in self._strikes:
            if strike.trigger == "time":
                self.after(strike.at, self._strike, strike, None)
        while self.finished is None:
            self.now, _, action, arguments = heapq.heappop(self._events)
            self.check(self.now < PATIENCE_SECONDS, f"stuck in {self._controller.phase}")
            try:
                action(*arguments)
            except Violation:
                raise
            except (SessionError, AssertionError, LookupError, ValueError) as error:
                raise self._violation(f"{type(error).__name__}: {error}") from error
        self._check_end(self.finished)
        finished = self.finished
        return Ended(finished.outcome, finished.reason, self._controller.generation, self.now)

    # What workers and links use.

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` after `delay` seconds of virtual time."""
        self._order += 1
        heapq.heappush(self._events, (self.now + delay, self._order, action, arguments))

    def check(self, holds: bool, what: str) -> None:
        """An invariant. Raises Violation."""
        if not holds:
            raise self._violation(what)

    def tell(self, text: str, *arguments: Any) -> None:
        """A line of the story."""
        self.story.append((self.now, text, arguments))

    def communicator(self, generation: int, key: GroupKey, members: tuple[Member, ...]) -> Comm:
        """The communicator that all members of a generation build together."""
        return self._communicators.setdefault(
            (generation, key), Comm(self, members, star=self.rng.random() < 0.5)
        )

    def wrote(self, worker: SimWorker) -> None:
        """A worker wrote to its agent, which reads it some time later."""
        self.after(self._delay(0.1), self._hear, self._agents[worker.member.device.node], worker)

    def reached(self, worker: SimWorker, point: str) -> None:
        """A worker's step came to a point; a strike may wait for that."""
        for strike in self._strikes:
            step = worker.session.committed if point == "committed" else worker.session.step
            if not strike.done and strike.trigger == point and strike.at == step:
                self.after(strike.delay, self._strike, strike, worker)
                strike.done = True

    def kept_group_gone(self, worker: SimWorker, key: GroupKey) -> None:
        """A plan keeps a group that was severed between the answer and the adoption."""
        self.kept_groups_gone += 1
        self.tell("%s finds its kept group %s severed", worker.member, key)

    def initial(self, piece: Piece, stage: int) -> int:
        """The value of a piece before the first step: different for every one."""
        axis, atom = piece
        return mix(stage * 100000 + len(axis or "") * 1000 + atom, 0, 7.0)

    def check_committed(self, worker: SimWorker) -> None:
        """After a commit: it is the next step of this process, and its values are right."""
        before = self._committed.get(worker.member, -1)
        self.check(
            worker.session.committed > before,
            f"{worker.member} went from step {before} to {worker.session.committed}",
        )
        self._committed[worker.member] = worker.session.committed
        self._check_reference(worker)

    def check_values(self, worker: SimWorker, plan: Plan) -> None:
        """After a change of layout: the worker holds what it owns, with the right values."""
        owned = set(pieces_owned(plan, worker.slot))
        self.check(
            set(worker.values) == owned,
            f"{worker.member} holds {set(worker.values) ^ owned} too much or too little",
        )
        self._committed[worker.member] = worker.session.committed
        self._check_reference(worker)

    def _check_reference(self, worker: SimWorker) -> None:
        done = worker.session.committed + 1
        while len(self._reference) <= done:
            step = len(self._reference) - 1
            last = self._reference[-1]
            size = self.shape.global_batch_size
            self._reference.append({p: mix(v, step, size) for p, v in last.items()})
        expected, stage = self._reference[done], worker.held_at.stage
        wrong = [p for p, value in worker.values.items() if expected[stage, p] != value]
        self.check(
            not wrong, f"{worker.member} after step {done - 1}: {wrong} differ from the reference"
        )

    # Agents.

    def _spawn(self, agent: _Agent, device: DeviceId) -> None:
        agent.incarnations[device] += 1
        worker = SimWorker(self, Member(device, agent.incarnations[device]))
        agent.processes[device] = worker
        self.tell("%s starts", worker.member)
        self.after(0.5 + 2.0 * self.rng.random(), self._boot, worker)

    def _boot(self, worker: SimWorker) -> None:
        if not worker.dead:
            worker.start()

    def _hear(self, agent: _Agent, worker: SimWorker) -> None:
        notes: list[Any] = []
        while worker.pipe:
            message = worker.pipe.popleft()
            match message:
                case Ready():
                    agent.ready.add(worker.member)
                    self._put_record(agent)
                case Quiesced():
                    if message.generation == agent.answering:
                        agent.given.append(message)
                        agent.awaited.discard(worker.member)
                        self._answer_if_complete(agent)
                case _:
                    notes.append(message)
        if notes:
            self._put(agent, NodeProgress(agent.node, tuple(notes)))

    def _from_store(self, agent: _Agent, message: Quiesce | Adopt | Fence) -> None:
        match message:
            case Quiesce():
                ready = {w.member for w in agent.processes.values()} & agent.ready
                agent.answering, agent.awaited, agent.given = message.generation, ready, []
                self._answer_if_complete(agent)
                self._pass_on(agent, message)
            case Adopt():
                self._pass_on(agent, message)
            case Fence():
                if self.spares(agent, message.member):
                    self._report_answers(agent)
                    return
                worker = agent.processes.get(message.member.device)
                if worker is not None and worker.member == message.member:
                    self.check(worker.hung or worker.dead, f"{worker.member} is fenced, but works")
                    agent.fenced[worker.member] = StoppedAnswering(
                        message.member.device,
                        message.member.incarnation,
                        message.asked_to,
                        message.waited_seconds,
                    )
                    self._kill(worker)

    def _pass_on(self, agent: _Agent, message: AgentMessage) -> None:
        for worker in agent.processes.values():
            if worker.member in agent.ready:
                # A plan may be overtaken by the next announcement; nothing overtakes those.
                late = isinstance(message, Adopt) and self.rng.random() < 0.2
                self.after(0.0 if not late else 2.0 * self.rng.random(), worker.hear, message)

    def _ended(self, agent: _Agent, worker: SimWorker, returns: str) -> None:
        self._hear(agent, worker)
        member = worker.member
        del agent.processes[member.device]
        agent.ready.discard(member)
        signal = agent.fenced.get(member) or ProcessExited(
            member.device, member.incarnation, -9, ""
        )
        failure = classify(signal, device_healthy=returns == "at once", now=self.now)
        self._put(agent, Failed(failure, None, None, None))
        agent.awaited.discard(member)
        self._answer_if_complete(agent)
        self._put_record(agent)
        if returns == "at once":
            self._spawn(agent, member.device)
        elif returns == "later":
            self.after(5.0 + 20.0 * self.rng.random(), self._spawn, agent, member.device)

    def spares(self, agent: _Agent, member: Member) -> bool:
        """The guard of `Agent._fence`: a worker that did answer is not killed for its neighbour."""
        return member in {answer.member for answer in agent.given}

    def _answer_if_complete(self, agent: _Agent) -> None:
        if agent.answering and not agent.awaited:
            self._report_answers(agent)

    def _report_answers(self, agent: _Agent) -> None:
        self._put(agent, NodeReport(agent.answering, agent.node, tuple(agent.given)))

    def _put_record(self, agent: _Agent) -> None:
        ready = tuple(w.member for w in agent.processes.values() if w.member in agent.ready)
        record = AgentRecord(agent.node, agent.devices, ready, f"node{agent.node}:1")
        self._put(agent, record)

    def _put(self, agent: _Agent, event: Event) -> None:
        agent.up_at = max(agent.up_at, self.now + self._delay(0.2))
        self.after(agent.up_at - self.now, self._handle, event)

    # The controller.

    def _tick(self) -> None:
        self._handle(Tick())
        self.after(TICK_SECONDS, self._tick)

    def _handle(self, event: Event) -> None:
        controller = self._controller
        generation, phase = controller.generation, controller.phase
        if isinstance(event, Failed):
            member = Member(event.failure.device, event.failure.incarnation)
            self._gone.add(member)
            self.tell("controller learns that %s failed: %s", member, event.failure.evidence)
        for effect in controller.handle(event, self.now):
            match effect:
                case Send(Adopt(plan)):
                    self._check_plan(plan)
                    self._send(Adopt(plan))
                case Send(Stop()):
                    continue
                case Send(message):
                    self._send(message)
                case Note(name, fields):
                    self.tell("controller: %s %s", name, fields)
                case Finish():
                    self.tell("controller: %s", effect)
                    self.finished = effect
        self.check(controller.generation >= generation, "the generation went back")
        if controller.phase is not phase:
            self._entered(controller.phase)

    def _send(self, message: Quiesce | Adopt | Fence) -> None:
        for agent in self._agents.values():
            agent.down_at = max(agent.down_at, self.now + self._delay(0.2))
            self.after(agent.down_at - self.now, self._from_store, agent, message)

    def _entered(self, phase: Phase) -> None:
        self._phases[phase] += 1
        for strike in self._strikes:
            if not strike.done and strike.trigger == phase and strike.at == self._phases[phase]:
                strike.done = True
                self.after(strike.delay, self._strike, strike, None)

    def _check_plan(self, plan: Plan) -> None:
        self.check(plan.generation not in self._plans, f"plan {plan.generation} is written twice")
        self._plans[plan.generation] = plan
        placed = {assignment.member for assignment in plan.participants}
        self.check(not placed & self._gone, f"failed {placed & self._gone} are placed")
        self.check(
            sum(plan.batch_split) == self.shape.global_batch_size,
            f"the batch {plan.batch_split} is not the global batch",
        )
        for replica in plan.layout.replicas:
            for axis in Axis:
                owners = Counter(
                    atom
                    for slot in replica.active
                    for atoms in replica.shards.owned(axis, slot)
                    for atom in range(atoms.start, atoms.stop)
                )
                whole = Counter(range(self.shape.counts.of(axis)))
                self.check(owners == whole, f"{axis} of replica {replica.replica}: {owners}")
        for worker in self._workers():
            if worker.member in placed and worker.layout_generation:
                furthest = max(worker.session.committed, worker.session.voted)
                self.check(
                    plan.resume_step > furthest,
                    f"{worker.member} holds step {furthest}, to resume at {plan.resume_step}",
                )

    def _check_end(self, finished: Finish) -> None:
        self.check(finished.outcome in ("completed", "halted"), f"ended as {finished.outcome}")
        self.check(bool(finished.reason), "it ended without a reason")
        workers = [w for w in self._workers() if w.member not in self._gone]
        if finished.outcome == "completed":
            last = self.shape.steps - 1
            plan = self._plans[max(self._plans)]
            behind = [
                f"{w.member} at {w.session.committed}"
                for w in workers
                if any(a.member == w.member for a in plan.placement)
                and not w.dead
                and w.layout_generation
                and w.session.committed < last
            ]
            self.check(not behind, f"completed, but {behind} lack step {last}")
            return
        layout = max((worker.layout_generation for worker in workers), default=0)
        held: set[tuple[int, Piece]] = set()
        for worker in workers:
            if layout and layout == worker.layout_generation:
                held |= {(worker.held_at.stage, piece) for piece in worker.values}
            elif layout and layout == worker.pending_generation:
                held |= {(worker.place.stage, piece) for piece in worker.pending or ()}
        whole = held == set(self._reference[0]) and "no slot has a worker" not in finished.reason
        self.check(not whole, f"halted although all is held: {finished.reason}")

    # Bad luck.

    def _strike(self, strike: Strike, at: SimWorker | None) -> None:
        strike.done = True
        alive = [worker for worker in self._workers() if not worker.dead and not worker.hung]
        self.rng.shuffle(alive)
        if at in alive and self.rng.random() < 0.6:
            alive.remove(at)
            alive.insert(0, at)
        match strike.kind:
            case "kill":
                # Often enough somebody is left; now and then nobody is.
                spared = self.shape.tensor if self.rng.random() < 0.95 else 0
                for worker in alive[: max(1, min(strike.victims, len(alive) - spared))]:
                    self._kill(worker)
            case "hang":
                # With the last steps or the last worker nobody would notice: there is no
                # deadline for progress in this version.
                late = any(w.session.step >= self.shape.steps - 2 for w in alive)
                if not late and len(alive) > 2 and all(w.plan for w in alive):
                    self._hang(alive[0])
            case "cut":
                if pair := [w for w in alive if w.comms]:
                    self.tell("the connections of %s break", pair[0].member)
                    for comm in pair[0].comms.values():
                        comm.cut(pair[0].member)

    def _kill(self, worker: SimWorker) -> None:
        if worker.dead:
            return
        self.tell("%s dies in step %d", worker.member, worker.session.step)
        worker.dead = True
        for comm in self._communicators.values():
            if worker.member in comm.members:
                comm.cut(worker.member)
        returns = self.rng.choice(("at once", "later", "later", "never"))
        agent = self._agents[worker.member.device.node]
        self.after(self._delay(0.3), self._ended, agent, worker, returns)

    def _hang(self, worker: SimWorker) -> None:
        self.tell("%s hangs in step %d", worker.member, worker.session.step)
        worker.hung = True
        self.after(4.0, self._time_out, worker)

    def _time_out(self, worker: SimWorker) -> None:
        for comm in self._communicators.values():
            if worker.member in comm.members:
                comm.cut(worker.member)

    def _workers(self) -> list[SimWorker]:
        return [w for agent in self._agents.values() for w in agent.processes.values()]

    def _delay(self, scale: float) -> float:
        return 0.01 + scale * self.rng.random() ** 3

    def _violation(self, what: str) -> Violation:
        lines = [f"{at:8.2f}  {text % arguments}" for at, text, arguments in self.story]
        rerun = (
            f"EVERSTEP_SIM_SEED={self.seed} .venv/bin/python -m pytest -q "
            "tests/sim/test_recovery_simulation.py -k seeds"
        )
        story = "\n".join(lines)
        return Violation(f"{what}\n{story}\n{self.now:8.2f}  {what}\nrerun: {rerun}")
