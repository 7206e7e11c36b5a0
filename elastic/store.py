"""The store's port: the few operations that coordination needs, and nothing a backend adds.

Keys are strings under one job, values bytes. Adapters: `memory_store` in the launcher's process;
an etcd adapter belongs here too. All methods are coroutines, since a real store answers later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


class AlreadyExists(ValueError):
    """`create` found the key taken; the message names it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write: the key, its new value (None: deleted or its lease ended), and the revision."""

    key: str
    value: bytes | None
    revision: int


class Lease(Protocol):
    """Keys put under a lease disappear when it ends."""

    async def keep_alive(self) -> None:
        """Prolong the lease by its time to live."""

    async def revoke(self) -> None:
        """End it now, with the keys under it."""


class Store(Protocol):
    """What coordination asks of a store."""

    async def get(self, key: str) -> bytes | None:
        """Value of `key`, or None."""

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """All keys that begin with `prefix`, sorted."""

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        """Write `key`."""

    async def create(self, key: str, value: bytes) -> None:
        """Write `key` if it does not exist (compare-and-swap). Raises AlreadyExists."""

    async def lease(self, time_to_live_seconds: float) -> Lease:
        """A new lease."""

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Every change under `prefix` from now on, in order of revision."""
