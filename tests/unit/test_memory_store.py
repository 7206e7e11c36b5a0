"""What the embedded store has beyond the port: same-turn delivery, and leases that time cannot end.

The port's own promises are tested on every store in tests/store.
"""

from __future__ import annotations

import asyncio

import pytest

from elastic.memory_store import HISTORY_CHANGES, MemoryLease, MemoryStore


def test_a_change_is_told_before_its_write_returns() -> None:
    async def main() -> None:
        store = MemoryStore()
        changes = store.watch("/")
        told: list[str] = []

        async def listen() -> None:
            async for change in changes:
                told.append(change.key)

        listening = asyncio.create_task(listen())
        await store.put("/a", b"x")
        await store.put("/b", b"x")
        await asyncio.sleep(0)
        assert told == ["/a", "/b"]
        listening.cancel()

    asyncio.run(main())


def test_each_key_under_an_expired_lease_goes_in_order() -> None:
    async def main() -> None:
        store = MemoryStore()
        lease = await store.lease(5.0)
        assert isinstance(lease, MemoryLease)
        for key in ("/agents/1", "/agents/0"):
            await store.put(key, b"here", lease)
        changes = store.watch("/")
        assert not lease.ended
        lease.expire()
        assert lease.ended
        await lease.wait_lost()
        told = [await anext(changes) for _ in range(2)]
        assert [(change.key, change.value) for change in told] == [
            ("/agents/0", None),
            ("/agents/1", None),
        ]
        lease.expire()
        assert (await store.get_prefix("/")).revision == told[-1].revision

    asyncio.run(main())


def test_a_watch_reaches_back_as_far_as_history_does() -> None:
    async def main() -> None:
        store = MemoryStore()
        for number in range(HISTORY_CHANGES + 1):
            await store.put("/a", b"%d" % number)
        changes = store.watch("/", after=1)
        assert (await anext(changes)).value == b"1"
        with pytest.raises(AssertionError, match="revision 0"):
            store.watch("/", after=0)

    asyncio.run(main())
