"""Worker processes of a benchmark: forked as everstep forks its own, with nothing of its runtime.

The processes come from the same kind of fork server with the same modules imported, lead their own
process groups, and die with it. A rendezvous store is served by one more process. Each rank sends
any number of progress texts and then one result over its line to the benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkError, log_tail, progress
from elastic.rendezvous import serve
from elastic.spawn import Child, Spawner

LOOPBACK = "127.0.0.1"
STORE_TIMEOUT_SECONDS = 60.0

RankMain = Callable[..., None]
"""Called as ``main(connection, rank, size, store_address, *arguments)`` in a process of its own."""


def run_ranks(main: RankMain, size: int, logs: Path, *arguments: Any) -> list[Any]:
    """Run `main` on ranks 0..size-1; returns their results by rank.

    Raises:
        BenchmarkError: a rank ended without a result.
    """
    # As in a run of everstep: more threads than cores would slow every rank.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logs.mkdir(parents=True, exist_ok=True)
    spawner = Spawner(("trainer.preload",))
    with _started(spawner, serve, logs / "store.log", LOOPBACK) as store:
        address = store.connection.recv_bytes().decode()
        files = [logs / f"rank{rank}.log" for rank in range(size)]
        children: list[Child] = []
        try:
            for rank, log in enumerate(files):
                children.append(spawner.start(main, log, rank, size, address, *arguments))
            return _results(children, files)
        finally:
            for child in children:
                _end(child)


def say(connection: Connection, text: str) -> None:
    """In a rank: have the benchmark print a progress line."""
    connection.send(("progress", text))


def give(connection: Connection, result: Any) -> None:
    """In a rank, at its end: hand the result over, and stay until the benchmark ends it.

    The others may still have to read what this rank sent them last.
    """
    connection.send(("result", result))
    with suppress(EOFError, OSError):
        connection.recv_bytes()


@contextmanager
def _started(spawner: Spawner, main: RankMain, log: Path, *arguments: Any) -> Iterator[Child]:
    child = spawner.start(main, log, *arguments)
    try:
        yield child
    finally:
        _end(child)


def _end(child: Child) -> None:
    child.kill()
    child.process.join()
    child.connection.close()


def _results(children: list[Child], logs: list[Path]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {child.connection: rank for rank, child in enumerate(children)}
    while waiting:
        for connection in wait(list(waiting)):
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                raise BenchmarkError(f"rank {rank} failed:\n{log_tail(logs[rank])}") from None
            if kind == "progress":
                progress(value)
            else:
                results[rank] = value
                del waiting[connection]
    return [results[rank] for rank in range(len(children))]
