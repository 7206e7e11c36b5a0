"""A whole cluster on one machine: controller, agents and store in the launcher's event loop.

The launcher plays every part that would be a machine of its own elsewhere, over the same messages:
one agent per simulated node, an embedded store, one worker process per device. It returns only when
all processes are gone, whether the job completed, halted, or was interrupted by a signal.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.agent import Agent, NodeSpec, WorkerMain, for_node
from elastic.config import ClusterConfig, HealthConfig
from elastic.controller import Controller
from elastic.driver import Driver
from elastic.effects import Finish, Limits
from elastic.faults import Fault
from elastic.job_shape import JobShape, cluster_devices
from elastic.journal import Listener, Recorder
from elastic.memory_store import MemoryStore
from elastic.spawn import Spawner

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


async def _run(run: LocalRun, listener: Listener) -> Ended:
    # A signal before the controller can be told would end the run without a word in its files.
    early: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _frame: early.append(received))
    logs = run.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    store, spawner = MemoryStore(), Spawner(run.preload)
    devices = cluster_devices(run.cluster.nodes, run.cluster.devices_per_node)
    started_at = time.time()
    controller = Controller(run.shape, devices, _limits(run.health), started_at)
    recorder = Recorder(run.run_dir, run.job, controller.plans, listener)
    recorder.note(started_at, "start", {"job": run.job, "workers": len(devices)})
    driver = Driver(controller, store, run.job, recorder.observe)
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
        started_at=started_at,
    )
    nodes = sorted({device.node for device in devices})
    agents = [Agent(for_node(template, node, devices), store, spawner) for node in nodes]
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        name = signal.Signals(number).name
        loop.add_signal_handler(number, driver.stop, f"the launcher received {name}")
    for received in early:
        driver.stop(f"the launcher received {signal.Signals(received).name}")
    ended = Finish("failed", "the launcher failed")
    try:
        ended = await _drive(driver, agents)
    except Exception as error:
        # The run's files must be finished, and say why, also when the launcher itself is wrong.
        traceback.print_exc()
        ended = Finish("failed", f"{type(error).__name__}: {error}")
        recorder.observe(time.time(), ended)
    finally:
        await loop.run_in_executor(None, spawner.close)
        for fault in run.faults:
            if fault.id not in recorder.injected:
                recorder.note(time.time(), "fault_not_injected", {"fault": fault.id})
        summary = recorder.close(ended.outcome)
    return Ended(ended.outcome, ended.reason, summary)


async def _drive(driver: Driver, agents: list[Agent]) -> Finish:
    """Run driver and agents until the driver ends; an agent that fails first ends the run."""
    driving = asyncio.create_task(driver.run())
    serving = [asyncio.create_task(agent.run()) for agent in agents]
    try:
        await asyncio.wait([driving, *serving], return_when=asyncio.FIRST_COMPLETED)
        for task in serving:
            if task.done() and not driving.done():
                task.result()
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
        max_recoveries=health.max_recoveries,
        max_fruitless_recoveries=health.max_fruitless_recoveries,
    )
