"""A simulated node: `elastic.agent` and `elastic.node_workers`, without processes and sockets.

The node stays; its agent may die, with all its workers, and be started again. An agent lives life
after life, each from its registration to the end of its record. What a worker wrote before it died
is read, as from a real pipe.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from sim_process import Mailbox, Outcome, Process, Task, Wait
from sim_store import SimLease, Told, create_when_free
from sim_watch import LOOK_SECONDS, Watch
from sim_worker import SimWorker

from elastic.keys import agent_key, job_prefix, key_of, life_key, whole_plan_key
from elastic.messages import (
    Adopt,
    AgentMessage,
    AgentRecord,
    Failed,
    Fence,
    Leave,
    NodeAlive,
    NodeReport,
    PlanChange,
    Quiesce,
    Quiesced,
    Ready,
    Stop,
    StoreMessage,
)
from elastic.node_news import NodeNews
from elastic.plan_chain import PlanChain, chain_of, generation_of
from elastic.store import AlreadyExists, LeaseLost
from elastic.topology import INCARNATIONS_PER_LIFE, DeviceId, Member
from elastic.worker_status import is_awaited
from health.classify import ProcessExited, Signal, StoppedAnswering, classify

if TYPE_CHECKING:
    from world import World

JOB = "job"
COMMANDS = f"{job_prefix(JOB)}commands/"
PLANS = f"{job_prefix(JOB)}plan/"
LEASE_SECONDS = 3.0
DRAIN_SECONDS = 20.0
"""How long an agent that is to leave waits for the others."""
REPORT_SECONDS = 2.0


class SimAgent:
    """A node and its agent. `life` is the present one; None before the first and between two."""

    def __init__(self, world: World, node: int, devices: tuple[DeviceId, ...]) -> None:
        self.world = world
        self.node = node
        self.devices = devices
        self.life: Life | None = None
        self.leaving = False
        self._returns_after: float | None = None
        self.process = Process(world.clock, f"agent {node}")
        self.process.dead = True
        self._mourners: list[Callable[[], None]] = []

    def start(self) -> None:
        """An agent is started on the node, which has none."""
        assert self.process.dead, self.process.name
        self.process = Process(self.world.clock, f"agent {self.node}")
        Task(self.process, self._run()).start()

    def kill(self) -> None:
        """The agent dies, and its workers with it."""
        self.process.dead = True
        self.leaving = False
        self.world.store.falter(self.process)
        for worker in self.workers():
            self.world.end_process(worker)
        self._end_life()

    def when_gone(self, life: int, mourn: Callable[[], None]) -> None:
        """Call `mourn` when nobody listens any more where that life does."""
        if self.life is not None and self.life.number == life:
            self._mourners.append(mourn)
        else:
            mourn()

    def _end_life(self) -> None:
        self.life = None
        mourners, self._mourners = self._mourners, []
        for mourn in mourners:
            mourn()

    def drain(self, returns_after: float | None) -> None:
        """The agent is to leave, and another is started so long after it, or none."""
        self.leaving, self._returns_after = True, returns_after
        if self.life is not None and self.life.is_registered:
            self.life.drain()

    def workers(self) -> list[SimWorker]:
        """The node's worker processes."""
        return list(self.life.processes.values()) if self.life is not None else []

    def serves(self, life: int) -> bool:
        """Whether the rendezvous of that life is up."""
        return self.life is not None and self.life.number == life and not self.process.stopped

    def _run(self) -> Generator[Wait, Any, None]:
        over = False
        while not over and not self.leaving:
            self.life = Life(self.world, self)
            over = yield from self.life.run()
            self.world.clock.tell("agent %d ends its life %d", self.node, self.life.number)
            self._end_life()
        if not over:
            self.kill()
            if self._returns_after is not None:
                self.world.clock.after(self._returns_after, self.start)


class Life:
    """`elastic.agent._Life`: an agent from its registration to the end of its record."""

    def __init__(self, world: World, agent: SimAgent) -> None:
        self.number = 0
        self.is_registered = False
        self._draining = False
        self.processes: dict[DeviceId, SimWorker] = {}
        self.ready: set[Member] = set()
        self._world = world
        self.agent = agent
        self._process = agent.process
        self._incarnations = dict.fromkeys(agent.devices, 0)
        self._fenced: dict[Member, Signal] = {}
        self._announced = 0
        self._held: list[Adopt | PlanChange] = []
        self._plans = PlanChain()
        self._answering = 0
        self._awaited: set[Member] = set()
        self.given: list[Quiesced] = []
        self._news = NodeNews(agent.node)
        self._watch = Watch(world.clock)
        self._outbox = Mailbox()
        self._ended = Outcome()

    def run(self) -> Generator[Wait, Any, bool]:
        """Live; returns whether the job is over. No process is left, however it ends."""
        store, process, node = self._world.store, self._process, self.agent.node
        self.number = yield from self._next_life()
        lease: SimLease = yield store.lease(process, LEASE_SECONDS)
        store.leases_end(lease, lambda: self._ended.decide(False))
        own = agent_key(JOB, node)
        watches: list[Callable[[], None]] = []
        writing = Task(process, self._write(lease))
        try:
            yield from create_when_free(store, process, own, self._record(), lease)
            seen, revision = yield store.get_prefix(process, COMMANDS)
            for message in seen.values():
                if isinstance(message, Quiesce):
                    self._announced = max(self._announced, message.generation)
                elif isinstance(message, Stop):
                    return True
            published, _ = yield store.get_prefix(process, PLANS)
            whole = yield store.get(process, whole_plan_key(JOB))
            self._plans = chain_of((*published.values(), whole))
            watches += [
                store.watch(process, prefix, revision, self._told)
                for prefix in (COMMANDS, PLANS, own)
            ]
            writing.start()
            self.is_registered = True
            if self.agent.leaving:
                self.drain()
            self.begin()
            over: bool = yield self._ended.wait
        except LeaseLost:
            over = False
        writing.cancel()
        for end in watches:
            end()
        self.kill_all()
        yield store.revoke(lease)
        return over

    def _next_life(self) -> Generator[Wait, Any, int]:
        prefix = f"{life_key(JOB, self.agent.node)}/"
        while True:
            found, _ = yield self._world.store.get_prefix(self._process, prefix)
            number = len(found) + 1
            try:
                yield self._world.store.create(self._process, f"{prefix}{number}", "")
            except AlreadyExists:
                continue
            return number

    # From the store.

    def _told(self, told: Told) -> None:
        match told.value:
            case None:
                if told.key == agent_key(JOB, self.agent.node):
                    self._ended.decide(False)
            case Quiesce() as quiesce:
                self._announce(quiesce)
            case (Adopt() | PlanChange()) as plan:
                self._held.append(plan)
                self._pass_plans_on()
            case Fence() as fence:
                self._fence(fence)
            case Leave(self.agent.node, self.number):
                self.leave()
            case Stop():
                self._ended.decide(True)

    def _announce(self, quiesce: Quiesce) -> None:
        self._announced = max(self._announced, quiesce.generation)
        if quiesce.ask_agents:
            self._outbox.put(NodeAlive(quiesce.generation, self.agent.node))
        self._answering, self._awaited, self.given = quiesce.generation, set(self.ready), []
        self._answer_if_complete()
        self._tell(quiesce)
        self._pass_plans_on()

    def _pass_plans_on(self) -> None:
        while self._held and generation_of(self._held[0]) <= max(1, self._announced):
            plan = self._held.pop(0)
            if self._plans.take(plan):
                self._tell(plan)

    def _tell(self, message: AgentMessage, only: Member | None = None) -> None:
        clock = self._world.clock
        for worker in self.processes.values():
            if worker.member not in self.ready or only not in (None, worker.member):
                continue
            if isinstance(message, Adopt | PlanChange):
                # A plan may be overtaken by the next announcement, but not by the next plan.
                late = 2.0 * clock.rng.random() if clock.rng.random() < 0.2 else 0.0
                worker.plan_due = max(worker.plan_due, clock.now + late)
                clock.after(worker.plan_due - clock.now, worker.process.call, worker.hear, message)
            else:
                clock.after(0.0, worker.process.call, worker.hear, message)

    def _fence(self, fence: Fence) -> None:
        if self.spares(fence.member):
            self._report_answers()
            return
        member, waited = fence.member, fence.waited_seconds
        worker = self.processes.get(member.device)
        if worker is not None and worker.member == member:
            self._world.oracle.fenced(worker)
            self.kill(
                worker,
                StoppedAnswering(member.device, member.incarnation, fence.asked_to, waited),
            )

    def spares(self, member: Member) -> bool:
        """The guard of `Agent._fence`: a worker that did answer is not killed for its neighbour."""
        return member in {answer.member for answer in self.given}

    # From the workers.

    def wrote(self, worker: SimWorker) -> None:
        """A worker has written to its agent."""
        self._world.clock.after(0.0, self._process.call, self._hear, worker)

    def _hear(self, worker: SimWorker) -> None:
        while worker.link.pipe and not self._ended.is_decided:
            message = worker.link.pipe.popleft()
            match message:
                case Ready():
                    self.ready.add(worker.member)
                    self.changed()
                    if (plan := self._plans.newest()) is not None:
                        self._tell(Adopt(plan), only=worker.member)
                case Quiesced():
                    if message.generation == self._answering:
                        self.given.append(message)
                        self._awaited.discard(worker.member)
                        self._answer_if_complete()
                case _:
                    self._news.hear(worker.member, message)
                    if is_awaited(message):
                        self._outbox.put(None)
                    else:
                        self._process.after(REPORT_SECONDS, self._outbox.put, None)

    def _spawn(self, device: DeviceId) -> None:
        if self._ended.is_decided or self._draining or device in self.processes:
            return
        self._incarnations[device] += 1
        number = (self.number - 1) * INCARNATIONS_PER_LIFE + self._incarnations[device]
        worker = SimWorker(self._world, Member(device, number), self.wrote)
        self.processes[device] = worker
        self._watch.started(worker.member)
        self._world.oracle.exists(worker)
        self._world.clock.tell("%s starts", worker.member)
        self._world.clock.after(0.5 + 2.0 * self._world.clock.rng.random(), worker.start)

    def drain(self) -> None:
        """Say that this node is to be left, and leave unasked if nobody answers in time."""
        self._draining = True
        self.changed()
        self._process.after(DRAIN_SECONDS, self._leave_anyway)

    def _leave_anyway(self) -> None:
        if not self._ended.is_decided:
            self._world.clock.tell("agent %d leaves unasked", self.agent.node)
            self._world.oracle.avoidance.is_calm = False
            self.leave()

    def leave(self) -> None:
        """The node is left."""
        self._ended.decide(False)

    def begin(self) -> None:
        """Start a process on every device."""
        for device in self.agent.devices:
            self._spawn(device)
        self._look()

    def _look(self) -> None:
        if self._ended.is_decided:
            return
        if self._news.judge(self._watch.look(self.processes.values())):
            self._outbox.put(None)
        self._process.after(LOOK_SECONDS, self._look)

    def kill_all(self) -> None:
        """Nobody survives the life."""
        for worker in self.processes.values():
            self._world.end_process(worker)

    def kill(self, worker: SimWorker, signal: Signal) -> None:
        """The agent decides to: `signal` says why."""
        self._fenced.setdefault(worker.member, signal)
        self._world.kill(worker)

    def ended(self, worker: SimWorker, returns: str) -> None:
        """A worker is gone. `returns`: at once, later or never, is there another on its device."""
        member = worker.member
        if self.processes.get(member.device) is not worker or self._ended.is_decided:
            return
        self._hear(worker)
        del self.processes[member.device]
        self.ready.discard(member)
        exited = ProcessExited(member.device, member.incarnation, -9, "")
        signal, now = self._fenced.get(member, exited), self._world.clock.now
        failure = classify(signal, device_healthy=returns == "at once", now=now)
        self._news.forget(member)
        self._watch.ended(member)
        self._outbox.put(Failed(failure, None, None, None))
        self._awaited.discard(member)
        self._answer_if_complete()
        self.changed()
        if returns == "at once":
            self._spawn(member.device)
        elif returns == "later":
            late = 5.0 + 20.0 * self._world.clock.rng.random()
            self._process.after(late, self._spawn, member.device)

    def changed(self) -> None:
        """Other workers are ready than before."""
        self._outbox.put(self._record())

    # To the store, in order, by one task.

    def _record(self) -> AgentRecord:
        ready = tuple(w.member for w in self.processes.values() if w.member in self.ready)
        node = self.agent.node
        rendezvous = rendezvous_of(node, self.number)
        return AgentRecord(node, self.number, self.agent.devices, ready, rendezvous, self._draining)

    def _answer_if_complete(self) -> None:
        if self._answering and not self._awaited:
            self._report_answers()

    def _report_answers(self) -> None:
        self._outbox.put(None)
        self._outbox.put(NodeReport(self._answering, self.agent.node, tuple(self.given)))

    def _write(self, lease: SimLease) -> Generator[Wait, Any, None]:
        store = self._world.store
        while True:
            message: StoreMessage | None = (yield self._outbox.get) or self._news.tell()
            if message is None:
                continue
            under = lease if isinstance(message, AgentRecord) else None
            try:
                yield store.put(self._process, key_of(JOB, message), message, under)
            except LeaseLost:
                self._ended.decide(False)
                return


def rendezvous_of(node: int, life: int) -> str:
    """Address of the rendezvous store in that life of the node's agent."""
    return f"node{node}:{life}"
