"""A watch on etcd that misses nothing and tells nothing twice, whatever happens to the connection.

Theory of operation. The watch keeps its own position: the revision of the last change it gave out.
A stream that ends or breaks is followed by a new one from there. etcd3aio's own watch is not used:
it reconnects by itself, but from the revision of the newest answer, which may be ahead of the
changes that were still to come on a stream that was catching up.

etcd forgets old revisions by compaction. A watch that fell behind one reads the present keys and
gives out the difference: keys written since, and keys it knew that are gone. Intermediate values
are lost then, which the port's users must bear after any absence. To know which keys are gone, the
watch reads the names of the keys at its first position before it begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from etcd3aio import prefix_range_end

from elastic.etcd_calls import EtcdCalls, HistoryCompacted
from elastic.store import Change

RESTART_SECONDS = 0.1
"""Pause before a new stream, so that a server that ends each at once is not asked in a hot loop."""


class EtcdWatch:
    """One watch on the keys under `prefix`, from the change after revision `after` on.

    `base` goes before every key in etcd, and is taken off again.
    """

    def __init__(self, calls: EtcdCalls, base: str, prefix: str, after: int) -> None:
        self._calls = calls
        self._base = base
        self._prefix = base + prefix
        self._end = prefix_range_end(self._prefix)
        self._position = after
        self._keys: set[str] = set()

    async def changes(self) -> AsyncGenerator[Change, None]:
        """The changes, in order of revision, until the client is closed."""
        try:
            self._keys = await self._keys_at_start()
            while True:
                async with aclosing(self._stream()) as changes:
                    async for change in changes:
                        self._position = change.revision
                        yield change
                await asyncio.sleep(RESTART_SECONDS)
                # Waits for the end of an outage, renews the token, and raises what is refused.
                await self._calls.ask(
                    lambda: self._calls.kv.get(self._prefix, self._end, count_only=True)
                )
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # gRPC ends calls on a closed connection as if their task had been cancelled.
            task = asyncio.current_task()
            if not self._calls.closed or (task is not None and task.cancelling()):
                raise

    async def _stream(self) -> AsyncGenerator[Change, None]:
        """Changes from the position on, until the stream must be replaced."""
        stream = self._calls.stream(self._prefix.encode(), self._end, self._position + 1)
        async with aclosing(stream) as responses:
            try:
                async for response in responses:
                    if response.compact_revision > 0:
                        async for change in self._difference():
                            yield change
                        return
                    if response.canceled:
                        return
                    for event in response.events:
                        yield self._take(event)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The latter if the stream was over before the request could be written.
                return

    def _take(self, event: Any) -> Change:
        key = self._key(event.kv)
        if event.type == event.DELETE:
            self._keys.discard(key)
            return Change(key, None, event.kv.mod_revision)
        self._keys.add(key)
        return Change(key, event.kv.value, event.kv.mod_revision)

    async def _difference(self) -> AsyncIterator[Change]:
        """From the state at the position to the present one."""
        before = self._position
        answer, _ = await self._calls.ask(lambda: self._calls.kv.get(self._prefix, self._end))
        for pair in sorted(answer.kvs, key=lambda pair: pair.mod_revision):
            if pair.mod_revision > before:
                yield Change(self._key(pair), pair.value, pair.mod_revision)
        present = {self._key(pair) for pair in answer.kvs}
        gone, self._keys = sorted(self._keys - present), present
        for key in gone:
            yield Change(key, None, answer.header.revision)
        self._position = answer.header.revision

    async def _keys_at_start(self) -> set[str]:
        if self._position == 0:
            return set()  # To etcd, revision 0 is the present.
        try:
            answer, _ = await self._calls.ask(
                lambda: self._calls.kv.get(
                    self._prefix, self._end, revision=self._position, keys_only=True
                )
            )
        except HistoryCompacted:
            # Nobody can say which keys there were. The stream will be refused likewise.
            return set()
        return {self._key(pair) for pair in answer.kvs}

    def _key(self, pair: Any) -> str:
        return str(pair.key.decode()).removeprefix(self._base)
