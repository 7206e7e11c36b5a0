"""Streams that break at awkward moments, played to a watch: it goes on from what it gave out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from backends import first, run

from elastic import etcd_watch
from elastic.etcd_watch import EtcdWatch

PUT, DELETE = 0, 1


def answer(revision: int, *events: Any, **flags: Any) -> SimpleNamespace:
    """A watch's response while the store is at `revision`."""
    fields = {"created": False, "canceled": False, "compact_revision": 0, **flags}
    return SimpleNamespace(header=SimpleNamespace(revision=revision), events=events, **fields)


def put(key: str, revision: int) -> SimpleNamespace:
    pair = SimpleNamespace(key=key.encode(), value=b"x", mod_revision=revision)
    return SimpleNamespace(type=PUT, DELETE=DELETE, kv=pair)


class Script:
    """An etcd that plays one prepared stream after the other, and notes where each began."""

    closed = False

    def __init__(self, *streams: list[SimpleNamespace]) -> None:
        self._streams = list(streams)
        self.starts: list[int] = []
        self.kv = self

    async def ask(self, call: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        return await call(), False

    async def get(self, *arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(kvs=[])

    async def stream(
        self, start: bytes, end: bytes, start_revision: int
    ) -> AsyncIterator[SimpleNamespace]:
        self.starts.append(start_revision)
        if not self._streams:
            await asyncio.Event().wait()
        for response in self._streams.pop(0):
            yield response


@pytest.mark.parametrize(
    "stream",
    [
        # Ahead of 6 and 7, which were still to come.
        [answer(7, created=True), answer(7, put("/a", 5))],
        [answer(7, created=True, canceled=True)],
        [],
    ],
)
def test_the_next_stream_begins_after_the_last_change_given_out(
    stream: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_watch, "RESTART_SECONDS", 0)

    async def main() -> None:
        given = [5] if any(response.events for response in stream[:2]) else []
        rest = [revision for revision in (5, 6, 7) if revision not in given]
        events = [put("/a", revision) for revision in rest]
        script = Script(stream, [answer(7, created=True), answer(7, *events)])
        changes = EtcdWatch(script, "", "/", 4).changes()  # type: ignore[arg-type]
        assert [change.revision for change in await first(changes, 3)] == [5, 6, 7]
        assert script.starts == [5, 6 if given else 5]

    run(main())
