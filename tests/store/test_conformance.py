"""What the port promises, held against every store: on memory and on a real etcd alike."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from backends import Backend, first, run, until

from elastic.store import AlreadyExists, Change, Guard, GuardFailed, LeaseLost, Store

CREATORS = 50
CLIENTS = 5
WRITERS = 4
WRITES = 40


async def clients(backend: Backend, stack: AsyncExitStack, count: int) -> list[Store]:
    return [await stack.enter_async_context(backend.client()) for _ in range(count)]


async def write_much(store: Store, writer: int, written: list[Change]) -> None:
    """Write keys of its own and one shared by all, with deletions in between; note each change."""
    for number in range(WRITES):
        for key in (f"/w/{writer}/{number % 3}", "/w/shared"):
            value = f"{writer}:{number}".encode()
            written.append(Change(key, value, await store.put(key, value)))
    await store.put(f"/w/{writer}/done", b"")


def test_what_is_put_is_read_back_by_key_and_by_prefix(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store:
            await store.put("/a/2", b"two")
            await store.put("/a/1", b"one")
            last = await store.put("/b/1", b"\x00\xff")
            assert await store.get("/a/1") == b"one"
            assert await store.get("/a/3") is None
            assert await store.get("/b/1") == b"\x00\xff"
            snapshot = await store.get_prefix("/a/")
            assert list(snapshot.values.items()) == [("/a/1", b"one"), ("/a/2", b"two")]
            assert snapshot.revision >= last
            assert await store.delete("/a/1") and not await store.delete("/a/1")
            assert (await store.get_prefix("/a/")).values == {"/a/2": b"two"}

    run(main())


def test_of_many_creators_exactly_one_wins(backend: Backend) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            stores = await clients(backend, stack, CLIENTS)

            async def create(number: int) -> tuple[int, int] | None:
                try:
                    created = await stores[number % CLIENTS].create("/leader", b"%d" % number)
                except AlreadyExists as error:
                    assert "/leader" in str(error)
                    return None
                return number, created

            outcomes = await asyncio.gather(*(create(number) for number in range(CREATORS)))
            winners = [outcome for outcome in outcomes if outcome is not None]
            assert len(winners) == 1
            number, revision = winners[0]
            assert await stores[0].get("/leader") == b"%d" % number
            await stores[1].put("/fenced", b"", guard=Guard("/leader", revision))

    run(main())


def test_who_was_replaced_writes_nothing(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as old, backend.client() as new:
            guard = Guard("/leader", await old.create("/leader", b"old"))
            await old.put("/leader", b"old, renewed", guard=guard)
            await old.create("/plan/1", b"by old", guard=guard)
            assert await old.delete("/plan/0", guard=guard) is False

            await new.delete("/leader")
            for replaced in (False, True):
                if replaced:
                    own = Guard("/leader", await new.create("/leader", b"new"))
                before = await new.get_prefix("/")
                with pytest.raises(GuardFailed, match="/leader"):
                    await old.put("/plan/1", b"late", guard=guard)
                with pytest.raises(GuardFailed, match="/leader"):
                    await old.create("/plan/2", b"late", guard=guard)
                with pytest.raises(GuardFailed, match="/leader"):
                    await old.create("/plan/1", b"late", guard=guard)
                with pytest.raises(GuardFailed, match="/leader"):
                    await old.delete("/plan/1", guard=guard)
                assert await new.get_prefix("/") == before

            await new.create("/plan/2", b"by new", guard=own)
            with pytest.raises(AlreadyExists, match="/plan/2"):
                await new.create("/plan/2", b"again", guard=own)
            assert await new.delete("/plan/1", guard=own) is True
            assert (await new.get_prefix("/plan/")).values == {"/plan/2": b"by new"}

    run(main())


def test_a_watch_tells_each_write_of_many_writers_once_and_in_order(backend: Backend) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            watcher, *stores = await clients(backend, stack, 1 + WRITERS)
            changes = watcher.watch("/w/")
            written: list[Change] = []
            await asyncio.gather(
                *(write_much(store, number, written) for number, store in enumerate(stores))
            )
            await watcher.put("/w/end", b"")
            told = [each for each in await until(changes, "/w/end") if "done" not in each.key]
            assert told == sorted(written, key=lambda change: change.revision)
            assert len({change.revision for change in told}) == len(written) > 0

    run(main())


def test_a_watch_after_a_snapshot_continues_it_without_a_gap(backend: Backend) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            reader, *stores = await clients(backend, stack, 1 + WRITERS)
            begun = reader.watch("/w/")
            written: list[Change] = []
            writing = [
                asyncio.create_task(write_much(store, number, written))
                for number, store in enumerate(stores)
            ]
            await first(begun, WRITES // 2)
            snapshot = await reader.get_prefix("/w/")
            changes = reader.watch("/w/", after=snapshot.revision)
            await asyncio.gather(*writing)
            await reader.put("/w/end", b"")
            told = await until(changes, "/w/end")
            late = [change for change in written if change.revision > snapshot.revision]
            assert [change for change in told if "done" not in change.key] == sorted(
                late, key=lambda change: change.revision
            )
            values = {**snapshot.values, "/w/end": b""}
            for change in told:
                assert change.value is not None
                values[change.key] = change.value
            assert values == (await reader.get_prefix("/w/")).values

    run(main())


def test_a_watch_begins_with_its_call_and_sees_deletions(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store:
            await store.put("/a/0", b"before")
            changes = store.watch("/a/")
            await store.put("/a/1", b"x")
            await store.put("/b/1", b"not this")
            await store.delete("/a/1")
            await store.delete("/a/1")
            await store.create("/a/1", b"y")
            told = await first(changes, 3)
            assert [(change.key, change.value) for change in told] == [
                ("/a/1", b"x"),
                ("/a/1", None),
                ("/a/1", b"y"),
            ]
            revisions = [change.revision for change in told]
            assert revisions == sorted(set(revisions))

    run(main())


def test_watches_are_independent_and_end_with_the_store(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store:
            one, two = store.watch("/"), store.watch("/")
            await store.put("/a", b"x")
            assert await first(one, 1) == await first(two, 1)
            await one.aclose()  # type: ignore[attr-defined]
            await store.put("/a", b"y")
            assert [change.value for change in await first(two, 1)] == [b"y"]
            waiting = asyncio.create_task(anext(two, None))
            never_awaited = store.watch("/")
            await store.close()
            assert await waiting is None
            assert [change async for change in never_awaited] == []

    run(main())


def test_a_revoked_lease_takes_its_keys_along(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store, backend.client() as other:
            lease = await store.lease(30.0)
            waiting = asyncio.create_task(lease.wait_lost())
            await store.create("/agents/0", b"here", lease)
            await store.put("/agents/1", b"here", lease)
            await store.put("/agents/2", b"here", lease)
            await other.put("/agents/2", b"released")
            await other.delete("/agents/1")
            await other.put("/agents/1", b"of another")
            changes = other.watch("/agents/", after=await other.put("/other", b""))
            assert not waiting.done()
            await lease.revoke()
            await waiting
            assert [(change.key, change.value) for change in await first(changes, 1)] == [
                ("/agents/0", None)
            ]
            assert (await other.get_prefix("/agents/")).values == {
                "/agents/1": b"of another",
                "/agents/2": b"released",
            }
            with pytest.raises(LeaseLost):
                await store.put("/agents/0", b"late", lease)
            with pytest.raises(LeaseLost):
                await store.create("/agents/0", b"late", lease)
            assert await store.get("/agents/0") is None
            await lease.revoke()

    run(main())


def test_the_lease_of_a_silent_holder_ends(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store, backend.client() as other:
            lease = await store.lease(backend.lease_seconds)
            revision = await store.create("/leader", b"me", lease)
            changes = other.watch("/leader", after=revision)
            await backend.silence(lease)
            assert [(change.key, change.value) for change in await first(changes, 1)] == [
                ("/leader", None)
            ]
            with pytest.raises(GuardFailed):
                await store.put("/plan/1", b"late", guard=Guard("/leader", revision))

    run(main())


def test_a_lease_is_kept_alive_while_the_event_loop_is_busy(backend: Backend) -> None:
    async def main() -> None:
        async with backend.client() as store:
            lease = await store.lease(backend.lease_seconds)
            revision = await store.create("/leader", b"me", lease)
            enough = time.monotonic() + 1.75 * backend.lease_seconds
            while time.monotonic() < enough:
                sum(range(1000))
            await store.put("/plan/1", b"mine", guard=Guard("/leader", revision))
            assert await store.get("/leader") == b"me"

    run(main())
