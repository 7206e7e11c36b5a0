"""The store of a one-machine run: a dictionary in the launcher's process.

Watchers are queues, filled before a write returns, so a change is seen in the same turn of the
event loop. A lease lives in the same process as its holder, so time does not end it: it is revoked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from elastic.store import AlreadyExists, Change, Guard, GuardFailed, Lease, LeaseLost, Snapshot

HISTORY_CHANGES = 10_000
"""Changes that are kept for watches that begin in the past."""


@dataclass(frozen=True, slots=True)
class _Record:
    """A key's value, the revision of its creation, and the lease that it is under."""

    value: bytes
    created: int
    lease: MemoryLease | None


@dataclass(frozen=True, slots=True, eq=False)
class _Watcher:
    """A watch's prefix and what it has yet to tell; None ends it."""

    prefix: str
    changes: asyncio.Queue[Change | None]


class MemoryLease:
    """Lease on keys of a MemoryStore."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the lease is over."""
        return self._ended.is_set()

    async def wait_lost(self) -> None:
        """Return once the lease has ended."""
        await self._ended.wait()

    async def revoke(self) -> None:
        """End it now, with the keys under it."""
        self.expire()

    def expire(self) -> None:
        """What revoke does; tests call it to play a holder that fell silent."""
        self._ended.set()
        self._store.drop(self)


class MemoryStore:
    """In-process implementation of the store's port."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._revision = 0
        self._history: deque[Change] = deque(maxlen=HISTORY_CHANGES)
        self._watchers: list[_Watcher] = []

    async def get(self, key: str) -> bytes | None:
        """Value of `key`, or None."""
        record = self._records.get(key)
        return record.value if record is not None else None

    async def get_prefix(self, prefix: str) -> Snapshot:
        """All keys that begin with `prefix`."""
        keys = sorted(key for key in self._records if key.startswith(prefix))
        return Snapshot({key: self._records[key].value for key in keys}, self._revision)

    async def put(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key`. Raises GuardFailed, LeaseLost."""
        self._check(guard)
        self._write(key, value, lease)
        return self._revision

    async def create(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key` if it does not exist. Raises AlreadyExists, GuardFailed, LeaseLost."""
        self._check(guard)
        if key in self._records:
            raise AlreadyExists(f"{key} exists already")
        self._write(key, value, lease)
        return self._revision

    async def delete(self, key: str, guard: Guard | None = None) -> bool:
        """Remove `key`; whether it was there. Raises GuardFailed."""
        self._check(guard)
        if self._records.pop(key, None) is None:
            return False
        self._tell(key, None)
        return True

    async def lease(self, time_to_live_seconds: float) -> Lease:
        """A new lease."""
        return MemoryLease(self)

    def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Change]:
        """Every change under `prefix` after `after`, or from this call on, in order of revision."""
        start = self._revision if after is None else after
        watcher = _Watcher(prefix, asyncio.Queue())
        for change in self._since(start):
            if change.key.startswith(prefix):
                watcher.changes.put_nowait(change)
        self._watchers.append(watcher)
        return self._drain(watcher)

    async def close(self) -> None:
        """End the watches."""
        for watcher in self._watchers:
            watcher.changes.put_nowait(None)

    def drop(self, lease: MemoryLease) -> None:
        """Remove the keys under an ended lease."""
        for key in sorted(key for key, record in self._records.items() if record.lease is lease):
            del self._records[key]
            self._tell(key, None)

    def _check(self, guard: Guard | None) -> None:
        if guard is None:
            return
        record = self._records.get(guard.key)
        if record is None or record.created != guard.revision:
            raise GuardFailed(
                f"{guard.key} of revision {guard.revision} "
                + ("is gone" if record is None else f"was replaced in revision {record.created}")
            )

    def _write(self, key: str, value: bytes, lease: Lease | None) -> None:
        assert lease is None or isinstance(lease, MemoryLease), lease
        if lease is not None and lease.ended:
            raise LeaseLost(f"{key} was not written: its lease has ended")
        before = self._records.get(key)
        created = before.created if before is not None else self._revision + 1
        self._records[key] = _Record(value, created, lease)
        self._tell(key, value)

    def _tell(self, key: str, value: bytes | None) -> None:
        self._revision += 1
        change = Change(key, value, self._revision)
        self._history.append(change)
        for watcher in self._watchers:
            if key.startswith(watcher.prefix):
                watcher.changes.put_nowait(change)

    def _since(self, revision: int) -> list[Change]:
        """The changes after `revision`. Each revision is one change, so they are counted."""
        count = self._revision - revision
        assert 0 <= count <= len(self._history), (
            f"revision {revision} is not among the last {len(self._history)} of {self._revision}"
        )
        return list(self._history)[len(self._history) - count :]

    async def _drain(self, watcher: _Watcher) -> AsyncIterator[Change]:
        try:
            while (change := await watcher.changes.get()) is not None:
                yield change
        finally:
            self._watchers.remove(watcher)
