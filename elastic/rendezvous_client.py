"""The rendezvous store as torch sees it: one connection of one worker to an agent's server."""

from __future__ import annotations

import socket
from datetime import timedelta

import msgspec
import torch.distributed as dist

from elastic.rendezvous import HEADER, Add, Await, Has, Put, Request, Value, frame


class RendezvousStore(dist.Store):
    """A torch store for building process groups.

    A wait for a key ends with DistNetworkError when the timeout passes, the server goes away, or
    another thread calls `sever`.
    """

    def __init__(self, address: str, timeout_seconds: float) -> None:
        super().__init__()
        host, _, port = address.rpartition(":")
        self._address = address
        self._decoder = msgspec.msgpack.Decoder(Value)
        try:
            self._connection = socket.create_connection((host, int(port)), timeout_seconds)
        except OSError as error:
            raise dist.DistNetworkError(f"no rendezvous store at {address}: {error}") from error
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        self._ask(Put(key, value.encode() if isinstance(value, str) else bytes(value)))

    def get(self, key: str) -> bytes:
        """Value of `key`, waiting until it exists."""
        return self._ask(Await(key))

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        return int(self._ask(Add(key, amount)))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return all(self._ask(Has(key)) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys exist."""
        for key in keys:
            self._ask(Await(key))

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a request may take from now on."""
        self._connection.settimeout(timeout.total_seconds())

    def sever(self) -> None:
        """End a pending request with an error. May be called from any thread."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It was closed already, by us or by the server.
            return

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(self, request: Request) -> bytes:
        try:
            self._connection.sendall(frame(request))
            (size,) = HEADER.unpack(self._read(HEADER.size))
            return self._decoder.decode(self._read(size)).value
        except OSError as error:
            raise dist.DistNetworkError(
                f"rendezvous store {self._address}: {type(request).__name__} {request.key}: {error}"
            ) from error

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._connection.recv(size)
            if not part:
                raise ConnectionError("the connection was closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
