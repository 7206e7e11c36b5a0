"""A whole cluster in one process: controller, agents and store in the launcher's event loop.

The launcher plays every part that would be a machine of its own elsewhere, over the same messages:
one agent per simulated node, an embedded store, one worker process per device. It returns only when
all processes are gone, whether the job completed, halted, or was interrupted by a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import traceback
from dataclasses import dataclass
from typing import Any

from elastic.agent import Agent
from elastic.driver import Driver
from elastic.effects import Finish
from elastic.journal import Listener
from elastic.memory_store import MemoryStore
from elastic.run_spec import RunSpec, candidate, node_spec
from elastic.spawn import Spawner

LOOPBACK = "127.0.0.1"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGENT_STOP_SECONDS = 10.0
"""How long agents may take to end their processes after the controller's stop."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, and its summary."""

    outcome: str
    reason: str
    summary: dict[str, Any]


def run_local(run: RunSpec, listener: Listener) -> Ended:
    """Run to the end; SIGINT, SIGTERM and SIGHUP end the job as interrupted."""
    # Workers inherit this; more threads than cores would slow every one of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return asyncio.run(_run(run, listener))


async def _run(run: RunSpec, listener: Listener) -> Ended:
    # A signal before the controller can be told would end the run without a word in its files.
    early: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _frame: early.append(received))
    run.logs.mkdir(parents=True, exist_ok=True)
    store, spawner = MemoryStore(), Spawner(run.preload)
    nodes = sorted({device.node for device in run.devices})
    agents = [Agent(node_spec(run, node, LOOPBACK), store, spawner) for node in nodes]
    driver = candidate(run, store, "launcher", listener)
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
