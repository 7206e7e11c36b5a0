"""etcd dies, stops, forgets or is out of reach: calls wait, watches go on, leases are honest."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc.aio
import pytest
from backends import EtcdBackend, first, run, until
from etcd3aio.kv import KVService
from proxy import Proxy

from elastic import etcd_calls
from elastic.etcd_access import EtcdAccess
from elastic.etcd_store import EtcdStore
from elastic.private_etcd import PrivateEtcd
from elastic.store import AlreadyExists, Guard, GuardFailed, StoreUnavailable

LEASE_SECONDS = 2.0


class LogLines(logging.Handler):
    """The lines of the store's log, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._loop.call_soon_threadsafe(self.lines.put_nowait, record.getMessage())


@contextmanager
def log_lines() -> Iterator[asyncio.Queue[str]]:
    handler = LogLines()
    etcd_calls.logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        etcd_calls.logger.removeHandler(handler)


@asynccontextmanager
async def connect(endpoint: str, prefix: str) -> AsyncIterator[EtcdStore]:
    store = await EtcdStore.connect(EtcdAccess((endpoint,)), prefix)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def behind_a_line(
    etcd: PrivateEtcd, prefix: str
) -> AsyncIterator[tuple[Proxy, EtcdStore, EtcdStore]]:
    """A line, a client at its end, and another that reaches etcd without it."""
    async with (
        Proxy(etcd.endpoint) as line,
        connect(line.endpoint, prefix) as store,
        connect(etcd.endpoint, prefix) as other,
    ):
        yield line, store, other


async def compact(etcd: PrivateEtcd, revision: int) -> None:
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        await KVService(channel).compact(revision, physical=True)


def test_a_killed_etcd_is_waited_for(etcd: PrivateEtcd, etcd_backend: EtcdBackend) -> None:
    async def main() -> None:
        async with etcd_backend.client() as store, etcd_backend.client() as other:
            lease = await store.lease(LEASE_SECONDS)
            revision = await store.create("/leader", b"me", lease)
            changes = other.watch("/w/", after=revision)
            for number in range(3):
                await store.put("/w/a", b"%d" % number)
            await first(changes, 1)
            with log_lines() as lines:
                etcd.kill()
                putting = asyncio.create_task(store.put("/w/a", b"during"))
                reading = asyncio.create_task(other.get("/w/a"))
                assert "does not answer" in await lines.get()
                assert not putting.done() and not reading.done()
                # The outage is longer than the lease.
                await asyncio.sleep(1.5 * LEASE_SECONDS)
                await etcd.start()
                await putting
                assert await reading in (b"2", b"during")
            await store.put("/w/end", b"")
            values = [change.value for change in await until(changes, "/w/end")]
            assert values[:2] == [b"1", b"2"] and set(values[2:]) == {b"during"}
            await store.put("/plan/1", b"still leader", guard=Guard("/leader", revision))

    run(main())


def test_an_outage_is_logged_once_each_way(etcd: PrivateEtcd, etcd_backend: EtcdBackend) -> None:
    async def main() -> None:
        async with etcd_backend.client() as store:
            with log_lines() as lines:
                etcd.kill()
                putting = [asyncio.create_task(store.put("/a", b"x")) for _ in range(5)]
                away = await lines.get()
                await etcd.start()
                await asyncio.gather(*putting)
                back = await lines.get()
                assert etcd.endpoint in away and "waiting" in away
                assert etcd.endpoint in back and "answers again, after" in back
                assert lines.empty()

    run(main())


def test_a_stopped_etcd_is_waited_for(
    etcd: PrivateEtcd, etcd_backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_calls, "ATTEMPT_SECONDS", 0.2)

    async def main() -> None:
        async with etcd_backend.client() as store, etcd_backend.client() as other:
            changes = other.watch("/w/")
            await store.put("/w/a", b"before")
            with log_lines() as lines:
                os.kill(etcd.pid, signal.SIGSTOP)
                try:
                    # Its threads run on until the kernel has stopped each of them.
                    os.waitid(os.P_PID, etcd.pid, os.WSTOPPED | os.WNOWAIT)
                    putting = asyncio.create_task(store.put("/w/a", b"during"))
                    assert "does not answer" in await lines.get()
                finally:
                    os.kill(etcd.pid, signal.SIGCONT)
                await putting
            await store.put("/w/end", b"")
            values = [change.value for change in await until(changes, "/w/end")]
            # An attempt that was given up may have been carried out nevertheless.
            assert values[0] == b"before" and set(values[1:]) == {b"during"}

    run(main())


def test_a_watch_that_was_cut_off_tells_all_that_it_missed(etcd: PrivateEtcd, prefix: str) -> None:
    async def main() -> None:
        async with behind_a_line(etcd, prefix) as (line, store, writer):
            changes = store.watch("/w/")
            revisions = [await writer.put("/w/a", b"0")]
            await first(changes, 1)
            waiting = asyncio.create_task(until(changes, "/w/end"))
            for number in range(1, 4):
                await line.cut()
                revisions.append(await writer.put("/w/a", b"%d" % number))
                line.heal()
                revisions.append(await writer.put("/w/b", b"%d" % number))
            await writer.put("/w/end", b"")
            told = await waiting
            assert [change.revision for change in told] == revisions[1:]

    run(main())


def test_what_was_compacted_away_is_told_as_a_difference(etcd: PrivateEtcd, prefix: str) -> None:
    async def main() -> None:
        async with behind_a_line(etcd, prefix) as (line, store, writer):
            for key in ("kept", "old", "short-lived"):
                revision = await writer.put(f"/w/{key}", b"before")
            changes = store.watch("/w/", after=revision)
            await writer.put("/w/seen", b"1")
            await first(changes, 1)
            await line.cut()
            await writer.put("/w/old", b"intermediate")
            await writer.put("/w/new", b"2")
            await writer.delete("/w/short-lived")
            await writer.delete("/w/seen")
            last = await writer.put("/w/old", b"3")
            await compact(etcd, last)
            line.heal()
            told = await first(changes, 4)
            assert [(change.key, change.value) for change in told] == [
                ("/w/new", b"2"),
                ("/w/old", b"3"),
                ("/w/seen", None),
                ("/w/short-lived", None),
            ]
            assert all(change.revision > revision for change in told)
            await writer.put("/w/kept", b"after")
            assert [change.value for change in await first(changes, 1)] == [b"after"]

    run(main())


def test_a_watch_may_begin_before_what_is_left_of_history(
    etcd: PrivateEtcd, etcd_backend: EtcdBackend
) -> None:
    async def main() -> None:
        async with etcd_backend.client() as store:
            early = await store.put("/w/a", b"1")
            await store.put("/w/b", b"1")
            await compact(etcd, await store.put("/w/a", b"2"))
            changes = store.watch("/w/", after=early)
            assert [(each.key, each.value) for each in await first(changes, 2)] == [
                ("/w/b", b"1"),
                ("/w/a", b"2"),
            ]

    run(main())


def test_a_holder_that_was_cut_off_too_long_has_lost_its_lease_and_learns_it(
    etcd: PrivateEtcd, prefix: str
) -> None:
    async def main() -> None:
        async with behind_a_line(etcd, prefix) as (line, store, other):
            lease = await store.lease(LEASE_SECONDS)
            revision = await store.create("/leader", b"me", lease)
            changes = other.watch("/leader", after=revision)
            waiting = asyncio.create_task(lease.wait_lost())
            await line.cut()
            assert (await first(changes, 1))[0].value is None
            await other.create("/leader", b"other")
            assert not waiting.done()
            line.heal()
            await waiting
            with pytest.raises(GuardFailed):
                await store.put("/plan/1", b"late", guard=Guard("/leader", revision))
            assert await other.get("/plan/1") is None

    run(main())


def test_a_creation_whose_answer_was_lost_has_succeeded(etcd: PrivateEtcd, prefix: str) -> None:
    async def main() -> None:
        async with behind_a_line(etcd, prefix) as (line, store, other):
            changes = other.watch("/")
            for key, value in (("/mine", b"me"), ("/theirs", b"them")):
                line.hold_answers()
                creating = asyncio.create_task(store.create(key, b"me"))
                (written,) = await first(changes, 1)
                if value == b"them":
                    await other.delete(key)
                    await other.create(key, value)
                    await first(changes, 2)
                await line.cut()
                line.heal()
                if value == b"me":
                    assert await creating == written.revision
                else:
                    with pytest.raises(AlreadyExists):
                        await creating

    run(main())


def test_a_dead_member_among_several_does_not_matter(etcd: PrivateEtcd, prefix: str) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            dead = f"127.0.0.1:{unused.getsockname()[1]}"
        access = EtcdAccess((dead, etcd.endpoint))
        store = await EtcdStore.connect(access, prefix)
        try:
            changes = store.watch("/")
            for number in range(10):
                await store.put("/a", b"%d" % number)
            assert [change.value for change in await first(changes, 10)][-1] == b"9"
        finally:
            await store.close()

    run(main())


def test_silence_at_the_first_contact_is_an_error() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            endpoint = f"127.0.0.1:{deaf.getsockname()[1]}"
            with pytest.raises(StoreUnavailable, match=rf"{endpoint}.*0\.2 s.*store\.endpoints"):
                await EtcdStore.connect(EtcdAccess((endpoint,)), timeout_seconds=0.2)

    run(main())
