"""The store of a cluster: etcd, reached through `etcd3aio`.

Every write is a transaction that compares what the port promises (a key that is absent, a guard of
a given creation revision) in the same revision in which it writes. A configured prefix goes before
every key, so that several clusters, or users with different permissions, share one etcd.

What an outage does: calls wait (`etcd_calls`), watches go on where they were (`etcd_watch`), and
leases are renewed once etcd is back (`etcd_lease`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

from etcd3aio import prefix_range_end
from etcd3aio.kv import KVService

from elastic.etcd_access import EtcdAccess
from elastic.etcd_calls import EtcdCalls
from elastic.etcd_lease import EtcdLease, grant_lease
from elastic.etcd_watch import EtcdWatch
from elastic.store import (
    AlreadyExists,
    Change,
    Guard,
    GuardFailed,
    Lease,
    Snapshot,
    StoreUnavailable,
)

CONNECT_SECONDS = 10.0
"""How long a store may take to answer for the first time: at first, silence is a wrong address."""


class EtcdStore:
    """One client of an etcd. Made by `connect`."""

    def __init__(self, access: EtcdAccess, prefix: str) -> None:
        self._access = access
        self._prefix = prefix
        self._calls = EtcdCalls(access)
        self._leases: list[EtcdLease] = []

    @classmethod
    async def connect(
        cls, access: EtcdAccess, prefix: str = "", timeout_seconds: float = CONNECT_SECONDS
    ) -> Self:
        """A store whose keys are under `prefix` in etcd.

        Raises:
            StoreUnavailable: etcd did not answer within `timeout_seconds`.
            StoreRefused: etcd does not let this client read.
        """
        store = cls(access, prefix)
        try:
            async with asyncio.timeout(timeout_seconds):
                await store.get("/")
        except TimeoutError as error:
            reason = store._calls.outage.reason
            await store.close()
            raise StoreUnavailable(
                f"{access} did not answer within {timeout_seconds:g} s ({reason}); check "
                "store.endpoints, store.ca, and that etcd runs"
            ) from error
        except BaseException:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> bytes | None:
        """Value of `key`, or None."""
        answer, _ = await self._calls.ask(lambda: self._calls.kv.get(self._prefix + key))
        return answer.kvs[0].value if answer.kvs else None

    async def get_prefix(self, prefix: str) -> Snapshot:
        """All keys that begin with `prefix`."""
        start = self._prefix + prefix
        end = prefix_range_end(start)
        answer, _ = await self._calls.ask(lambda: self._calls.kv.get(start, end))
        values = {pair.key.decode().removeprefix(self._prefix): pair.value for pair in answer.kvs}
        return Snapshot(values, answer.header.revision)

    async def put(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key`. Raises GuardFailed, LeaseLost."""
        write = KVService.txn_op_put(self._prefix + key, value, lease=_lease_id(lease))
        answer, _ = await self._commit(self._holds(guard), write)
        if not answer.succeeded:
            raise _failed(guard)
        return int(answer.header.revision)

    async def create(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key` if it does not exist. Raises AlreadyExists, GuardFailed, LeaseLost."""
        name, lease_id = self._prefix + key, _lease_id(lease)
        absent = KVService.txn_compare_create_revision(name, 0)
        write = KVService.txn_op_put(name, value, lease=lease_id)
        names = [name] if guard is None else [name, self._prefix + guard.key]
        looks = [KVService.txn_op_get(each) for each in names]
        answer, repeated = await self._commit([absent, *self._holds(guard)], write, looks)
        if answer.succeeded:
            return int(answer.header.revision)
        there, *guards = (look.response_range.kvs for look in answer.responses)
        if repeated and there and (there[0].value, there[0].lease) == (value, lease_id):
            # An earlier attempt wrote it, and only its answer was lost.
            return int(there[0].create_revision)
        if guard is not None and [pair.create_revision for pair in guards[0]] != [guard.revision]:
            raise _failed(guard)
        raise AlreadyExists(f"{key} exists already")

    async def delete(self, key: str, guard: Guard | None = None) -> bool:
        """Remove `key`; whether it was there. Raises GuardFailed."""
        remove = KVService.txn_op_delete(self._prefix + key)
        answer, _ = await self._commit(self._holds(guard), remove)
        if not answer.succeeded:
            raise _failed(guard)
        return bool(answer.responses[0].response_delete_range.deleted)

    async def lease(self, time_to_live_seconds: float) -> Lease:
        """A new lease, in whole seconds, 2 at least. Raises ValueError unless positive."""
        lease = await grant_lease(self._calls, self._access, time_to_live_seconds)
        self._leases.append(lease)
        return lease

    def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Change]:
        """Every change under `prefix` after `after`, or from this call on, in order of revision."""
        start = self._calls.revision if after is None else after
        return EtcdWatch(self._calls, self._prefix, prefix, start).changes()

    async def close(self) -> None:
        """End the watches and the connection; leases end by themselves."""
        for lease in self._leases:
            await lease.abandon()
        await self._calls.close()

    async def _commit(
        self, compares: list[Any], write: Any, otherwise: Sequence[Any] = ()
    ) -> tuple[Any, bool]:
        return await self._calls.ask(lambda: self._calls.kv.txn(compares, [write], otherwise))

    def _holds(self, guard: Guard | None) -> list[Any]:
        if guard is None:
            return []
        return [KVService.txn_compare_create_revision(self._prefix + guard.key, guard.revision)]


def _lease_id(lease: Lease | None) -> int:
    if lease is None:
        return 0
    assert isinstance(lease, EtcdLease), lease
    return lease.id


def _failed(guard: Guard | None) -> GuardFailed:
    assert guard is not None, "a transaction without conditions succeeds"
    return GuardFailed(f"{guard.key} of revision {guard.revision} is gone or was replaced")
