"""One controller or one agent as a process of its own, on any host that reaches the store.

A controller is a candidate for the lead: any number of them may run. One that is asked to end (by
SIGTERM or SIGINT) gives its lead up, and another takes over; the job goes on. An agent that is
asked to end hands its node's work over first; asked again, it ends at once. To end the job itself
is a wish of its own (`wish_to_stop`), which whoever leads grants.

All processes of a job must run the same job. What they were started with is compared through the
store: the first one says what it has, and one that has something else does not take part.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from elastic.agent import Agent, Departure
from elastic.effects import Finish
from elastic.journal import Listener
from elastic.keys import encode, job_prefix, key_of, settings_key
from elastic.messages import Stop, StopWish
from elastic.open_store import open_store
from elastic.run_spec import RunSpec, candidate, node_spec
from elastic.spawn import Spawner
from elastic.store import AlreadyExists, Store
from elastic.store_config import StoreConfig

Result = TypeVar("Result")

_CONNECTIONS = 1 << 17


class OtherJob(ValueError):
    """The store holds something else under this job's name; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The process was asked to end before its job did."""

    by: str


async def serve_controller(
    run: RunSpec, config: StoreConfig, name: str, listener: Listener
) -> Finish | Asked:
    """Stand by or lead until the job is over, or until a signal asks to end.

    Raises OtherJob, StoreUnavailable or StoreRefused if it cannot take part.
    """
    collect_rarely()
    run.logs.mkdir(parents=True, exist_ok=True)
    _allow_many_connections()
    async with open_store(config, run.logs / "etcd.log") as store:
        await _agree(store, run)
        return await _until_asked(candidate(run, store, name, listener).run())


def collect_rarely() -> None:
    """Look for cyclic garbage less often than usual: a controller makes hardly any, and of a large
    job it holds millions of objects, through which each search goes in the middle of a recovery."""
    gc.set_threshold(100_000, 50, 100)


async def serve_agent(run: RunSpec, config: StoreConfig, node: int, host: str) -> Departure | Asked:
    """Serve `node`, which others reach as `host`, until the job is over.

    A signal asks to hand its work over and to leave; another one, to end at once.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.logs.mkdir(parents=True, exist_ok=True)
    spawner = Spawner(run.preload)
    try:
        async with open_store(config, run.logs / "etcd.log") as store:
            await _agree(store, run)
            agent = Agent(node_spec(run, node, host), store, spawner)
            return await _until_asked(agent.run(), agent.drain)
    finally:
        await asyncio.get_running_loop().run_in_executor(None, spawner.close)


def _allow_many_connections() -> None:
    """A leader holds a connection to every agent (`elastic.lifeline`); 1024 is a common limit."""
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(usual, min(most, _CONNECTIONS)), most))


async def wish_to_stop(store: Store, job: str, reason: str, outcome: str = "interrupted") -> None:
    """Ask whoever leads `job` to end it."""
    wish = StopWish(reason, outcome)
    await store.put(key_of(job, wish), encode(wish))


async def clear_ended(store: Store, job: str) -> None:
    """Forget what an earlier run of `job` left. Raises OtherJob if that is not over."""
    found = await store.get_prefix(job_prefix(job))
    if found.values and key_of(job, Stop("", "")) not in found.values:
        raise OtherJob(
            f"job {job} is in the store and not over ({len(found.values)} keys); give this one "
            "another name (job: in the configuration), or end the other with: everstep stop"
        )
    # The word that it is over goes last: until then whoever comes may go on with this.
    over = key_of(job, Stop("", ""))
    for key in sorted(found.values, key=lambda key: key == over):
        await store.delete(key)


def address_towards(endpoint: str) -> str:
    """This host's address on the way to `endpoint` (host:port): others may reach it there."""
    host, _, port = endpoint.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_DGRAM
    )[0]
    # Connecting a datagram socket sends nothing; it only chooses the route.
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


async def _agree(store: Store, run: RunSpec) -> None:
    key = settings_key(run.job)
    try:
        await store.create(key, run.payload.encode())
    except AlreadyExists:
        theirs = await store.get(key)
        if theirs is not None and theirs.decode() != run.payload:
            raise OtherJob(
                f"job {run.job} runs with another configuration or other data than this process "
                "has; start all of them with the same file and the same data, or give this job "
                "another name"
            ) from None


async def _until_asked(
    work: Coroutine[Any, Any, Result], *requests: Callable[[], None]
) -> Result | Asked:
    """What `work` returns. Each signal makes the next of `requests`; behind them, one ends it."""
    left = list(requests)
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[str] = loop.create_future()

    def ask(name: str) -> None:
        if left:
            left.pop(0)()
        elif not asked.done():
            asked.set_result(name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, signal.Signals(number).name)
    working = asyncio.create_task(work)
    either: list[asyncio.Future[Any]] = [working, asked]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Asked(asked.result())
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
