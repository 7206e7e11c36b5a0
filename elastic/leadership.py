"""Who leads a job: one controller at a time, by a key under its lease.

Whoever creates the key leads; the others wait until it is gone. The lease ends when its holder
does, or when it is paused for long: a leader may learn late that it leads no more. So every write
of a leader carries a guard, the revision at which its key was created, and the store refuses it if
that key is gone or somebody else's. Nothing that an old leader does can reach the store again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from elastic.keys import leader_key
from elastic.store import AlreadyExists, Change, Guard, Lease, Store


@dataclass(frozen=True, slots=True)
class Leadership:
    """The right to lead, for as long as the lease lasts."""

    guard: Guard
    lease: Lease


@asynccontextmanager
async def elected(
    store: Store, job: str, name: str, lease_seconds: float
) -> AsyncIterator[Leadership]:
    """Wait until this candidate leads `job`; give the lead up at the end of the block.

    `name` is what the key says of its holder. `lease_seconds`: how long the key outlives it.
    """
    lease = await store.lease(lease_seconds)
    try:
        key = leader_key(job)
        yield Leadership(
            Guard(key, await create_when_free(store, key, name.encode(), lease)), lease
        )
    finally:
        await lease.revoke()


async def create_when_free(store: Store, key: str, value: bytes, lease: Lease) -> int:
    """Create `key` under `lease`, as soon as nobody else has it; returns its creation revision."""
    # Watched before it is tried, so that no end of it is missed.
    changes = store.watch(key)
    while True:
        try:
            return await store.create(key, value, lease)
        except AlreadyExists:
            await _until_gone(changes, key)


async def _until_gone(changes: AsyncIterator[Change], key: str) -> None:
    async for change in changes:
        if change.key == key and change.value is None:
            return
