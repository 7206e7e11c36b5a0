"""The worker processes of a node: started, listened to, fenced and replaced.

One event loop, no policy but that of `health.liveness`. Workers live in their own processes and
process groups; whatever is left of a group is killed before its failure is reported, so a reported
failure is a fenced one.

A device gets its replacement process as soon as it is healthy, long before any plan wants it. A
process that failed by itself leaves a healthy device. An injected fault says when the device heals.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import msgspec

from elastic.faults import Fault, FaultInjection, without_struck
from elastic.health_config import HealthConfig
from elastic.messages import AgentMessage, Beat, Failed, FaultFired, Ready, Struck, WorkerMessage
from elastic.spawn import Child, Spawner
from elastic.topology import INCARNATIONS_PER_LIFE, DeviceId, Member
from health.classify import Signal, classify
from health.liveness import Liveness, Stalled
from health.probes.process import error_file, is_stopped, read_exit


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker process is told when it starts.

    `payload` is the trainer's own; `error_file` is where the worker says what it raised.
    """

    member: Member
    host: str
    health: HealthConfig
    faults: tuple[Fault, ...]
    started_at: float
    payload: str
    error_file: Path


WorkerMain = Callable[[Connection, WorkerSpec], None]


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What an agent is told: its node, the devices that have places, and how to make workers.

    `host` is the address under which other nodes reach this one.
    """

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


class Supervisor(Protocol):
    """Who is told what the processes do; called from the event loop."""

    def heard(self, member: Member, messages: list[WorkerMessage]) -> None:
        """A worker said this."""

    def failed(self, failed: Failed) -> None:
        """A worker is gone, and fenced."""

    def changed(self) -> None:
        """Other workers are ready than before."""

    def judged(self, stall: Stalled | None) -> None:
        """No worker that takes part can go on, or one can: told with each look at them."""

    def broke(self, error: Exception) -> None:
        """The supervision itself failed: that is a bug."""


@dataclass(slots=True)
class _Process:
    """A worker process and what is known of it."""

    member: Member
    child: Child
    log: Path
    readable: select.poll
    ready: bool = False
    fired: FaultFired | None = None
    fenced: Signal | None = None


@dataclass(slots=True)
class _Device:
    """A device's processes so far. `heals_at` is the step from which a lost one may be used."""

    incarnations: int
    failed_spawns: int = 0
    process: _Process | None = None
    heals_at: int | None = None


class NodeWorkers:
    """The processes of one life of a node's agent, which is number `life` (from 1)."""

    def __init__(self, spec: NodeSpec, spawner: Spawner, life: int, supervisor: Supervisor) -> None:
        self._spec = spec
        self._spawner = spawner
        self._supervisor = supervisor
        first = (life - 1) * INCARNATIONS_PER_LIFE
        self._devices = {device: _Device(first) for device in spec.devices}
        self._faults = list(spec.faults)
        self._retired = False
        self._liveness = Liveness(spec.health.liveness, time.monotonic())
        self._decoder = msgspec.msgpack.Decoder(list[WorkerMessage])

    def start(self) -> None:
        """Start a process on every device."""
        for device in self._devices:
            self._spawn(device)

    async def watch(self) -> None:
        """Fence workers that hang, and say whether any can go on, until cancelled."""
        look_seconds = self._spec.health.liveness.look_seconds
        while True:
            await asyncio.sleep(look_seconds)
            stopped = [
                process.member.device
                for process in self._running()
                if is_stopped(process.child.pid)
            ]
            for signal in self._liveness.expired(time.monotonic(), stopped):
                self.fence(Member(signal.device, signal.incarnation), signal)
            self._supervisor.judged(self._liveness.stalled())

    @property
    def ready(self) -> tuple[Member, ...]:
        """The workers that wait for a plan or work."""
        return tuple(process.member for process in self._running() if process.ready)

    @property
    def heals(self) -> bool:
        """Whether a device is lost that is to return at some step."""
        return any(device.heals_at is not None for device in self._devices.values())

    def tell(self, message: AgentMessage, only: Member | None = None) -> None:
        """Send `message` to every ready worker, or to one."""
        ready = (process for process in self._running() if process.ready)
        _send(message, [process for process in ready if only in (None, process.member)])

    def forget(self, struck: Struck) -> None:
        """A fault struck somewhere: it is not to strike here, if it strikes only one."""
        self._faults = without_struck(self._faults, {struck.fault})
        # Processes that are about to be ready were started with it too.
        _send(struck, self._running())

    def fence(self, member: Member, signal: Signal) -> None:
        """Kill a worker because of what `signal` says. Its failure is reported once it is gone."""
        for process in self._running():
            if process.member == member:
                process.fenced = signal
                process.child.kill()

    def heal(self, committed: int) -> None:
        """Step `committed` is: start processes on the devices that return now."""
        for device, state in self._devices.items():
            if state.heals_at is not None and committed >= state.heals_at:
                state.heals_at = None
                self._spawn(device)

    def retire(self) -> None:
        """Start no more processes; those that run go on."""
        self._retired = True

    def kill_all(self) -> None:
        """End every process, without a word to the supervisor."""
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
        for device in self._devices.values():
            device.process = None

    def _running(self) -> list[_Process]:
        return [d.process for d in self._devices.values() if d.process is not None]

    def _spawn(self, device: DeviceId) -> None:
        if self._retired:
            return
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
            error_file=error_file(log),
        )
        child = self._spawner.start(self._spec.worker_main, log, spec)
        self._liveness.started(device, member.incarnation, time.monotonic())
        # The connection's own poll makes such an object each time, for half the cost of a message.
        readable = select.poll()
        readable.register(child.connection.fileno(), select.POLLIN)
        process = _Process(member, child, log, readable)
        state.process = process
        loop = asyncio.get_running_loop()
        loop.add_reader(child.connection.fileno(), self._guarded, self._hear, process)
        loop.add_reader(child.process.sentinel, self._guarded, self._ended, process)

    def _guarded(self, callback: Callable[[_Process], None], process: _Process) -> None:
        """Call back from the event loop, which would only log an error; ours ends the agent."""
        try:
            callback(process)
        except Exception as error:
            self._supervisor.broke(error)

    def _hear(self, process: _Process) -> None:
        """Take what the worker wrote; called when its line is readable."""
        messages: list[WorkerMessage] = []
        try:
            while process.readable.poll(0):
                for message in self._decoder.decode(process.child.connection.recv_bytes()):
                    self._take(process, message)
                    messages.append(message)
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(process.child.connection.fileno())
        self._supervisor.heard(process.member, messages)

    def _take(self, process: _Process, message: WorkerMessage) -> None:
        if isinstance(message, Ready):
            process.ready = True
            self._devices[process.member.device].failed_spawns = 0
            self._supervisor.changed()
        elif isinstance(message, Beat):
            self._liveness.observe(message.heartbeat, time.monotonic())
        elif isinstance(message, FaultFired):
            if self._fault(message).kind is not FaultInjection.SLOW:
                process.fired = message
            self._faults = [fault for fault in self._faults if fault.id != message.fault]

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
        self._liveness.ended(device, process.member.incarnation)
        state = self._devices[device]
        state.process = None
        fired = process.fired
        heal = self._fault(fired).heal_at_step if fired is not None else 0
        self._supervisor.failed(self._failure(process, device_healthy=heal == 0))
        self._supervisor.changed()
        if not process.ready:
            state.failed_spawns += 1
        if heal == 0 and state.failed_spawns < self._spec.health.spawn_attempts:
            self._spawn(device)
        elif heal is not None and heal > 0:
            state.heals_at = heal

    def _fault(self, fired: FaultFired) -> Fault:
        return next(fault for fault in self._spec.faults if fault.id == fired.fault)

    def _failure(self, process: _Process, *, device_healthy: bool) -> Failed:
        status = process.child.process.exitcode
        assert status is not None, "only an ended process is reported"
        member = process.member
        signal: Signal = process.fenced or read_exit(
            member.device, member.incarnation, status, process.log
        )
        fired = process.fired
        return Failed(
            classify(signal, device_healthy=device_healthy, now=time.time()),
            fired.fault if fired else None,
            fired.at if fired else None,
            fired.phase if fired else None,
            fired.step if fired else None,
        )


def _send(message: AgentMessage, processes: Iterable[_Process]) -> None:
    encoded = msgspec.msgpack.encode(message)
    for process in processes:
        # A process that died meanwhile is noticed by its sentinel.
        with suppress(OSError):
            process.child.connection.send_bytes(encoded)
