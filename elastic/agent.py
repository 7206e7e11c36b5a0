"""The agent of a node: spawns its workers, fences them, and relays between them and the store.

One event loop, no policy. Towards the store an agent keeps a record under its lease, reports
failures, and answers each quiesce once for all of its workers; towards its workers it passes the
controller's commands on. Workers live in their own processes and process groups; whatever is left
of a group is killed before its failure is reported, so a reported failure is a fenced one.

A device gets its replacement process as soon as it is healthy, long before any plan wants it. A
process that failed by itself leaves a healthy device. An injected fault says when the device heals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from elastic.config import HealthConfig
from elastic.faults import Fault
from elastic.keys import decode, encode, job_prefix, key_of
from elastic.messages import (
    Adopt,
    AgentMessage,
    AgentRecord,
    Failed,
    FaultFired,
    Fence,
    NodeProgress,
    NodeReport,
    Quiesce,
    Quiesced,
    Ready,
    StepDone,
    Stop,
    StoreMessage,
    WorkerMessage,
)
from elastic.rendezvous import RendezvousServer
from elastic.spawn import Child, Spawner
from elastic.store import Change, Lease, Store
from elastic.topology import DeviceId, Member
from health.classify import Signal, StoppedAnswering, classify
from health.probes.process import read_exit


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker process is told when it starts. `payload` is the trainer's own."""

    member: Member
    host: str
    health: HealthConfig
    faults: tuple[Fault, ...]
    started_at: float
    payload: str


WorkerMain = Callable[[Connection, WorkerSpec], None]


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What an agent is told: its node, the devices that have places, and how to make workers."""

    job: str
    node: int
    host: str
    devices: tuple[DeviceId, ...]
    health: HealthConfig
    faults: tuple[Fault, ...]
    logs: Path
    worker_main: WorkerMain
    payload: str
    started_at: float


@dataclass(slots=True)
class _Process:
    """A worker process and what its agent knows of it."""

    member: Member
    child: Child
    log: Path
    ready: bool = False
    fired: FaultFired | None = None
    fenced: StoppedAnswering | None = None


@dataclass(slots=True)
class _Device:
    """A device's processes so far. `heals_at` is the step from which a lost one may be used."""

    incarnations: int = 0
    failed_spawns: int = 0
    process: _Process | None = None
    heals_at: int | None = None


@dataclass(slots=True)
class _Answers:
    """Answers to the newest quiesce, until all of this node's workers gave one."""

    generation: int = 0
    awaited: set[Member] = field(default_factory=set)
    given: list[Quiesced] = field(default_factory=list)


class Agent:
    """One node's agent. `run` returns when the job is over and no process is left."""

    def __init__(self, spec: NodeSpec, store: Store, spawner: Spawner) -> None:
        self._spec = spec
        self._store = store
        self._spawner = spawner
        self._devices = {device: _Device() for device in spec.devices}
        self._faults = list(spec.faults)
        self._answers = _Answers()
        self._outbox: asyncio.Queue[StoreMessage] = asyncio.Queue()
        self._notes: list[WorkerMessage] = []
        self._decoder = msgspec.msgpack.Decoder(WorkerMessage)
        self._rendezvous_address = ""
        self._broken: asyncio.Future[None] | None = None
        self._changes = store.watch(job_prefix(spec.job))

    async def run(self) -> None:
        """Serve the node until the controller says stop. Kills its processes however it ends."""
        loop = asyncio.get_running_loop()
        rendezvous = RendezvousServer()
        self._rendezvous_address = await rendezvous.start(self._spec.host)
        lease = await self._store.lease(self._spec.health.lease_seconds)
        self._broken = loop.create_future()
        tasks: list[asyncio.Future[None]] = [
            self._broken,
            asyncio.create_task(self._write(lease)),
            asyncio.create_task(self._listen(self._changes)),
        ]
        try:
            # In a thread, as the fork server's imports take seconds.
            warm = loop.run_in_executor(None, self._spawner.warm_up)
            await asyncio.wait([warm, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not any(task.done() for task in tasks):
                warm.result()
                for device in self._devices:
                    self._spawn(device)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            warm.add_done_callback(lambda future: future.exception())
            # Any of them that fails takes the agent down with its error.
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._kill_all()
            await rendezvous.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    # From the store.

    async def _listen(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            if change.value is None or not self._concerns(change.key):
                continue
            match decode(change.value):
                case Quiesce() as quiesce:
                    self._expect_answers(quiesce)
                    self._tell(quiesce)
                case Adopt() as adopt:
                    self._tell(adopt)
                case Fence() as fence:
                    self._fence(fence)
                case NodeProgress() as progress:
                    self._heal(progress)
                case Stop() as stop:
                    self._tell(stop)
                    return
                case _:
                    continue

    def _concerns(self, key: str) -> bool:
        """Whether a change may matter here; most are other parties' reports of every step."""
        path = key.removeprefix(job_prefix(self._spec.job))
        heals = any(device.heals_at is not None for device in self._devices.values())
        return path.startswith(("commands/", "plan/")) or (heals and path.startswith("progress/"))

    def _tell(self, message: AgentMessage) -> None:
        encoded = msgspec.msgpack.encode(message)
        for process in self._running():
            if process.ready:
                # A process that died meanwhile is noticed by its sentinel.
                with suppress(OSError):
                    process.child.connection.send_bytes(encoded)

    def _expect_answers(self, quiesce: Quiesce) -> None:
        self._answers = _Answers(
            quiesce.generation, {process.member for process in self._running() if process.ready}
        )
        self._answer_if_complete()

    def _fence(self, fence: Fence) -> None:
        if fence.member in {answer.member for answer in self._answers.given}:
            # It did answer; only its node's report waits for somebody else, who is fenced too.
            self._report_answers()
            return
        for process in self._running():
            if process.member == fence.member:
                process.fenced = StoppedAnswering(
                    fence.member.device,
                    fence.member.incarnation,
                    fence.asked_to,
                    fence.waited_seconds,
                )
                process.child.kill()

    def _heal(self, progress: NodeProgress) -> None:
        committed = max((n.step for n in progress.notes if isinstance(n, StepDone)), default=-1)
        for device, state in self._devices.items():
            if state.heals_at is not None and committed >= state.heals_at:
                state.heals_at = None
                self._spawn(device)

    # Processes.

    def _running(self) -> list[_Process]:
        return [d.process for d in self._devices.values() if d.process is not None]

    def _spawn(self, device: DeviceId) -> None:
        state = self._devices[device]
        state.incarnations += 1
        member = Member(device, state.incarnations)
        log = self._spec.logs / f"node{device.node}-{device.index}.{member.incarnation}.log"
        spec = WorkerSpec(
            member=member,
            host=self._spec.host,
            health=self._spec.health,
            faults=tuple(self._faults),
            started_at=self._spec.started_at,
            payload=self._spec.payload,
        )
        child = self._spawner.start(self._spec.worker_main, log, spec)
        process = _Process(member, child, log)
        state.process = process
        loop = asyncio.get_running_loop()
        loop.add_reader(child.connection.fileno(), self._guarded, self._hear, process)
        loop.add_reader(child.process.sentinel, self._guarded, self._ended, process)

    def _guarded(self, callback: Callable[[_Process], None], process: _Process) -> None:
        """Call back from the event loop, which would only log an error; ours ends the agent."""
        try:
            callback(process)
        except Exception as error:
            if self._broken is not None and not self._broken.done():
                self._broken.set_exception(error)

    def _hear(self, process: _Process) -> None:
        """Take what the worker wrote; called when its line is readable."""
        try:
            while process.child.connection.poll():
                self._take(process, self._decoder.decode(process.child.connection.recv_bytes()))
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(process.child.connection.fileno())
        self._flush_notes()

    def _take(self, process: _Process, message: WorkerMessage) -> None:
        match message:
            case Ready():
                process.ready = True
                self._devices[process.member.device].failed_spawns = 0
                self._put_record()
            case Quiesced():
                if message.generation == self._answers.generation:
                    self._answers.given.append(message)
                    self._answers.awaited.discard(message.member)
                    self._answer_if_complete()
            case FaultFired():
                process.fired = message
                self._faults = [fault for fault in self._faults if fault.id != message.fault]
                self._notes.append(message)
            case _:
                self._notes.append(message)

    def _ended(self, process: _Process) -> None:
        """The process is gone: fence what is left of it, report it, and replace it if possible."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.child.process.sentinel)
        process.child.kill()
        self._hear(process)
        loop.remove_reader(process.child.connection.fileno())
        process.child.process.join()
        process.child.connection.close()
        device = process.member.device
        state = self._devices[device]
        state.process = None
        fault = self._fault(process.fired)
        heal = fault.heal_at_step if fault is not None else 0
        self._report_failure(process, device_healthy=heal == 0)
        self._answers.awaited.discard(process.member)
        self._answer_if_complete()
        self._put_record()
        if not process.ready:
            state.failed_spawns += 1
        if heal == 0 and state.failed_spawns < self._spec.health.spawn_attempts:
            self._spawn(device)
        elif heal is not None and heal > 0:
            state.heals_at = heal

    def _fault(self, fired: FaultFired | None) -> Fault | None:
        if fired is None:
            return None
        return next(fault for fault in self._spec.faults if fault.id == fired.fault)

    def _kill_all(self) -> None:
        children = [process.child for process in self._running()]
        loop = asyncio.get_running_loop()
        for child in children:
            loop.remove_reader(child.connection.fileno())
            loop.remove_reader(child.process.sentinel)
        for child in children:
            child.kill()
            child.connection.close()
        for child in children:
            child.process.join()

    # To the store, in order, by one task.

    def _report_failure(self, process: _Process, *, device_healthy: bool) -> None:
        status = process.child.process.exitcode
        assert status is not None, "only an ended process is reported"
        member = process.member
        signal: Signal = process.fenced or read_exit(
            member.device, member.incarnation, status, process.log
        )
        fired = process.fired
        self._outbox.put_nowait(
            Failed(
                classify(signal, device_healthy=device_healthy, now=time.time()),
                fired.fault if fired else None,
                fired.at if fired else None,
                fired.phase if fired else None,
                fired.step if fired else None,
            )
        )

    def _answer_if_complete(self) -> None:
        if self._answers.generation and not self._answers.awaited:
            self._report_answers()

    def _report_answers(self) -> None:
        answers = self._answers
        report = NodeReport(answers.generation, self._spec.node, tuple(answers.given))
        self._outbox.put_nowait(report)

    def _put_record(self) -> None:
        ready = tuple(process.member for process in self._running() if process.ready)
        self._outbox.put_nowait(
            AgentRecord(self._spec.node, self._spec.devices, ready, self._rendezvous_address)
        )

    def _flush_notes(self) -> None:
        if self._notes:
            notes, self._notes = tuple(self._notes), []
            self._outbox.put_nowait(NodeProgress(self._spec.node, notes))  # type: ignore[arg-type]

    async def _write(self, lease: Lease) -> None:
        while True:
            message = await self._outbox.get()
            under = lease if isinstance(message, AgentRecord) else None
            await self._store.put(key_of(self._spec.job, message), encode(message), under)


def for_node(spec: NodeSpec, node: int, devices: Sequence[DeviceId]) -> NodeSpec:
    """`spec` as the agent of `node` needs it."""
    own = tuple(device for device in devices if device.node == node)
    return replace(spec, node=node, devices=own)
