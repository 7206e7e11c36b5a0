"""The store of a one-machine run: a dictionary in the launcher's process.

Watchers are queues, filled before `put` returns, so a change is seen in the same turn of the event
loop. Leases end by the event loop's clock unless they are kept alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from elastic.store import AlreadyExists, Change, Lease


class MemoryLease:
    """Lease on keys of a MemoryStore."""

    def __init__(self, store: MemoryStore, time_to_live_seconds: float) -> None:
        self._store = store
        self._time_to_live = time_to_live_seconds
        self.keys: set[str] = set()
        self._timer = asyncio.get_running_loop().call_later(time_to_live_seconds, self._end)

    async def keep_alive(self) -> None:
        """Prolong the lease by its time to live."""
        self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._time_to_live, self._end)

    async def revoke(self) -> None:
        """End it now, with the keys under it."""
        self._timer.cancel()
        self._end()

    def _end(self) -> None:
        for key in sorted(self.keys):
            self._store.delete(key)
        self.keys = set()


class MemoryStore:
    """In-process implementation of the store's port."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._revision = 0
        self._watchers: list[tuple[str, asyncio.Queue[Change]]] = []

    async def get(self, key: str) -> bytes | None:
        """Value of `key`, or None."""
        return self._values.get(key)

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """All keys that begin with `prefix`, sorted."""
        return {k: self._values[k] for k in sorted(self._values) if k.startswith(prefix)}

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        """Write `key`."""
        if lease is not None:
            assert isinstance(lease, MemoryLease), lease
            lease.keys.add(key)
        self._values[key] = value
        self._tell(key, value)

    async def create(self, key: str, value: bytes) -> None:
        """Write `key` if it does not exist. Raises AlreadyExists."""
        if key in self._values:
            raise AlreadyExists(f"{key} exists already")
        await self.put(key, value)

    async def lease(self, time_to_live_seconds: float) -> Lease:
        """A new lease."""
        return MemoryLease(self, time_to_live_seconds)

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Every change under `prefix` from this call on, in order of revision."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self._watchers.append((prefix, queue))
        return self._drain((prefix, queue))

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        if self._values.pop(key, None) is not None:
            self._tell(key, None)

    async def _drain(self, watcher: tuple[str, asyncio.Queue[Change]]) -> AsyncIterator[Change]:
        try:
            while True:
                yield await watcher[1].get()
        finally:
            self._watchers.remove(watcher)

    def _tell(self, key: str, value: bytes | None) -> None:
        self._revision += 1
        for prefix, queue in self._watchers:
            if key.startswith(prefix):
                queue.put_nowait(Change(key, value, self._revision))
