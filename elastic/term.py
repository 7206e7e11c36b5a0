"""One term of a leader: the loop around the controller. Store changes and time in, effects out.

The term begins with the job's keys as they were at one revision, on which the controller is built,
and goes on with every change after it. Effects are performed in the order in which the machine gave
them, and what goes to the store is written before the next event is taken: whoever takes over finds
all that was decided. Every write carries the guard of the lead, so a leader that was paused for too
long, and believes that it still leads, changes nothing. Files have no guard; so a leader that wrote
nothing to the store for as long as its lease lasts does that first.

Deadlines hold only while everybody can report. Before time is passed on, the store must answer; how
long it kept silent is passed on first, so that nobody is called late for it.

The run's files are the leader's. A successor replays the reports since the revision up to which its
predecessor had written them, which that one notes in the store. What is written by then includes
nothing that still waits for other reports. A term that is over before it came so far replays the
rest first, as nobody will come after it.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

from elastic.controller import Controller
from elastic.effects import (
    AgentGone,
    Effect,
    Event,
    Finish,
    ForgetNode,
    ForgetPlan,
    NodeLost,
    Note,
    Outage,
    Send,
    StopRequested,
    Tick,
)
from elastic.journal import Recorder
from elastic.keys import (
    agent_key,
    decode,
    encode,
    job_prefix,
    key_of,
    leader_key,
    node_of_agent,
    plan_key,
    position_key,
)
from elastic.leadership import Leadership
from elastic.lifeline import until_nobody_listens
from elastic.messages import (
    Adopt,
    AgentRecord,
    ComponentFault,
    Failed,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PlanChange,
    Stop,
    StopWish,
)
from elastic.store import Change, GuardFailed, LeaseLost, Store

TICK_SECONDS = 0.25
"""How often deadlines are looked at; each is noticed up to this much later."""
OUTAGE_SECONDS = 1.0
"""A store that takes longer than this to answer was out; reports get as long again to arrive."""
POSITION_SECONDS = 1.0
"""How often the term notes up to where the run's files are written."""

Reported = AgentRecord | Failed | ComponentFault | NodeAlive | NodeReport | NodeProgress


class Term:
    """One term. `controller` was built on the keys as they were at the revision `begins_at`, when
    the `agents` lived."""

    def __init__(
        self,
        store: Store,
        job: str,
        leadership: Leadership,
        controller: Controller,
        recorder: Recorder,
        *,
        agents: Iterable[AgentRecord],
        lease_seconds: float,
        begins_at: int,
        written_to: int,
    ) -> None:
        self._store = store
        self._job = job
        self._leadership = leadership
        self._controller = controller
        self._recorder = recorder
        self._begins_at = begins_at
        self._seen = self._noted = written_to
        # With the revision of the change that tells of it; 0 for what happens outside the store.
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._agents = tuple(agents)
        self._lease_seconds = lease_seconds
        self._led_at = time.monotonic()
        # By node, with the life of its agent.
        self._lifelines: dict[int, tuple[int, asyncio.Task[None]]] = {}
        # From here on no change is missed, however long the first effects take.
        self._changes = store.watch(job_prefix(job), after=written_to)

    def take(self, event: Event) -> None:
        """An event from outside the store; its turn comes after those that wait already."""
        self._events.put_nowait((0, event))

    async def run(self) -> Finish:
        """Lead until the job is over. Raises GuardFailed or LeaseLost when the lead is lost."""
        for record in self._agents:
            self._hold_lifeline(record)
        working = asyncio.create_task(self._work())
        beside = [
            asyncio.create_task(self._feed(self._changes)),
            asyncio.create_task(self._tick()),
            asyncio.create_task(self._until_lost()),
        ]
        try:
            await asyncio.wait([working, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                if task.done() and not working.done():
                    task.result()
            return await working
        except (GuardFailed, LeaseLost):
            raise
        except Exception as error:
            # The run's files must be finished, and say why, also when the controller is wrong.
            traceback.print_exc()
            finish = Finish("failed", f"{type(error).__name__}: {error}")
            await self._perform([Send(Stop(finish.reason, finish.outcome)), finish])
            return finish
        finally:
            everything: list[asyncio.Task[Any]] = [working, *beside]
            everything += [lifeline for _, lifeline in self._lifelines.values()]
            for each in everything:
                each.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    async def _work(self) -> Finish:
        begun = self._controller.begin(self._recorder.told, time.time())
        finish = await self._perform(begun)
        while finish is None:
            revision, event = await self._events.get()
            if time.monotonic() - self._led_at >= self._lease_seconds:
                await self._note_position()
            now = time.time()
            if isinstance(event, Reported):
                self._recorder.observe(now, event, revision)
            if 0 < revision <= self._begins_at:
                # What the predecessor may not have written of something that lies behind.
                self._recorder.catch_up(now, event)
            else:
                finish = await self._perform(self._controller.handle(event, now))
            self._seen = max(self._seen, revision)
        return finish

    async def _perform(self, effects: list[Effect]) -> Finish | None:
        store, guard = self._store, self._leadership.guard
        for effect in effects:
            match effect:
                case Send((Adopt() | PlanChange()) as plan):
                    await self._led(
                        store.create(key_of(self._job, plan), encode(plan), guard=guard)
                    )
                case Send(message):
                    await self._led(
                        store.put(key_of(self._job, message), encode(message), guard=guard)
                    )
                case ForgetNode(node):
                    await self._led(store.delete(agent_key(self._job, node), guard=guard))
                case ForgetPlan(generation):
                    await self._led(store.delete(plan_key(self._job, generation), guard=guard))
                case Note():
                    self._recorder.observe(time.time(), effect)
                case Finish():
                    if self._seen < self._begins_at:
                        await replay(
                            store, self._job, self._leadership, self._recorder, self._written
                        )
                    self._recorder.observe(time.time(), effect)
                    return effect
        return None

    async def _led(self, write: Coroutine[Any, Any, object]) -> None:
        """A write with the guard, which proves that this controller led when it was asked for."""
        asked_at = time.monotonic()
        await write
        self._led_at = asked_at

    @property
    def _written(self) -> int:
        """The revision up to which the run's files are written."""
        waits_since = self._recorder.waits_since
        return self._seen if waits_since is None else min(self._seen, waits_since - 1)

    async def _note_position(self) -> None:
        """Say up to where the run's files are written."""
        self._noted = self._written
        value = str(self._noted).encode()
        guard = self._leadership.guard
        await self._led(self._store.put(position_key(self._job), value, guard=guard))

    async def _feed(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            event: object = None
            # What is older was over, or is among the agents, when the term began.
            is_new = change.revision > self._begins_at
            if change.value is not None:
                event = decode(self._job, change.key, change.value)
            elif (node := node_of_agent(self._job, change.key)) is not None:
                event = NodeLost(node, "its agent's lease ended")
                if is_new:
                    self._release_lifeline(node)
            if isinstance(event, AgentRecord) and is_new:
                self._hold_lifeline(event)
            if isinstance(event, StopWish):
                event = StopRequested(event.reason, event.outcome)
            if isinstance(event, Reported | NodeLost | StopRequested):
                self._events.put_nowait((change.revision, event))

    def _hold_lifeline(self, record: AgentRecord) -> None:
        """Learn it at once when this life of an agent ends."""
        life, lifeline = self._lifelines.get(record.node, (0, None))
        if record.life <= life:
            return
        if lifeline is not None:
            lifeline.cancel()
        held = asyncio.create_task(self._until_gone(record))
        self._lifelines[record.node] = (record.life, held)

    def _release_lifeline(self, node: int) -> None:
        """The node's record is gone, because its lease ended or because this leader deleted it."""
        if (held := self._lifelines.pop(node, None)) is not None:
            held[1].cancel()

    async def _until_gone(self, record: AgentRecord) -> None:
        await until_nobody_listens(record.rendezvous)
        self.take(AgentGone(record.node, record.life))

    async def _tick(self) -> None:
        noted_at = time.time()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            asked_at = time.time()
            await self._store.get(leader_key(self._job))
            silent = time.time() - asked_at
            if silent > OUTAGE_SECONDS:
                self.take(Outage(silent + OUTAGE_SECONDS))
            self.take(Tick())
            if time.time() - noted_at > POSITION_SECONDS and self._written > self._noted:
                noted_at = time.time()
                await self._note_position()

    async def _until_lost(self) -> None:
        await self._leadership.lease.wait_lost()
        raise LeaseLost("the lease of the lead ended")


async def replay(
    store: Store, job: str, leadership: Leadership, recorder: Recorder, written_to: int
) -> None:
    """Write what reports tell since the revision up to which the run's files are written.

    Raises GuardFailed or LeaseLost when the lead is lost.
    """
    changes = store.watch(job_prefix(job), after=written_to)
    position = str(written_to).encode()
    last = await store.put(position_key(job), position, guard=leadership.guard)
    async for change in changes:
        if change.revision >= last:
            return
        message = decode(job, change.key, change.value) if change.value else None
        if isinstance(message, Reported):
            recorder.observe(time.time(), message, change.revision)
            recorder.catch_up(time.time(), message)
