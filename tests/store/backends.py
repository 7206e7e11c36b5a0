"""The stores under test: one set of keys each, that any number of clients may reach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from elastic.etcd_access import EtcdAccess
from elastic.etcd_lease import EtcdLease
from elastic.etcd_store import EtcdStore
from elastic.memory_store import MemoryLease, MemoryStore
from elastic.store import Change, Lease, Store

PATIENCE_SECONDS = 30.0
"""Spent only by a test that fails."""


class Backend(Protocol):
    """A store as the conformance tests need it."""

    lease_seconds: float
    """A short lease."""

    def client(self) -> AbstractAsyncContextManager[Store]:
        """One more client of the same keys."""

    async def silence(self, lease: Lease) -> None:
        """Let the lease's holder fall silent, so that the lease will end."""


class MemoryBackend:
    """All clients share the one store of the process."""

    lease_seconds = 0.001

    def __init__(self) -> None:
        self._store = MemoryStore()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Store]:
        yield self._store

    async def silence(self, lease: Lease) -> None:
        assert isinstance(lease, MemoryLease)
        lease.expire()


class EtcdBackend:
    """Clients of an etcd, under a prefix that no other test uses."""

    lease_seconds = 2.0

    def __init__(self, access: EtcdAccess, prefix: str) -> None:
        self._access = access
        self._prefix = prefix

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Store]:
        store = await EtcdStore.connect(self._access, self._prefix)
        try:
            yield store
        finally:
            await store.close()

    async def silence(self, lease: Lease) -> None:
        assert isinstance(lease, EtcdLease)
        await lease.abandon()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, which fails when it takes too long."""
    asyncio.run(asyncio.wait_for(main, PATIENCE_SECONDS))


async def first(changes: AsyncIterator[Change], count: int) -> list[Change]:
    """The next `count` changes."""
    return [await anext(changes) for _ in range(count)]


async def until(changes: AsyncIterator[Change], key: str) -> list[Change]:
    """The changes before the one of `key`."""
    seen: list[Change] = []
    async for change in changes:
        if change.key == key:
            return seen
        seen.append(change)
    raise AssertionError(f"the watch ended before {key} came")
