"""Connections that tell that an agent is gone, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elastic import lifeline
from elastic.lifeline import until_nobody_listens


class Listener:
    """A server that keeps its connections until it is told otherwise."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.put_nowait(writer)

    async def close(self) -> None:
        self._server.close()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scene(), 20)

    asyncio.run(bounded())


def test_it_ends_when_nobody_listens_any_more() -> None:
    async def scene() -> None:
        listener = Listener()
        held = asyncio.create_task(until_nobody_listens(await listener.start()))
        connection = await listener.accepted.get()
        await listener.close()
        assert not held.done()
        connection.close()
        await held

    run(scene)


def test_a_connection_that_somebody_cut_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever waits that long after the second end misses the end of the process.
    monkeypatch.setattr(lifeline, "LONGEST_PAUSE_SECONDS", 1000.0)

    async def scene() -> None:
        listener = Listener()
        held = asyncio.create_task(until_nobody_listens(await listener.start()))
        (await listener.accepted.get()).close()
        again = await listener.accepted.get()
        assert not held.done()
        await listener.close()
        again.close()
        await held

    run(scene)


def test_a_host_that_was_never_reached_is_not_called_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "FIRST_PAUSE_SECONDS", 0.0)

    async def scene() -> None:
        attempts: asyncio.Queue[str] = asyncio.Queue()

        async def refuse(host: str, port: int) -> None:
            attempts.put_nowait(f"{host}:{port}")
            raise ConnectionRefusedError

        monkeypatch.setattr(asyncio, "open_connection", refuse)
        held = asyncio.create_task(until_nobody_listens("a.firewall:7"))
        for _ in range(5):
            assert await attempts.get() == "a.firewall:7"
        assert not held.done()
        held.cancel()

    run(scene)
