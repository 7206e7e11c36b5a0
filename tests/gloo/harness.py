"""Runs a top-level function on n real processes that talk over gloo.

One fork server per test session imports torch and megatron-core once; every rank of every test is
forked from it, in a process group of its own, and killed when its test ends. A test hands
`Cluster.run` a function that can be pickled by name; the function gets a `Rank`, and what it
returns comes back.

Ranks meet in a file of their own. Product code that wants a rendezvous store finds one at
`Rank.address`, in a process that no rank's death takes along.

`Mismatch` is the failure of a check, as opposed to a crash: the tests of planted bugs must tell the
two apart.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from elastic.rendezvous import serve
from elastic.spawn import Child, Spawner
from ntp.geometry import ParallelLayout, SlotRef
from ntp.groups import Coordinate, groups_of, places
from ntp.process_groups import Link, ProcessGroups
from ntp.stable_group import Waits
from ntp.sync_plan import plan_sync

HOST = "127.0.0.1"
TIMEOUT_SECONDS = 20.0
LINK = Link("gloo", HOST, TIMEOUT_SECONDS, TIMEOUT_SECONDS)
_owners: list[ProcessGroups] = []


class Mismatch(AssertionError):
    """A result is not what the reference says."""


class RankFailed(RuntimeError):
    """A rank raised or died; the message has its traceback."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank knows of its run. `generation` is larger than any that an earlier run used."""

    rank: int
    size: int
    address: str
    generation: int
    meeting: Path

    def groups(self, link: Link = LINK, waits: Waits | None = None) -> ProcessGroups:
        """An owner of communicators that lives until all ranks have reported.

        If it went when its rank returns, its sockets would close while peers still connect or read.
        """
        _owners.append(ProcessGroups(link, waits))
        return _owners[-1]

    def store(self) -> dist.Store:
        """A new connection to the run's store."""
        store = dist.FileStore(str(self.meeting), -1)
        store.set_timeout(timedelta(seconds=TIMEOUT_SECONDS))
        return store

    def adopt(
        self,
        groups: ProcessGroups,
        layout: ParallelLayout,
        slot: SlotRef,
        generation: int = 1,
        store: dist.Store | None = None,
        stage: int = 0,
        stages: int = 1,
    ) -> dict[SlotRef, int]:
        """Build all groups of `layout` anew; returns the ranks of its slots within their stage.

        Returns when everybody has built them, as the worker does by comparing digests: a rank that
        let go of its groups sooner would break those that a peer still connects.
        """
        grid = places(layout, stages)
        names = [f"{place}@{generation}" for place in grid]
        rank = grid.index(Coordinate(slot.replica, stage, slot.slot))
        groups.adopt(
            groups_of(rank, layout, plan_sync(layout), stages),
            names,
            rank,
            generation,
            store if store is not None else self.store(),
            frozenset(),
        )
        dist.all_reduce(torch.zeros(1), group=groups.world)
        return {ref: rank for rank, ref in enumerate(layout.slots())}


class Cluster:
    """The fork server, the store, and the ranks of the run at hand."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._spawner = Spawner(("tests.gloo.preload",))
        self._store = self._spawner.start(serve, logs / "store.log", HOST)
        self._runs = 0
        self._address = ""

    def __enter__(self) -> Self:
        self._address = self._store.connection.recv_bytes().decode()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _end([self._store])

    def run(
        self,
        function: Callable[..., Any],
        size: int,
        *arguments: Any,
        dies: Collection[int] = (),
    ) -> list[Any]:
        """Results of ``function(Rank, *arguments)`` by rank; None for the ranks in `dies`.

        Raises RankFailed as soon as a rank raises, and when a rank dies that should not, or lives
        that should die.
        """
        self._runs += 1
        log = self._logs / f"run-{self._runs}.log"
        meeting = self._logs / f"run-{self._runs}.store"
        ranks = [
            Rank(rank, size, self._address, self._runs * 1000, meeting) for rank in range(size)
        ]
        children: list[Child] = []
        try:
            for rank in ranks:
                children.append(self._spawner.start(_enter, log, rank, function, arguments))
            return _collect(children, log, dies)
        finally:
            _end(children)


def _enter(
    connection: Connection, rank: Rank, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        outcome: tuple[bool, Any] = (True, function(rank, *arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(outcome))
    # Stay until all have reported: an exit would close the sockets as well.
    connection.poll(None)


def _collect(children: list[Child], log: Path, dies: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(children)
    waiting = {child.connection: rank for rank, child in enumerate(children)}
    deadline = time.monotonic() + 2 * TIMEOUT_SECONDS
    while waiting:
        ready = wait(list(waiting), deadline - time.monotonic())
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} did not finish")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, result = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                if rank not in dies:
                    text = log.read_text(errors="replace")[-4000:]
                    raise RankFailed(f"rank {rank} died; its log ends:\n{text}") from None
                continue
            if not succeeded:
                raise RankFailed(f"rank {rank}:\n{result}")
            if rank in dies:
                raise RankFailed(f"rank {rank} returned {result!r} instead of dying")
            results[rank] = result
    return results


def _end(children: list[Child]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.process.join()
        child.connection.close()
