"""Where the workers of a generation tell each other the addresses of their communicators.

Each agent serves one such store for the job; a plan names the one to use. It holds what torch's
process groups write while they are built: small values under prefixes that carry the generation.
torch's own TCPStore does the same, but must not live in a worker, whose death would take it along,
loads torch into whoever serves it, and looks up the names of its peers' addresses, which stalls for
seconds where no name server answers. This one is a dictionary behind a few message kinds.

The protocol is one msgspec struct a message, framed by its length as four big-endian bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import defaultdict
from multiprocessing.connection import Connection

import msgspec

HEADER = struct.Struct(">I")


class Put(msgspec.Struct, frozen=True, tag=True):
    """Write a value; answered by Value."""

    key: str
    value: bytes


class Add(msgspec.Struct, frozen=True, tag=True):
    """Add to a number (0 if absent), kept as decimal text; answered by Value with the sum."""

    key: str
    amount: int


class Await(msgspec.Struct, frozen=True, tag=True):
    """Answered by Value once the key exists."""

    key: str


class Has(msgspec.Struct, frozen=True, tag=True):
    """Answered by Value: ``1`` if the key exists, else empty."""

    key: str


class Value(msgspec.Struct, frozen=True, tag=True):
    """Answer to everything."""

    value: bytes


Request = Put | Add | Await | Has


class RendezvousServer:
    """The store of one agent, served by its event loop."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._written: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            # A worker that dies or severs its connection ends it in one of these ways.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
                    request = self._decoder.decode(await reader.readexactly(size))
                    if isinstance(request, Await):
                        await self._until_written(request.key, reader)
                    writer.write(frame(Value(self._answer(request))))
        finally:
            del self._connections[task]
            writer.close()

    async def _until_written(self, key: str, reader: asyncio.StreamReader) -> None:
        """Return once `key` exists. Raises ConnectionError when the client is gone before that."""
        if key in self._values:
            return
        written = asyncio.create_task(self._written[key].wait())
        # A client that waits for an answer sends nothing, so all it can do is hang up.
        hung_up = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait([written, hung_up], return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                raise ConnectionError("the client hung up")
        finally:
            written.cancel()
            hung_up.cancel()
            await asyncio.gather(written, hung_up, return_exceptions=True)

    def _answer(self, request: Request) -> bytes:
        match request:
            case Put(key, value):
                self._write(key, value)
                return b""
            case Add(key, amount):
                self._write(key, str(int(self._values.get(key, b"0")) + amount).encode())
                return self._values[key]
            case Await(key):
                return self._values[key]
            case Has(key):
                return b"1" if key in self._values else b""

    def _write(self, key: str, value: bytes) -> None:
        self._values[key] = value
        if (waiting := self._written.pop(key, None)) is not None:
            waiting.set()


def frame(message: Request | Value) -> bytes:
    """`message` as it travels."""
    encoded = msgspec.msgpack.encode(message)
    return HEADER.pack(len(encoded)) + encoded


def serve(connection: Connection, host: str) -> None:
    """Serve a store, for ranks without an agent, until the other end of `connection` closes.

    The main function of a process of its own; first sends host:port.
    """
    asyncio.run(_serve_until_closed(connection, host))


async def _serve_until_closed(connection: Connection, host: str) -> None:
    server = RendezvousServer()
    connection.send_bytes((await server.start(host)).encode())
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(connection.fileno(), closed.set)
    await closed.wait()
    await server.close()
