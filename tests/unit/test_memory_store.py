"""The embedded store keeps the store's port: writes, compare-and-swap, leases, watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from elastic.memory_store import MemoryStore
from elastic.store import AlreadyExists, Change


class FakeClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time moves only when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def time(self) -> float:
        return self.seconds

    async def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        # One turn makes the timers that are due ready, the next runs them.
        for _ in range(3):
            ready: asyncio.Future[None] = self.create_future()
            self.call_soon(ready.set_result, None)
            await ready


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def run_with_clock(test: Any) -> None:
    with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, FakeClockLoop)
        runner.run(test(loop))


async def first(changes: AsyncIterator[Change], count: int) -> list[Change]:
    return [await anext(changes) for _ in range(count)]


def test_what_is_put_is_read_back_by_key_and_by_prefix() -> None:
    async def main() -> None:
        store = MemoryStore()
        await store.put("/a/2", b"two")
        await store.put("/a/1", b"one")
        await store.put("/b/1", b"other")
        assert await store.get("/a/1") == b"one"
        assert await store.get("/a/3") is None
        assert list((await store.get_prefix("/a/")).items()) == [("/a/1", b"one"), ("/a/2", b"two")]

    run(main())


def test_a_key_is_created_once() -> None:
    async def main() -> None:
        store = MemoryStore()
        await store.create("/plan/1", b"first")
        with pytest.raises(AlreadyExists, match="/plan/1"):
            await store.create("/plan/1", b"second")
        assert await store.get("/plan/1") == b"first"
        store.delete("/plan/1")
        await store.create("/plan/1", b"third")
        assert await store.get("/plan/1") == b"third"

    run(main())


def test_a_watch_sees_every_change_from_its_call_on_in_order() -> None:
    async def main() -> None:
        store = MemoryStore()
        await store.put("/a/0", b"before")
        watch = store.watch("/a/")
        await store.put("/a/1", b"x")
        await store.put("/b/1", b"not this")
        await store.put("/a/1", b"y")
        store.delete("/a/1")
        store.delete("/a/1")
        await store.put("/a/2", b"z")
        changes = await first(watch, 4)
        assert [(c.key, c.value) for c in changes] == [
            ("/a/1", b"x"),
            ("/a/1", b"y"),
            ("/a/1", None),
            ("/a/2", b"z"),
        ]
        revisions = [change.revision for change in changes]
        assert revisions == sorted(set(revisions))

    run(main())


def test_two_watches_do_not_take_from_each_other_and_one_may_end() -> None:
    async def main() -> None:
        store = MemoryStore()
        one, two = store.watch("/"), store.watch("/")
        await store.put("/a", b"x")
        assert await first(one, 1) == await first(two, 1)
        await one.aclose()  # type: ignore[attr-defined]
        await store.put("/a", b"y")
        assert [change.value for change in await first(two, 1)] == [b"y"]

    run(main())


def test_a_lease_that_is_not_kept_alive_takes_its_keys_along() -> None:
    async def main(loop: FakeClockLoop) -> None:
        store = MemoryStore()
        lease = await store.lease(5.0)
        await store.put("/agents/1", b"here", lease)
        await store.put("/agents/0", b"here", lease)
        await store.put("/other", b"stays")
        watch = store.watch("/")
        await loop.pass_time(4.9)
        assert await store.get("/agents/0") == b"here"
        await loop.pass_time(0.2)
        changes = await first(watch, 2)
        assert [(c.key, c.value) for c in changes] == [("/agents/0", None), ("/agents/1", None)]
        assert await store.get_prefix("/") == {"/other": b"stays"}

    run_with_clock(main)


def test_a_lease_that_is_kept_alive_goes_on() -> None:
    async def main(loop: FakeClockLoop) -> None:
        store = MemoryStore()
        lease = await store.lease(5.0)
        await store.put("/agents/0", b"here", lease)
        for _ in range(3):
            await loop.pass_time(4.0)
            await lease.keep_alive()
        assert await store.get("/agents/0") == b"here"
        await loop.pass_time(5.1)
        assert await store.get("/agents/0") is None

    run_with_clock(main)


def test_a_revoked_lease_ends_at_once_and_only_once() -> None:
    async def main(loop: FakeClockLoop) -> None:
        store = MemoryStore()
        lease = await store.lease(5.0)
        await store.put("/agents/0", b"here", lease)
        await lease.revoke()
        assert await store.get("/agents/0") is None
        await store.put("/agents/0", b"again")
        await loop.pass_time(6.0)
        assert await store.get("/agents/0") == b"again"

    run_with_clock(main)
