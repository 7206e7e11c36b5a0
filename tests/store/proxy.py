"""A line to etcd that can be cut for one client while the others go on."""

from __future__ import annotations

import asyncio
from contextlib import suppress

CHUNK_BYTES = 65536


class Proxy:
    """Forwards connections to `target` (host:port). Used as a context manager."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._lines: set[asyncio.Task[None]] = set()
        self._whole = True
        self._answers = asyncio.Event()
        self._answers.set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.cut()
        self._server.close()
        await self._server.wait_closed()

    async def cut(self) -> None:
        """Break all connections, and each new one."""
        self._whole = False
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def heal(self) -> None:
        """Let connections through again, in both directions."""
        self._whole = True
        self._answers.set()

    def hold_answers(self) -> None:
        """From now on what etcd says is kept back; what it is told goes through."""
        self._answers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        ends, tasks = [writer], []
        try:
            if self._whole:
                there, back = await asyncio.open_connection(self._host, self._port)
                ends.append(back)
                tasks = [
                    asyncio.create_task(self._forward(reader, back, answers=False)),
                    asyncio.create_task(self._forward(there, writer, answers=True)),
                ]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass  # Either end is gone, or the line was cut.
        finally:
            for task in tasks:
                task.cancel()
            for end in ends:
                end.transport.abort()
            self._lines.discard(line)

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if answers:
                    await self._answers.wait()
                sink.write(data)
                await sink.drain()
