"""A lease in etcd that is kept alive from a thread of its own.

Theory of operation. The thread has its own connection and no event loop, so neither a long
computation in the event loop nor what else that loop has to do delays a renewal.

A renewal is due every third of the time to live. Without an answer it is tried again at once, until
there is one: an etcd that restarts gives every lease its whole time to live again, so an outage of
etcd ends no lease. Only etcd's own word, a time to live of zero, does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress

import grpc

# The generated stubs are not public in etcd3aio, but its lease service works in an event loop only.
from etcd3aio._protobuf import LeaseKeepAliveRequest, LeaseStub

from elastic.etcd_access import EtcdAccess
from elastic.etcd_calls import EtcdCalls, Outage
from elastic.store import LeaseLost

SHORTEST_SECONDS = 2
"""etcd's own minimum with its default election timeout."""
RETRY_SECONDS = 0.2
"""Pause between two attempts to renew while etcd does not answer."""

logger = logging.getLogger(__name__)


class EtcdLease:
    """Lease number `id` for `seconds`, renewed from now on."""

    def __init__(self, calls: EtcdCalls, access: EtcdAccess, id: int, seconds: float) -> None:
        self.id = id
        self._calls = calls
        self._seconds = seconds
        self._ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._renewal = _Renewal(
            access, id, seconds, calls.outage, lambda: loop.call_soon_threadsafe(self._ended.set)
        )

    async def wait_lost(self) -> None:
        """Return once the lease is known to have ended."""
        await self._ended.wait()

    async def revoke(self) -> None:
        """End it now; if etcd does not answer, it ends by itself within its time to live."""
        await self.abandon()
        try:
            async with asyncio.timeout(self._seconds):
                await self._calls.ask(lambda: self._calls.leases.revoke(self.id))
        except LeaseLost:
            pass  # It had ended before.
        except TimeoutError:
            logger.warning("lease %x was not revoked in time, and ends by itself", self.id)
        self._ended.set()

    async def abandon(self) -> None:
        """Renew it no more. It ends when its time to live is over."""
        await asyncio.to_thread(self._renewal.stop)


async def grant_lease(
    calls: EtcdCalls, access: EtcdAccess, time_to_live_seconds: float
) -> EtcdLease:
    """A new lease; etcd counts in whole seconds, so the time to live is rounded up, to 2 at least.

    Raises ValueError for a time to live that is not positive.
    """
    if not time_to_live_seconds > 0:
        raise ValueError(f"a lease of {time_to_live_seconds} s: it must be above 0")
    seconds = max(math.ceil(time_to_live_seconds), SHORTEST_SECONDS)
    answer, _ = await calls.ask(lambda: calls.leases.grant(seconds))
    return EtcdLease(calls, access, answer.ID, answer.TTL)


class _Renewal:
    """The thread that renews a lease until it is stopped or etcd says that the lease is over."""

    def __init__(
        self,
        access: EtcdAccess,
        id: int,
        seconds: float,
        outage: Outage,
        on_lost: Callable[[], object],
    ) -> None:
        self._request = LeaseKeepAliveRequest(ID=id)
        self._every = seconds / 3
        self._outage = outage
        self._on_lost = on_lost
        self._channel = access.blocking_channel()
        self._stub = LeaseStub(self._channel)
        self._stopped = threading.Event()
        # A daemon: a lease that nobody revoked must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"lease-{id:x}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self._channel.close()  # ends a call that is under way
        self._thread.join()

    def _run(self) -> None:
        pause = self._every
        while not self._stopped.wait(pause):
            try:
                left = self._renew()
            except (grpc.RpcError, StopIteration) as error:
                if not self._stopped.is_set():
                    self._outage.failed(f"no renewal of a lease: {_reason(error)}")
                pause = RETRY_SECONDS
                continue
            except ValueError:
                return  # The channel was closed between the wait and the call.
            self._outage.answered()
            if left <= 0:
                # After the event loop's end there is nobody left to tell.
                with suppress(RuntimeError):
                    self._on_lost()
                return
            pause = self._every

    def _renew(self) -> int:
        """Seconds that the lease has from now; 0 when it is over."""
        # Each renewal is a stream of one request: an old stream would hide that etcd is another.
        stream = self._stub.LeaseKeepAlive(iter([self._request]), timeout=self._every)
        try:
            return int(next(stream).TTL)
        finally:
            stream.cancel()


def _reason(error: Exception) -> str:
    return str(error.code().name) if isinstance(error, grpc.Call) else type(error).__name__
