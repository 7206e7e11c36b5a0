"""A run of many processes on one machine: etcd, controllers and agents, and who watches over them.

The launcher starts what would be started on many hosts elsewhere, the same commands with the same
arguments, and does what a cluster manager does there: a process that ends before the job does is
started again. It shows what the run's files say, and takes no part in anything else: a slow
launcher slows nothing. If it dies, everything ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.config import StoreConfig
from elastic.etcd_access import read_access
from elastic.etcd_store import EtcdStore
from elastic.journal import Listener
from elastic.keys import key_of
from elastic.local import STOP_SIGNALS, Ended
from elastic.messages import Stop
from elastic.private_etcd import PrivateEtcd
from elastic.run_spec import RunSpec
from elastic.serve import clear_ended, wish_to_stop
from elastic.store import Store
from elastic.tail import RunTail

PARENT = "EVERSTEP_PARENT"
"""Environment variable with the id of the process without which another one is not to live."""
REFUSED = 2
"""Exit code of a process that cannot take part; to start it again would not help."""
LOOK_SECONDS = 0.1
RESTART_SECONDS = 1.0
END_SECONDS = 20.0
"""How long processes may take to end once the job is over."""


@dataclass(frozen=True, slots=True)
class Part:
    """A process of the run. `name` is also that of its log."""

    name: str
    command: tuple[str, ...]


MakeParts = Callable[[tuple[str, ...]], list[Part]]
"""Given the endpoints of the store."""


class PartRefused(RuntimeError):
    """A process cannot take part; its log says why."""


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
    return asyncio.run(_run(run, config, make_parts, environment, listener))


async def _run(
    run: RunSpec,
    config: StoreConfig,
    make_parts: MakeParts,
    environment: Mapping[str, str],
    listener: Listener,
) -> Ended:
    run.logs.mkdir(parents=True, exist_ok=True)
    tail = RunTail(run.run_dir, listener)
    async with _store(config, run.logs / "etcd.log") as (store, endpoints):
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
        parts = [
            asyncio.create_task(_keep_up(part, run.logs, alone)) for part in make_parts(endpoints)
        ]
        showing = asyncio.create_task(_show(tail))
        try:
            await asyncio.wait([over, *parts], return_when=asyncio.FIRST_COMPLETED)
            for part in parts:
                if part.done() and (error := part.exception()) is not None:
                    traceback.print_exception(error)
                    wish(f"{type(error).__name__}: {error}", "failed")
            await asyncio.wait([over], timeout=END_SECONDS)
            await asyncio.wait(parts, timeout=END_SECONDS)
        finally:
            everything: list[asyncio.Task[Any]] = [over, showing, *parts, *wishes]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
    tail.tell()
    return _read_end(run.run_dir)


@contextlib.asynccontextmanager
async def _store(config: StoreConfig, log: Path) -> AsyncIterator[tuple[Store, tuple[str, ...]]]:
    """A client of the store, and its endpoints: the configured ones, or those of a private etcd."""
    private = None if config.endpoints else PrivateEtcd(log)
    try:
        if private is not None:
            await private.start()
            config = config.model_copy(update={"endpoints": (private.endpoint,)})
        store = await EtcdStore.connect(read_access(config), config.prefix)
        try:
            yield store, config.endpoints
        finally:
            await store.close()
    finally:
        if private is not None:
            await private.stop()


async def _until_over(store: Store, job: str) -> None:
    async for change in store.watch(key_of(job, Stop("", ""))):
        if change.value is not None:
            return


async def _keep_up(part: Part, logs: Path, environment: Mapping[str, str]) -> None:
    """Start `part`, and again whenever it fails; returns once it ended well.

    Raises PartRefused if starting it again would not help.
    """
    log = logs / f"{part.name}.log"
    while True:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *part.command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status == REFUSED:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise PartRefused(f"{part.name}: {lines[-1] if lines else 'no reason was given'}")
        if status >= 0:
            # Whatever it met, it has said and dealt with; only a killed process starts anew.
            return
        stamp = time.strftime("%H:%M:%S")
        with log.open("a") as output_text:
            output_text.write(f"{stamp} {part.name} was killed (status {status}); it starts anew\n")
        await asyncio.sleep(RESTART_SECONDS)


async def _show(tail: RunTail) -> None:
    while True:
        tail.tell()
        await asyncio.sleep(LOOK_SECONDS)


def _read_end(run_dir: Path) -> Ended:
    path = run_dir / "summary.json"
    if not path.exists():
        return Ended("failed", f"no controller finished the run; see {run_dir / 'logs'}", {})
    summary = json.loads(path.read_bytes())
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").open()]
    reason = next(e["reason"] for e in reversed(entries) if e["event"] == "finish")
    return Ended(summary["outcome"], reason, summary)
