"""The store's port: the few operations that coordination needs, and nothing a backend adds.

Theory of operation. Keys are strings, values bytes. Every write gets a revision, a number that only
grows; changes are told in its order. Adapters: `memory_store`, in the launcher's process, and
`etcd_store`. One suite of tests holds both to what is said here.

- **Compare-and-swap.** `create` lets exactly one of any number of writers have a key.
- **Fencing.** The revision that `create` returned names that very record: who was deleted and
  created anew has another one. A write with a `Guard` happens only while the guard's record exists,
  so a leader that lost its lease without knowing can no longer write.
- **Snapshot and watch.** `get_prefix` says at which revision it was true; a watch `after` that
  revision continues it without a gap.
- **Leases** keep themselves alive from a thread of their own, however busy the event loop is, and
  end with their process.

A store that does not answer is waited for: an outage delays a job and does not end it. Therefore an
operation may be repeated without its caller knowing, and where the first attempt did reach the
store the answer is that of the repetition; each method says what that means for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


class AlreadyExists(ValueError):
    """`create` found the key taken; the message names it."""


class GuardFailed(RuntimeError):
    """The guard's key is gone or was created anew: nothing was written since."""


class LeaseLost(RuntimeError):
    """The lease ended: nothing was written under it, and its keys are gone."""


class StoreUnavailable(RuntimeError):
    """The store could not be opened in time. Once it is open, operations wait instead."""


class StoreRefused(RuntimeError):
    """The store answered, and to ask again would not help: credentials, permissions, limits."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write: the key, its new value (None: deleted or its lease ended), and the revision."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys under a prefix, sorted, with their values, as they were at `revision`."""

    values: dict[str, bytes]
    revision: int


@dataclass(frozen=True, slots=True)
class Guard:
    """Condition of a write: `key` exists, and is still the one that `create` gave `revision` to."""

    key: str
    revision: int


class Lease(Protocol):
    """Keys put under a lease disappear when it ends. Until `revoke` it keeps itself alive."""

    async def wait_lost(self) -> None:
        """Return once the lease is known to have ended, be it revoked or not renewed in time."""

    async def revoke(self) -> None:
        """End it now, with the keys under it; without an answer, at most its time to live later."""


class Store(Protocol):
    """What coordination asks of a store."""

    async def get(self, key: str) -> bytes | None:
        """Value of `key`, or None. Never older than a write that had returned before."""

    async def get_prefix(self, prefix: str) -> Snapshot:
        """All keys that begin with `prefix`."""

    async def put(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key`, under `lease` or under none, and return the revision of the write.

        Raises:
            GuardFailed: the guard does not hold.
            LeaseLost: the lease has ended.
        """

    async def create(
        self, key: str, value: bytes, lease: Lease | None = None, guard: Guard | None = None
    ) -> int:
        """Write `key` if it does not exist; returns its creation revision, for a `Guard`.

        A repeated attempt that meets its own value under its own lease takes it for its own work,
        so those who compete for a key write different values, or hold leases.

        Raises:
            AlreadyExists: the key is taken.
            GuardFailed: the guard does not hold.
            LeaseLost: the lease has ended.
        """

    async def delete(self, key: str, guard: Guard | None = None) -> bool:
        """Remove `key`; whether it was there (a repeated attempt says no though the first did it).

        Raises:
            GuardFailed: the guard does not hold.
        """

    async def lease(self, time_to_live_seconds: float) -> Lease:
        """A new lease that ends when it was not renewed for so long; a store may round it up."""

    def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Change]:
        """Every change under `prefix` after revision `after`, in order of revision, without end.

        None: from this call on. What happens after this call is never missed, however late the
        iterator is first awaited. Writes by others that this client has not heard of may be told
        too, though they came shortly before it.
        """

    async def close(self) -> None:
        """End the watches, and stop keeping leases alive without revoking them."""
