"""Calls to etcd that are repeated until it answers.

Theory of operation. An outage of etcd must not end a job, so a call that got no answer is made
again, with a pause that doubles up to a second, for as long as it takes. No answer means that the
call's effect is unknown, and callers are told that there was a repetition. One case is left open:
an attempt that was given up may still be on its way, and would then be applied after its
repetition.

A token is asked for when there is none, and again when etcd does not know it any more: tokens end
with time and with etcd's process. What etcd refuses is raised as the port's errors.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from enum import Enum, auto
from typing import Any

import grpc
import grpc.aio
from etcd3aio import EtcdConnectionError, EtcdError, EtcdTransientError, EtcdUnauthenticatedError
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest, WatchStub
from etcd3aio.auth import AuthService
from etcd3aio.kv import KVService
from etcd3aio.lease import LeaseService

from elastic.etcd_access import EtcdAccess
from elastic.store import LeaseLost, StoreRefused

ATTEMPT_SECONDS = 5.0
"""How long one attempt may take; the next one may reach another member of the cluster."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0

WAIT_CODES = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # overloaded, or out of the space that it may use
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)

logger = logging.getLogger(__name__)


class HistoryCompacted(StoreRefused):
    """The revision asked for was compacted away."""


class Outage:
    """Logs once when etcd stops answering, and once when it is back. Any thread may report."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._since: float | None = None
        self.reason = "no attempt has ended yet"

    def failed(self, reason: str) -> None:
        """An attempt got no answer."""
        with self._lock:
            self.reason = reason
            if self._since is not None:
                return
            self._since = time.monotonic()
        logger.warning("%s does not answer (%s); waiting for it", self._name, reason)

    def answered(self) -> None:
        """An attempt got an answer."""
        with self._lock:
            if self._since is None:
                return
            seconds = time.monotonic() - self._since
            self._since = None
        logger.warning("%s answers again, after %.1f s", self._name, seconds)


class EtcdCalls:
    """One client's connection to etcd. `revision` is the newest that an answer has named."""

    def __init__(self, access: EtcdAccess) -> None:
        self._access = access
        self._channel = access.channel()
        self._auth = AuthService(self._channel, max_attempts=1)
        self._token: str | None = None
        self.kv = KVService(self._channel, max_attempts=1)
        self.leases = LeaseService(self._channel, max_attempts=1)
        self._watches = WatchStub(self._channel)
        self.outage = Outage(str(access))
        self.revision = 0
        self.closed = False

    async def close(self) -> None:
        """Close the connection; streams that are open end."""
        self.closed = True
        await self._channel.close()

    async def ask(self, call: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """The answer to `call`, and whether an earlier attempt may have had its effect already.

        Answers are protobuf messages, which have no static types.

        Raises:
            LeaseLost: the call names a lease that has ended.
            StoreRefused: etcd refuses the call, or this client.
        """
        pause, repeated, renewed = FIRST_PAUSE_SECONDS, False, False
        while True:
            token = self._token
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    token = await self._valid_token()
                    answer = await call()
            except (EtcdError, grpc.aio.AioRpcError, TimeoutError) as error:
                match _verdict(error):
                    case _Verdict.AUTHENTICATE if token is not None and not renewed:
                        renewed = True
                        if self._token == token:
                            self._token = None
                    case _Verdict.WAIT:
                        self.outage.failed(str(error) or "no answer in time")
                        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                        pause, repeated = min(2 * pause, LONGEST_PAUSE_SECONDS), True
                        renewed = False  # etcd may have restarted, and forgotten the new token too
                    case _:
                        self.outage.answered()
                        raise _refusal(error, self._access) from error
            else:
                self.outage.answered()
                self.revision = max(self.revision, answer.header.revision)
                return answer, repeated

    async def stream(
        self, start: bytes, end: bytes, start_revision: int
    ) -> AsyncGenerator[Any, None]:
        """What etcd says of the keys from `start` to before `end`, as long as one stream lasts.

        Raises grpc.aio.AioRpcError if it breaks.
        """
        metadata = None if self._token is None else (("token", self._token),)
        stream = self._watches.Watch(metadata=metadata)
        try:
            request = WatchCreateRequest(key=start, range_end=end, start_revision=start_revision)
            await stream.write(WatchRequest(create_request=request))
            async for response in stream:
                yield response
        finally:
            stream.cancel()

    async def _valid_token(self) -> str | None:
        if self._access.user is not None and self._token is None:
            answer = await self._auth.authenticate(self._access.user, self._access.password)
            self._token = answer.token
            for service in (self.kv, self.leases):
                service.set_token(self._token)
        return self._token


class _Verdict(Enum):
    """What an error means for the call."""

    WAIT = auto()
    AUTHENTICATE = auto()
    REFUSED = auto()


def _verdict(error: Exception) -> _Verdict:
    match error:
        case EtcdConnectionError() | EtcdTransientError() | TimeoutError():
            return _Verdict.WAIT
        case EtcdUnauthenticatedError():
            return _Verdict.AUTHENTICATE
        case grpc.aio.AioRpcError() if error.code() in WAIT_CODES:
            return _Verdict.WAIT
        case grpc.aio.AioRpcError() if "auth store is old" in (error.details() or ""):
            # Somebody changed users or roles since the token was given out.
            return _Verdict.AUTHENTICATE
        case _:
            return _Verdict.REFUSED


def _refusal(error: Exception, access: EtcdAccess) -> Exception:
    """The port's error for what etcd refused."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return StoreRefused(f"{access} refuses: {error}; check store.user and its roles in etcd")
    details = error.details() or error.code().name
    if "lease not found" in details:
        return LeaseLost(f"{access}: {details}")
    if "compacted" in details:
        return HistoryCompacted(f"{access}: {details}")
    if "user name is empty" in details:
        remedy = "it wants a user; set store.user and store.password_env"
    elif "invalid user ID or password" in details:
        remedy = "check store.user and its password"
    elif "too large" in details:
        remedy = "start etcd with a larger --max-request-bytes"
    else:
        remedy = "to ask again would not help"
    return StoreRefused(f"{access} refuses: {details}; {remedy}")
