"""A whole cluster on one machine: controller, agents and store in the launcher's event loop.

The launcher plays every part that would be a machine of its own elsewhere, over the same messages:
one agent per simulated node, an embedded store, one worker process per device. It returns only when
all processes are gone, whether the job completed, halted, or was interrupted by a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.agent import Agent, for_node
from elastic.config import ClusterConfig, HealthConfig
from elastic.controller import Controller
from elastic.driver import Driver
from elastic.effects import Finish, Limits
from elastic.faults import Fault
from elastic.journal import Listener, Recorder
from elastic.memory_store import MemoryStore
from elastic.node_workers import NodeSpec, WorkerMain
from elastic.planner import JobShape
from elastic.recorded import Recorded
from elastic.spawn import Spawner
from elastic.store import Store
from elastic.topology import DeviceId

LOOPBACK = "127.0.0.1"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGENT_STOP_SECONDS = 10.0
"""How long agents may take to end their processes after the controller's stop."""


@dataclass(frozen=True, slots=True)
class LocalRun:
    """What to run, where. `preload` are modules that workers need and that take long to import."""

    job: str
    shape: JobShape
    cluster: ClusterConfig
    health: HealthConfig
    faults: tuple[Fault, ...]
    run_dir: Path
    worker_main: WorkerMain
    preload: tuple[str, ...]
    payload: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, and its summary."""

    outcome: str
    reason: str
    summary: dict[str, Any]


def run_local(run: LocalRun, listener: Listener) -> Ended:
    """Run to the end; SIGINT, SIGTERM and SIGHUP end the job as interrupted."""
    # Workers inherit this; more threads than cores would slow every one of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return asyncio.run(_run(run, listener))


def placed_devices(run: LocalRun) -> tuple[DeviceId, ...]:
    """The devices that have a place in the grid, in order; spares come after them."""
    devices = [
        DeviceId(node, index)
        for node in range(run.cluster.nodes)
        for index in range(run.cluster.devices_per_node)
    ]
    shape = run.shape
    return tuple(devices[: shape.tensor * shape.stages * shape.replicas])


async def _run(run: LocalRun, listener: Listener) -> Ended:
    # A signal before the controller can be told would end the run without a word in its files.
    early: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _frame: early.append(received))
    logs = run.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    store, spawner = MemoryStore(), Spawner(run.preload)
    devices = placed_devices(run)
    template = NodeSpec(
        job=run.job,
        node=0,
        host=LOOPBACK,
        devices=(),
        health=run.health,
        faults=run.faults,
        logs=logs,
        worker_main=run.worker_main,
        payload=run.payload,
        started_at=time.time(),
    )
    nodes = sorted({device.node for device in devices})
    agents = [Agent(for_node(template, node, devices), store, spawner) for node in nodes]
    driver = candidate(run, devices, store, "launcher", listener)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        name = signal.Signals(number).name
        loop.add_signal_handler(number, driver.stop, f"the launcher received {name}")
    for received in early:
        driver.stop(f"the launcher received {signal.Signals(received).name}")
    try:
        ended = await _drive(driver, agents)
    finally:
        await loop.run_in_executor(None, spawner.close)
    summary = json.loads((run.run_dir / "summary.json").read_bytes())
    return Ended(ended.outcome, ended.reason, summary)


def candidate(
    run: LocalRun, devices: tuple[DeviceId, ...], store: Store, name: str, listener: Listener
) -> Driver:
    """A candidate for the lead of `run`, which writes the run's files while it leads."""

    def make_controller(recorded: Recorded, now: float) -> Controller:
        return Controller(run.shape, devices, _limits(run.health), now, recorded)

    def open_recorder(controller: Controller) -> Recorder:
        recorder = Recorder(
            run.run_dir, run.job, controller.plans, listener, tuple(f.id for f in run.faults)
        )
        if recorder.is_new:
            recorder.note(time.time(), "start", {"job": run.job, "workers": len(devices)})
        return recorder

    lease_seconds = run.health.leader_lease_seconds
    return Driver(store, run.job, name, lease_seconds, make_controller, open_recorder)


async def _drive(driver: Driver, agents: list[Agent]) -> Finish:
    """Run driver and agents until the driver ends; an agent that fails first ends the run."""
    driving = asyncio.create_task(driver.run())
    serving = [asyncio.create_task(agent.run()) for agent in agents]
    try:
        await asyncio.wait([driving, *serving], return_when=asyncio.FIRST_COMPLETED)
        for task in serving:
            error = task.exception() if task.done() else None
            if error is not None:
                traceback.print_exception(error)
                driver.stop(f"{type(error).__name__}: {error}", outcome="failed")
        return await driving
    finally:
        # Agents end by themselves on the controller's stop; cancelling covers every other way.
        if driving.done() and not driving.cancelled() and driving.exception() is None:
            await asyncio.wait(serving, timeout=AGENT_STOP_SECONDS)
        tasks: list[asyncio.Task[Any]] = [driving, *serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _limits(health: HealthConfig) -> Limits:
    return Limits(
        spawn_timeout_seconds=health.spawn_timeout_seconds,
        quiesce_timeout_seconds=health.quiesce_timeout_seconds,
        pause_timeout_seconds=health.collective_timeout_seconds + health.quiesce_timeout_seconds,
        corroboration_seconds=health.corroboration_seconds,
        agent_timeout_seconds=health.agent_timeout_seconds,
        max_recoveries=health.max_recoveries,
        max_fruitless_recoveries=health.max_fruitless_recoveries,
    )
