"""A simulated candidate for the lead: `elastic.driver`, `leadership` and `term` on virtual time.

Around the real controller, built on the real reading of the store. Effects are performed one by
one, each waiting for the store, so that the process can be lost or stopped between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from sim_agent import JOB
from sim_process import Mailbox, Outcome, Process, Task, Wait
from sim_store import SimLease, Told, create_when_free

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
    Outage,
    Send,
    Tick,
)
from elastic.keys import agent_key, job_prefix, key_of, leader_key, node_of_agent, plan_key
from elastic.messages import (
    Adopt,
    AgentRecord,
    Failed,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PlanChange,
    StoreMessage,
    WholePlan,
)
from elastic.recorded import read_messages
from elastic.store import Guard, GuardFailed, LeaseLost
from health.policy import QuarantinePolicy

if TYPE_CHECKING:
    from world import World

LEASE_SECONDS = 2.0
TICK_SECONDS = 0.5
OUTAGE_SECONDS = 1.0
"""As in `elastic.term`."""

LIMITS = Limits(
    spawn_timeout_seconds=60.0,
    quiesce_timeout_seconds=6.0,
    pause_timeout_seconds=9.0,
    corroboration_seconds=1.0,
    agent_timeout_seconds=1.0,
    max_recoveries=200,
    max_fruitless_recoveries=50,
    quarantine=QuarantinePolicy(20.0, 10.0, 20.0),
)
Reported = AgentRecord | Failed | NodeAlive | NodeReport | NodeProgress


class Candidate:
    """One host for controllers; each time it is started there is a new process on it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.starts = 0
        self.process = Process(world.clock, name)
        self.process.dead = True
        self.term: Term | None = None

    def start(self) -> None:
        """A process stands by, where there is none."""
        assert self.process.dead, self.process.name
        self.starts += 1
        self.process = Process(self.world.clock, f"{self.name}.{self.starts}")
        Task(self.process, self._run()).start()

    def kill(self) -> None:
        """The process dies."""
        self.process.dead = True
        self.world.store.falter(self.process)
        self.term = None

    def _run(self) -> Generator[Wait, Any, None]:
        """`Driver.run`."""
        store, process = self.world.store, self.process
        over = False
        while not over:
            lease: SimLease = yield store.lease(process, LEASE_SECONDS)
            key = leader_key(JOB)
            try:
                created = yield from create_when_free(store, process, key, process.name, lease)
                over = yield from self._lead(Guard(key, created), lease)
            except (GuardFailed, LeaseLost) as error:
                self.world.clock.tell("%s leads no more: %s", process.name, error)
            self.term = None
            yield store.revoke(lease)

    def _lead(self, guard: Guard, lease: SimLease) -> Generator[Wait, Any, bool]:
        world, process = self.world, self.process
        values, revision = yield world.store.get_prefix(process, job_prefix(JOB))
        recorded = read_messages(v for v in values.values() if isinstance(v, StoreMessage))
        if recorded.stop is not None:
            world.finish(Finish(recorded.stop.outcome, recorded.stop.reason), 0)
            return True
        world.clock.tell("%s leads from generation %d on", process.name, recorded.generation)
        now = world.clock.now
        controller = Controller(world.shape, world.devices, LIMITS, now, recorded)
        self.term = Term(world, process, controller, guard, lease, revision)
        for record in recorded.nodes:
            self.term.hold_lifeline(record)
        finish: Finish = yield self.term.run
        world.finish(finish, self.term.seen)
        return True


class Term:
    """`elastic.term.Term`. `seen` is the revision up to which this leader knows everything."""

    def __init__(
        self,
        world: World,
        process: Process,
        controller: Controller,
        guard: Guard,
        lease: SimLease,
        begins_at: int,
    ) -> None:
        self.controller = controller
        self.seen = begins_at
        self._world = world
        self._process = process
        self._guard = guard
        self._events = Mailbox()
        self._outcome = Outcome()
        self._tasks: list[Task] = []
        self._lifelines: dict[int, int] = {}
        self._end_watch = self._watch(begins_at)
        world.store.leases_end(lease, self._lease_ended)

    def run(self, task: Task) -> None:
        """As a wait: lead until the job is over. Raises GuardFailed or LeaseLost."""
        self._outcome.wait(task)
        self._tasks = [
            Task(self._process, each, self._end) for each in (self._work(), self._tick())
        ]
        for each in self._tasks:
            each.start()

    def _end(self, value: Any, error: Exception | None) -> None:
        self._end_watch()
        for task in self._tasks:
            task.cancel()
        self._outcome.decide(value, error)

    def _lease_ended(self) -> None:
        self._end(None, LeaseLost("the lease of the lead ended"))

    def _work(self) -> Generator[Wait, Any, Finish]:
        clock = self._world.clock
        finish = yield from self._perform(
            self.controller.begin(self._world.oracle.journaled, clock.now)
        )
        self._world.entered(self.controller.phase)
        while finish is None:
            revision, event = yield self._events.get
            self.seen = max(self.seen, revision)
            finish = yield from self._perform(self._handle(event))
        return finish

    def _handle(self, event: Event) -> list[Effect]:
        controller, world = self.controller, self._world
        generation, phase = controller.generation, controller.phase
        if isinstance(event, Failed | NodeLost | AgentGone):
            world.clock.tell("%s learns of %s", self._process.name, event)
        effects = controller.handle(event, world.clock.now)
        world.clock.check(controller.generation >= generation, "the generation went back")
        if controller.phase is not phase:
            world.entered(controller.phase)
        return effects

    def _perform(self, effects: Iterable[Effect]) -> Generator[Wait, Any, Finish | None]:
        world, store, process, guard = self._world, self._world.store, self._process, self._guard
        for effect in effects:
            match effect:
                case Send((Adopt() | PlanChange()) as published):
                    assert self.controller.plan is not None
                    world.oracle.planned(process, self.controller.plan, self.seen)
                    yield store.create(process, key_of(JOB, published), published, guard=guard)
                case Send(WholePlan() as whole):
                    yield store.put(process, key_of(JOB, whole), whole, guard=guard)
                case Send(message):
                    world.oracle.commands(process, message, self.seen)
                    yield store.put(process, key_of(JOB, message), message, guard=guard)
                case ForgetNode(node):
                    yield store.delete(process, agent_key(JOB, node), guard=guard)
                case ForgetPlan(generation):
                    yield store.delete(process, plan_key(JOB, generation), guard=guard)
                case Note(name, fields):
                    world.clock.tell("%s: %s %s", process.name, name, fields)
                    world.oracle.noted(process, effect)
                case Finish():
                    return effect
        return None

    def _watch(self, begins_at: int) -> Callable[[], None]:
        return self._world.store.watch(self._process, job_prefix(JOB), begins_at, self._feed)

    def _feed(self, told: Told) -> None:
        event: Event | None = None
        if isinstance(told.value, Reported):
            event = told.value
        elif told.value is None and (node := node_of_agent(JOB, told.key)) is not None:
            event = NodeLost(node, "its agent's lease ended")
        if isinstance(event, AgentRecord):
            self.hold_lifeline(event)
        if event is not None:
            self._events.put((told.revision, event))

    def hold_lifeline(self, record: AgentRecord) -> None:
        """Learn of the end of this life, some time after it, unless a cut is between."""
        node, life = record.node, record.life
        if self._lifelines.get(node, 0) < life:
            self._lifelines[node] = life
            self._world.agents[node].when_gone(life, lambda: self._mourn(AgentGone(node, life)))

    def _mourn(self, gone: AgentGone) -> None:
        clock = self._world.clock
        if not self._world.network.is_isolated(gone.node):
            clock.after(clock.delay(), self._events.put, (0, gone))

    def _tick(self) -> Generator[Wait, Any, None]:
        clock, process = self._world.clock, self._process
        while True:
            yield process.sleep(TICK_SECONDS)
            asked_at = clock.now
            yield self._world.store.get(process, leader_key(JOB))
            silent = clock.now - asked_at
            if silent > OUTAGE_SECONDS:
                self._events.put((0, Outage(silent + OUTAGE_SECONDS)))
            self._events.put((0, Tick()))
