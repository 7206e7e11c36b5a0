"""The agent of a node: relays between the store and the node's workers.

One event loop, no policy. Towards the store an agent keeps a record under its lease, reports
failures, and answers each announcement once for all of its workers; towards its workers it passes
the controller's commands on.

An agent lives as long as its record. If that is gone, because the lease ended while the store was
out of reach or because the controller gave the node up, others go on without this node: the agent
kills its workers, and begins a new life with new ones. It never takes up processes that it did not
start in this life, and they end with it (see `elastic.spawn`).

An agent that is asked to leave drains: it says so in its record and starts no more processes. Its
workers go on, and hand over what they hold, until the controller says that nothing of the node is
in use any more, or until the patience with which it was asked ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import uuid4

from elastic.keys import agent_key, decode, encode, job_prefix, key_of, life_key, whole_plan_key
from elastic.leadership import create_when_free
from elastic.messages import (
    Adopt,
    AgentRecord,
    ConnectionLost,
    Failed,
    FaultFired,
    Fence,
    Leave,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PhaseDone,
    PlanChange,
    Quiesce,
    Quiesced,
    Ready,
    StepDone,
    Stop,
    StoreMessage,
    Struck,
    WorkerMessage,
)
from elastic.node_news import NodeNews
from elastic.node_workers import NodeSpec, NodeWorkers
from elastic.plan_chain import PlanChain, chain_of, generation_of
from elastic.rendezvous import RendezvousServer
from elastic.spawn import Spawner
from elastic.store import AlreadyExists, Change, Lease, LeaseLost, Store
from elastic.topology import Member
from elastic.worker_status import is_awaited
from health.classify import StoppedAnswering
from health.liveness import Stalled

_log = logging.getLogger(__name__)


class Departure(StrEnum):
    """Why an agent ended. `UNDRAINED`: it was asked to leave, and its node's work is not handed
    over."""

    JOB_OVER = "the job is over"
    DRAINED = "its work was handed over"
    UNDRAINED = "its work was not handed over in time"


class Agent:
    """One node's agent. `run` returns when it is not needed any more and no process is left.

    `drain` may be called at any time from the event loop.
    """

    def __init__(self, spec: NodeSpec, store: Store, spawner: Spawner) -> None:
        self._spec = spec
        self._store = store
        self._spawner = spawner
        self._asked_to_leave = asyncio.Event()

    def drain(self) -> None:
        """Hand the node's work over, and leave."""
        self._asked_to_leave.set()

    async def run(self) -> Departure:
        """Serve the node, life after life, until the controller ends the job or it is to leave."""
        # In a thread, as the fork server's imports take seconds; meanwhile the node registers.
        warm = asyncio.get_running_loop().run_in_executor(None, self._spawner.warm_up)
        warm.add_done_callback(lambda future: future.exception())
        while not self._asked_to_leave.is_set():
            life = _Life(self._spec, self._store, self._spawner, warm, self._asked_to_leave)
            if (departure := await life.run()) is not None:
                return departure
            _log.warning(
                "node %d was given up by the others, while the last step that its own workers had "
                "committed was %d",
                self._spec.node,
                life.committed,
            )
        return Departure.UNDRAINED


class _Ended(Exception):
    """The life is over, and with `departure` the agent is."""

    def __init__(self, departure: Departure | None) -> None:
        super().__init__(departure)
        self.departure = departure


@dataclass(slots=True)
class _Answers:
    """Answers to the newest announcement, until all of this node's workers gave one."""

    generation: int = 0
    awaited: set[Member] = field(default_factory=set)
    given: list[Quiesced] = field(default_factory=list)


class _Life:
    """An agent from its registration to the end of its record. It supervises its own workers."""

    def __init__(
        self,
        spec: NodeSpec,
        store: Store,
        spawner: Spawner,
        warm: asyncio.Future[None],
        asked_to_leave: asyncio.Event,
    ) -> None:
        self._spec = spec
        self._store = store
        self._spawner = spawner
        self._warm = warm
        self._asked_to_leave = asked_to_leave
        self._draining = False
        self._number = 0
        self._rendezvous_address = ""
        self._announced = 0
        self._held: list[Adopt | PlanChange] = []
        self._plans = PlanChain()
        self._answers = _Answers()
        self._news = NodeNews(spec.node)
        self._saying_later: asyncio.TimerHandle | None = None
        self._outbox: asyncio.Queue[StoreMessage | None] = asyncio.Queue()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> Departure | None:
        """Live; None: it was given up. No process is left, however it ends."""
        job, node, health = self._spec.job, self._spec.node, self._spec.health
        rendezvous = RendezvousServer()
        self._rendezvous_address = await rendezvous.start(self._spec.host)
        self._number = await _next_life(self._store, job, node)
        self._workers = NodeWorkers(self._spec, self._spawner, self._number, self)
        tasks: list[asyncio.Future[None]] = [self._broken]
        lease = await self._store.lease(health.lease_seconds)
        try:
            own = agent_key(job, node)
            await create_when_free(self._store, own, encode(self._record()), lease)
            prefixes = [f"{job_prefix(job)}{each}" for each in ("commands/", "plan/")]
            if any(fault.heal_at_step for fault in self._spec.faults):
                # Which step is committed tells when a lost device may return.
                prefixes.append(f"{job_prefix(job)}progress/")
            seen = await self._store.get_prefix(prefixes[0])
            for key, value in seen.values.items():
                self._catch_up(decode(job, key, value))
            self._plans = await _read_plans(self._store, job)
            watches = [self._store.watch(each, after=seen.revision) for each in (*prefixes, own)]
            tasks += [asyncio.create_task(self._listen(changes)) for changes in watches]
            tasks.append(asyncio.create_task(self._write(lease)))
            tasks.append(asyncio.create_task(_until_lost(lease)))
            tasks.append(asyncio.create_task(self._workers.watch()))
            tasks.append(asyncio.create_task(self._drain()))
            await asyncio.wait([self._warm, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not any(task.done() for task in tasks):
                self._warm.result()
                self._workers.start()
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            raise AssertionError("a task of an agent ended without a reason")
        except _Ended as ended:
            return ended.departure
        except LeaseLost:
            return None
        finally:
            for task in tasks:
                task.cancel()
            if self._saying_later is not None:
                self._saying_later.cancel()
            self._workers.kill_all()
            await asyncio.gather(*tasks, return_exceptions=True)
            await rendezvous.close()
            await lease.revoke()

    @property
    def committed(self) -> int:
        """The last step that a worker of this life committed; -1 if none did."""
        return self._news.committed

    # From the store.

    def _catch_up(self, message: StoreMessage | None) -> None:
        """What was said before this life began: only how far the job is matters."""
        match message:
            case Struck() as struck:
                self._workers.forget(struck)
            case Quiesce(generation):
                self._announced = max(self._announced, generation)
            case Stop():
                raise _Ended(Departure.JOB_OVER)
            case _:
                pass

    async def _listen(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            if change.value is None:
                if change.key == agent_key(self._spec.job, self._spec.node):
                    raise _Ended(None)
                continue
            match decode(self._spec.job, change.key, change.value):
                case Quiesce() as quiesce:
                    self._announce(quiesce)
                case (Adopt() | PlanChange()) as plan:
                    # Plans are watched apart from announcements, and may be told before them.
                    self._held.append(plan)
                    self._pass_plans_on()
                case Fence() as fence:
                    self._fence(fence)
                case Struck() as struck:
                    self._workers.forget(struck)
                case NodeProgress() as progress if self._workers.heals:
                    steps = (note.step for note in progress.notes if isinstance(note, StepDone))
                    self._workers.heal(max(steps, default=-1))
                case Leave(self._spec.node, self._number):
                    raise _Ended(Departure.DRAINED)
                case Stop() as stop:
                    self._workers.tell(stop)
                    raise _Ended(Departure.JOB_OVER)
                case _:
                    continue

    def _announce(self, quiesce: Quiesce) -> None:
        self._announced = max(self._announced, quiesce.generation)
        if quiesce.ask_agents:
            self._outbox.put_nowait(NodeAlive(quiesce.generation, self._spec.node))
        self._answers = _Answers(quiesce.generation, set(self._workers.ready))
        self._answer_if_complete()
        self._workers.tell(quiesce)
        self._pass_plans_on()

    def _pass_plans_on(self) -> None:
        announced = max(1, self._announced)
        while self._held and generation_of(self._held[0]) <= announced:
            plan = self._held.pop(0)
            if self._plans.take(plan):
                self._workers.tell(plan)

    def _fence(self, fence: Fence) -> None:
        member = fence.member
        if member in {answer.member for answer in self._answers.given}:
            # It did answer; only its node's report waits for somebody else, who is fenced too.
            self._report_answers()
            return
        signal = StoppedAnswering(
            member.device, member.incarnation, fence.asked_to, fence.waited_seconds
        )
        self._workers.fence(member, signal)

    async def _drain(self) -> None:
        """Once asked to leave, say so; leave unasked if nobody answers in time."""
        await self._asked_to_leave.wait()
        self._draining = True
        self._workers.retire()
        self._outbox.put_nowait(self._record())
        await asyncio.sleep(self._spec.health.drain_timeout_seconds)
        raise _Ended(Departure.UNDRAINED)

    # From the workers.

    def heard(self, member: Member, messages: list[WorkerMessage]) -> None:
        """A worker said this."""
        for message in messages:
            match message:
                case Quiesced():
                    if message.generation == self._answers.generation:
                        self._answers.given.append(message)
                        self._answers.awaited.discard(member)
                        self._answer_if_complete()
                case Ready():
                    if (plan := self._plans.newest()) is not None:
                        # It does not place this worker, but the next one is a change to it.
                        self._workers.tell(Adopt(plan), only=member)
                case PhaseDone() | ConnectionLost() | StepDone() | FaultFired():
                    if isinstance(message, FaultFired):
                        self._outbox.put_nowait(Struck(message.fault))
                    self._news.hear(member, message)
                    if is_awaited(message):
                        self._say_news()
                    elif self._saying_later is None:
                        wait = self._spec.health.report_seconds
                        loop = asyncio.get_running_loop()
                        self._saying_later = loop.call_later(wait, self._say_news)
                case _:
                    continue

    def failed(self, failed: Failed) -> None:
        """A worker is gone, and fenced."""
        self._news.forget(failed.member)
        self._outbox.put_nowait(failed)
        self._answers.awaited.discard(failed.member)
        self._answer_if_complete()

    def changed(self) -> None:
        """Other workers are ready than before."""
        self._outbox.put_nowait(self._record())

    def judged(self, stall: Stalled | None) -> None:
        """No worker here can go on, or one can."""
        if self._news.judge(stall):
            self._say_news()

    def broke(self, error: Exception) -> None:
        """The supervision itself failed: this ends the agent."""
        if not self._broken.done():
            self._broken.set_exception(error)

    # To the store, in order, by one task.

    def _record(self) -> AgentRecord:
        return AgentRecord(
            self._spec.node,
            self._number,
            self._spec.devices,
            self._workers.ready,
            self._rendezvous_address,
            self._draining,
        )

    def _answer_if_complete(self) -> None:
        if self._answers.generation and not self._answers.awaited:
            self._report_answers()

    def _say_news(self) -> None:
        if self._saying_later is not None:
            self._saying_later.cancel()
            self._saying_later = None
        if self._news.is_any:
            self._outbox.put_nowait(None)

    def _report_answers(self) -> None:
        # Whoever plans the next generation knows all of this one.
        self._say_news()
        answers = self._answers
        report = NodeReport(answers.generation, self._spec.node, tuple(answers.given))
        self._outbox.put_nowait(report)

    async def _write(self, lease: Lease) -> None:
        while True:
            # None stands for all that was said since the last write.
            message = await self._outbox.get() or self._news.tell()
            if message is None:
                continue
            under = lease if isinstance(message, AgentRecord) else None
            await self._store.put(key_of(self._spec.job, message), encode(message), under)


async def _next_life(store: Store, job: str, node: int) -> int:
    """A number that no agent of this node had before."""
    while True:
        prefix = f"{life_key(job, node)}/"
        number = len((await store.get_prefix(prefix)).values) + 1
        try:
            # Nobody else writes the same, so a repeated attempt knows its own work.
            await store.create(f"{prefix}{number}", uuid4().bytes)
        except AlreadyExists:
            continue
        return number


async def _read_plans(store: Store, job: str) -> PlanChain:
    """Those that were published so far."""
    found = await store.get_prefix(f"{job_prefix(job)}plan/")
    # Read after the changes, so that none of those that follow it is missing.
    whole = await store.get(whole_plan_key(job))
    values = found.values | ({whole_plan_key(job): whole} if whole is not None else {})
    return chain_of(decode(job, key, value) for key, value in values.items())


async def _until_lost(lease: Lease) -> None:
    await lease.wait_lost()
    raise _Ended(None)
