"""A run of many processes on one machine: etcd, controllers and agents, and who watches over them.

The launcher starts what would be started on many hosts elsewhere, the same commands with the same
arguments, and does what a cluster manager does there: a process that is killed before the job is
over is started again. An agent that somebody asked to leave is not, and the job goes on without it;
the launcher itself asks none. It shows what the run's files say, and takes no part in anything
else: a slow launcher slows nothing. If it dies, everything ends with it.

All processes reach each other over the loopback interface, unless a fault is to cut nodes off from
each other: then the run has a network of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from elastic.component_strikes import ComponentStrikes
from elastic.etcd_access import read_access
from elastic.etcd_store import EtcdStore
from elastic.faults import FaultInjection
from elastic.journal import Listener
from elastic.keeper import Keeper, Part
from elastic.keys import key_of
from elastic.local import STOP_SIGNALS, Ended
from elastic.messages import Stop
from elastic.network import Loopback, Network, PrivateNetwork
from elastic.private_etcd import PrivateEtcd
from elastic.run_spec import RunSpec
from elastic.serve import clear_ended, wish_to_stop
from elastic.store import Store
from elastic.store_config import StoreConfig
from elastic.tail import RunTail

PARENT = "EVERSTEP_PARENT"
"""Environment variable with the id of the process without which another one is not to live."""
LOOK_SECONDS = 0.1
END_SECONDS = 20.0
"""How long processes may take to end once the job is over."""

MakeParts = Callable[[tuple[str, ...], Network], list[Part]]
"""Given the endpoints of the store, and where the nodes are."""


def run_parts(
    run: RunSpec,
    config: StoreConfig,
    make_parts: MakeParts,
    environment: Mapping[str, str],
    listener: Listener,
) -> Ended:
    """Run to the end; SIGINT, SIGTERM and SIGHUP end the job as interrupted.

    `environment` is what the processes find in theirs. Raises OtherJob if the store holds another
    run of this job, and what opening the store raises.
    """
    with contextlib.closing(_network(run)) as network:
        return asyncio.run(_run(network, run, config, make_parts, environment, listener))


def _network(run: RunSpec) -> Network:
    cuts = any(fault.kind is FaultInjection.PARTITION for fault in run.faults)
    return PrivateNetwork({device.node for device in run.devices}) if cuts else Loopback()


async def _run(
    network: Network,
    run: RunSpec,
    config: StoreConfig,
    make_parts: MakeParts,
    environment: Mapping[str, str],
    listener: Listener,
) -> Ended:
    run.logs.mkdir(parents=True, exist_ok=True)
    tail = RunTail(run.run_dir, listener)
    async with _opened(config, run.logs / "etcd.log", network.host) as (store, endpoints, etcd):
        await clear_ended(store, run.job)
        over = asyncio.create_task(_until_over(store, run.job))
        wishes: set[asyncio.Task[None]] = set()

        def wish(reason: str, outcome: str = "interrupted") -> None:
            wishes.add(asyncio.create_task(wish_to_stop(store, run.job, reason, outcome)))

        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            name = signal.Signals(number).name
            loop.add_signal_handler(number, wish, f"the launcher received {name}")
        alone = {**os.environ, **environment, PARENT: str(os.getpid())}
        keepers = [Keeper(part, run.logs, alone) for part in make_parts(endpoints, network)]
        by_name = {keeper.part.name: keeper for keeper in keepers}
        strikes = ComponentStrikes(run.faults, run.job, store, by_name, etcd, network)
        parts = [asyncio.create_task(keeper.run()) for keeper in keepers]
        showing = asyncio.create_task(_look(tail, strikes))
        try:
            await _until_ended(over, showing, dict(zip(parts, keepers, strict=True)))
            for task in (showing, *parts):
                if task.done() and (error := task.exception()) is not None:
                    traceback.print_exception(error)
                    wish(f"{type(error).__name__}: {error}", "failed")
            await asyncio.wait([over], timeout=END_SECONDS)
            for keeper in keepers:
                keeper.retire()
            strikes.release()
            await asyncio.wait(parts, timeout=END_SECONDS)
        finally:
            everything: list[asyncio.Task[Any]] = [over, showing, *parts, *wishes]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
    tail.tell()
    return _read_end(run.run_dir)


@contextlib.asynccontextmanager
async def _opened(
    config: StoreConfig, log: Path, host: str
) -> AsyncIterator[tuple[Store, tuple[str, ...], PrivateEtcd | None]]:
    """A client of the store, its endpoints, and the etcd behind them if it is private.

    `host` is where a private one listens.
    """
    private = None if config.endpoints else PrivateEtcd(log, host=host)
    try:
        if private is not None:
            await private.start()
            config = config.model_copy(update={"endpoints": (private.endpoint,)})
        store = await EtcdStore.connect(read_access(config), config.prefix)
        try:
            yield store, config.endpoints, private
        finally:
            await store.close()
    finally:
        if private is not None:
            await private.stop()


async def _until_over(store: Store, job: str) -> None:
    async for change in store.watch(key_of(job, Stop("", ""))):
        if change.value is not None:
            return


async def _until_ended(
    over: asyncio.Task[None],
    showing: asyncio.Task[None],
    parts: Mapping[asyncio.Task[None], Keeper],
) -> None:
    """Return when the job is over, or cannot go on."""
    waiting = {over, showing, *parts}
    while True:
        ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            left = task in parts and parts[task].left and task.exception() is None
            if not left:
                return


async def _look(tail: RunTail, strikes: ComponentStrikes) -> None:
    while True:
        tail.tell()
        await strikes.look(tail.committed)
        await asyncio.sleep(LOOK_SECONDS)


def _read_end(run_dir: Path) -> Ended:
    path = run_dir / "summary.json"
    if not path.exists():
        return Ended("failed", f"no controller finished the run; see {run_dir / 'logs'}", {})
    summary = json.loads(path.read_bytes())
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").open()]
    reason = next(e["reason"] for e in reversed(entries) if e["event"] == "finish")
    return Ended(summary["outcome"], reason, summary)
