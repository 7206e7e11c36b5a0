"""A real agent over a real store, its processes played by the test: who is heard, and when."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from clusters import start
from scenes import job_shape, step_done

from elastic.agent import Agent, Departure
from elastic.faults import Fault, FaultInjection, SlotTarget
from elastic.health_config import HealthConfig
from elastic.keys import agent_key, decode, encode, job_prefix, key_of
from elastic.memory_store import MemoryStore
from elastic.messages import (
    Adopt,
    AgentMessage,
    AgentRecord,
    Beat,
    Failed,
    FaultFired,
    Fence,
    Leave,
    NodeProgress,
    NodeReport,
    PhaseDone,
    PlanChange,
    Quiesce,
    Quiesced,
    Ready,
    RecoveryPhase,
    StepDone,
    Stop,
    StoreMessage,
    Struck,
    WorkerMessage,
)
from elastic.node_workers import NodeSpec, WorkerSpec
from elastic.plan_chain import publication
from elastic.store import Change
from elastic.topology import DeviceId, Member
from health.events import FaultKind
from health.heartbeat import Activity, Heartbeat, Span

FAULTS = tuple(
    Fault(number, 3, None, None, SlotTarget(0, 0), FaultInjection.SIGKILL, 0) for number in (1, 2)
)
PATIENCE_SECONDS = 1.0
"""Spent only by a test that fails."""


class Process:
    """A child as the agent sees it; it ends when it is killed."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.connection, self.line = Pipe()
        self.process = self
        self.pid = os.getpid()
        self.exitcode: int | None = None
        self.sentinel, self._end = os.pipe()
        self.spec = spec
        self.say(Ready(spec.member))

    def say(self, message: WorkerMessage) -> None:
        self.line.send_bytes(msgspec.msgpack.encode([message]))

    def kill(self) -> None:
        if self.exitcode is None:
            self.exitcode = -9
            os.close(self._end)

    def join(self) -> None:
        os.close(self.sentinel)


class Spawner:
    """Starts nothing. `workers` are the processes of each device, newest last."""

    def __init__(self) -> None:
        self.workers: dict[DeviceId, Process] = {}

    def warm_up(self) -> None:
        """There is nothing to wait for."""

    def start(self, main: Callable[..., None], log: Path, *arguments: Any) -> Process:
        (spec,) = arguments
        self.workers[spec.member.device] = Process(spec)
        return self.workers[spec.member.device]


class Node:
    """The agent of a node with two devices, and what it writes."""

    def __init__(self, logs: Path, health: HealthConfig) -> None:
        self.store = MemoryStore()
        self.spawner = Spawner()
        self.devices = (DeviceId(0, 0), DeviceId(0, 1))
        self._written: AsyncIterator[Change] = self.store.watch(job_prefix("job"))
        spec = NodeSpec(
            job="job",
            node=0,
            host="localhost",
            devices=self.devices,
            health=health,
            faults=FAULTS,
            logs=logs,
            worker_main=lambda connection, spec: None,
            payload="",
            started_at=0.0,
        )
        self.agent = Agent(spec, self.store, self.spawner)  # type: ignore[arg-type]
        self.serving: asyncio.Task[Departure] | None = None

    async def command(self, message: StoreMessage) -> None:
        await self.store.put(key_of("job", message), encode(message))

    async def written(self, wanted: Callable[[Any], bool]) -> Any:
        """The next message in the store that is wanted."""

        async def found() -> Any:
            async for change in self._written:
                if change.value is not None and wanted(
                    message := decode("job", change.key, change.value)
                ):
                    return message

        return await asyncio.wait_for(found(), PATIENCE_SECONDS)

    async def told(self, device: DeviceId) -> AgentMessage:
        """What the worker of `device` is told next."""
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        line: Connection = self.spawner.workers[device].line
        loop.add_reader(line.fileno(), heard.set)
        await asyncio.wait_for(heard.wait(), PATIENCE_SECONDS)
        loop.remove_reader(line.fileno())
        return msgspec.msgpack.decode(line.recv_bytes(), type=AgentMessage)


def with_node(
    tmp_path: Path,
    story: Callable[[Node], Awaitable[None]],
    *,
    drain_timeout_seconds: float = 60.0,
    report_seconds: float = 60.0,
    heartbeat_seconds: float = 0.25,
) -> Departure:
    async def main() -> Departure:
        health = HealthConfig(
            drain_timeout_seconds=drain_timeout_seconds,
            report_seconds=report_seconds,
            heartbeat_seconds=heartbeat_seconds,
        )
        node = Node(tmp_path, health)
        serving = node.serving = asyncio.create_task(node.agent.run())
        try:
            await node.written(lambda m: isinstance(m, AgentRecord) and len(m.ready) == 2)
            await story(node)
        finally:
            await node.command(Stop("over", "completed"))
            departure = await serving
        return departure

    return asyncio.run(main())


def answer(member: Member) -> Quiesced:
    return Quiesced(2, member, None, False, 0.0)


def test_a_node_reports_the_answers_of_all_its_workers(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await node.command(Quiesce(2, True, (), "because"))
        for device in node.devices:
            await node.told(device)
            node.spawner.workers[device].say(answer(Member(device, 1)))
        report = await node.written(lambda m: isinstance(m, NodeReport) and len(m.workers) == 2)
        assert report == NodeReport(2, 0, tuple(answer(Member(d, 1)) for d in node.devices))

    with_node(tmp_path, story)


def test_a_death_is_reported_before_the_answers_that_no_longer_wait_for_it(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await node.command(Quiesce(2, True, (), "because"))
        first, second = node.devices
        await node.told(first)
        node.spawner.workers[first].say(answer(Member(first, 1)))
        node.spawner.workers[second].kill()
        failed = await node.written(lambda m: isinstance(m, Failed))
        assert failed.failure.kind is FaultKind.PROCESS_EXIT and failed.failure.device == second
        report = await node.written(lambda m: isinstance(m, NodeReport) and bool(m.workers))
        assert report.workers == (answer(Member(first, 1)),)
        record = await node.written(lambda m: isinstance(m, AgentRecord) and len(m.ready) == 2)
        assert record.ready == (Member(first, 1), Member(second, 2))

    with_node(tmp_path, story)


def test_a_fence_strikes_the_silent_worker_and_lets_its_neighbour_s_answer_through(
    tmp_path: Path,
) -> None:
    async def story(node: Node) -> None:
        await node.command(Quiesce(2, True, (), "because"))
        answered, silent = node.devices
        await node.told(answered)
        alive = node.spawner.workers[answered]
        alive.say(answer(Member(answered, 1)))
        await node.command(Fence(Member(silent, 1), "stop", 10.0))
        failed = await node.written(lambda m: isinstance(m, Failed))
        assert failed.failure.kind is FaultKind.HANG and failed.failure.device == silent
        await node.command(Fence(Member(answered, 1), "stop", 10.0))
        report = await node.written(lambda m: isinstance(m, NodeReport) and bool(m.workers))
        assert report.workers == (answer(Member(answered, 1)),)
        assert alive.exitcode is None and node.spawner.workers[answered] is alive

    with_node(tmp_path, story)


async def drained(node: Node) -> None:
    """The agent is asked to leave, and says so."""
    node.agent.drain()
    record = await node.written(lambda m: isinstance(m, AgentRecord) and m.draining)
    assert len(record.ready) == 2


async def gone(node: Node) -> None:
    """The agent's record is gone."""

    async def no_record() -> None:
        async for change in node._written:
            if change.value is None and change.key == agent_key("job", 0):
                return

    await asyncio.wait_for(no_record(), PATIENCE_SECONDS)


def test_a_draining_agent_leaves_when_it_may_and_its_workers_end_with_it(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await drained(node)
        alive = [node.spawner.workers[device] for device in node.devices]
        await node.command(Leave(0, 2))
        await node.command(Quiesce(2, False, (), "node0 drains"))
        for worker in alive:
            # Who is meant is another life of this node's agent: this one goes on.
            await node.told(worker.spec.member.device)
            assert worker.exitcode is None
        await node.command(Leave(0, 1))
        await gone(node)
        assert all(worker.exitcode is not None for worker in alive)

    assert with_node(tmp_path, story) is Departure.DRAINED


def test_a_draining_agent_starts_no_more_processes(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await drained(node)
        first = node.spawner.workers[node.devices[0]]
        first.kill()
        await node.written(lambda m: isinstance(m, AgentRecord) and len(m.ready) == 1)
        assert node.spawner.workers[node.devices[0]] is first
        await node.command(Leave(0, 1))
        await gone(node)

    with_node(tmp_path, story)


def step(node: Node, slot: int, number: int, *, awaited: bool = False) -> StepDone:
    return step_done(1, Member(node.devices[slot], 1), number, 1.0, awaited=awaited)


def is_progress(message: object) -> bool:
    return isinstance(message, NodeProgress)


def test_what_nobody_waits_for_is_said_with_what_somebody_does(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first, second = (node.spawner.workers[device] for device in node.devices)
        for number in range(3):
            second.say(step(node, 1, number))
        second.say(awaited := PhaseDone(1, Member(node.devices[1], 1), RecoveryPhase.RESUME, 1.0))
        progress = await node.written(is_progress)
        assert progress.notes == (*(step(node, 1, number) for number in range(3)), awaited)
        first.say(step(node, 0, 3, awaited=True))
        progress = await node.written(is_progress)
        assert progress.notes == (step(node, 0, 3, awaited=True),)
        assert {each.member.device.index: each.committed for each in progress.statuses} == {
            0: 3,
            1: 2,
        }

    with_node(tmp_path, story)


def beat(node: Node, slot: int, waiting: float | None) -> Beat:
    span = Span(Activity.VOTE, 4, 1, cold=False, own_seconds=0.0, longest_wait_seconds=0.0)
    return Beat(Heartbeat(node.devices[slot], 1, span, waiting, ()))


def test_that_nobody_can_go_on_is_said_at_once_and_also_that_somebody_can(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first, second = (node.spawner.workers[device] for device in node.devices)
        second.say(beat(node, 1, waiting=200.0))
        first.say(beat(node, 0, waiting=300.0))
        progress = await node.written(is_progress)
        assert (progress.node, progress.notes) == (0, ())
        stall = progress.stall
        assert (stall.device, stall.activity, stall.generation) == (
            node.devices[0],
            Activity.VOTE,
            1,
        )
        second.say(beat(node, 1, waiting=None))
        assert (await node.written(is_progress)).stall is None

    with_node(tmp_path, story, heartbeat_seconds=0.02)


def test_an_agent_that_is_not_let_go_leaves_when_its_time_is_over(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await drained(node)
        await gone(node)

    departure = with_node(tmp_path, story, drain_timeout_seconds=0.05)
    assert departure is Departure.UNDRAINED


def test_a_draining_agent_that_is_given_up_begins_no_new_life(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        await drained(node)
        await node.store.delete(agent_key("job", 0))
        assert node.serving is not None
        await asyncio.wait_for(asyncio.shield(node.serving), PATIENCE_SECONDS)

    assert with_node(tmp_path, story) is Departure.UNDRAINED


def test_a_fault_that_struck_is_known_to_all_before_the_failure_it_caused(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first, second = node.devices
        struck = node.spawner.workers[first]
        assert struck.spec.faults == FAULTS
        struck.say(FaultFired(1, Member(first, 1), 3, "vote", 0.0))
        struck.kill()
        told = [await node.written(lambda m: isinstance(m, Struck | Failed)) for _ in range(2)]
        assert told[0] == Struck(1) and told[1].fault == 1
        await node.told(second)
        # One of another node's workers was struck.
        await node.command(Struck(2))
        await node.told(second)
        node.spawner.workers[second].kill()
        await node.written(lambda m: isinstance(m, AgentRecord) and Member(second, 2) in m.ready)
        assert node.spawner.workers[first].spec.faults == FAULTS[1:]
        assert node.spawner.workers[second].spec.faults == ()

    with_node(tmp_path, story)


def test_what_nobody_waits_for_is_said_in_the_end(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.spawner.workers[node.devices[0]].say(step(node, 0, 0))
        assert (await node.written(is_progress)).notes == (step(node, 0, 0),)

    with_node(tmp_path, story, report_seconds=0.01)


def test_all_steps_are_said_before_the_answers(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        workers = [node.spawner.workers[device] for device in node.devices]
        await node.command(Quiesce(2, True, (), "because"))
        for slot, worker in enumerate(workers):
            await node.told(node.devices[slot])
            worker.say(step(node, slot, 0))
            worker.say(answer(worker.spec.member))
        said = await node.written(lambda m: isinstance(m, NodeProgress | NodeReport))
        assert said.notes == tuple(step(node, slot, 0) for slot in range(2))
        assert len((await node.written(lambda m: isinstance(m, NodeReport))).workers) == 2

    with_node(tmp_path, story)


def test_a_new_worker_begins_with_a_whole_plan(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        cluster = start(job_shape(), per_node=2)
        device, lost = node.devices
        again = cluster.without([lost]).advance()
        change = publication(cluster.history, again.plan)
        await node.command(Adopt(cluster.plan))
        assert await node.told(device) == await node.told(lost) == Adopt(cluster.plan)
        await node.command(Quiesce(2, True, (), "because"))
        assert isinstance(await node.told(device), Quiesce)
        await node.command(change)
        assert isinstance(change, PlanChange) and await node.told(device) == change
        node.spawner.workers[lost].kill()
        await node.written(lambda m: isinstance(m, AgentRecord) and Member(lost, 2) in m.ready)
        assert await node.told(lost) == Adopt(again.plan)

    with_node(tmp_path, story)
