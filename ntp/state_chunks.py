"""Streams of state -> chunks of bounded size, in an order in which ranks cannot deadlock.

Theory of operation. All that one rank sends to another is a *stream* of pieces, one for every
tensor that a move touches. Both ends derive the stream from the same plan, and with it everything
here: chunk by chunk they agree on sizes and order without a word.

Cutting. A *chunk* is what travels as one message, `chunk_bytes` at most. A piece may consist of
separate runs of contiguous bytes: a range of columns has one run in every row of its matrix. Long
runs (`direct_bytes` or more) become chunks of their own, which neither end needs to copy. All else
is packed back to back into full chunks, so that a small reshard is one message between two ranks.
Only sizes decide, since the two ends may hold the same atoms at different strides.

Order. Round k has the k-th chunk of every stream; within a round, streams are ordered by the
distance from sender to receiver, then by sender, so that a round keeps all ranks busy both ways.
(round, distance, sender) orders all chunks of all ranks, and every rank walks those it sends or
receives in that order, of which it needs to know no others.

Windows. A rank posts its chunks in windows of a few, and finishes its oldest window before it posts
beyond `in_flight` chunks. A chunk moves once both ends have posted it; nothing is buffered. It is
finished when the receiver has waited for it, in order, and has told the sender so.

No deadlock: suppose that everything stands still, and let m be the first chunk in the global order
that is not finished. All chunks that either end of m walks before m are finished, so no window
before the one of m holds an end up: both have posted m, and m has moved. Nor does any chunk that
the receiver waits for before m. So it waits for m, which has come, and tells the sender: m is
finished, a contradiction. The same holds where a window is one group call and runs only after the
one before it, as on an NCCL stream. A window of one chunk suffices, and any pattern of streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reshard may use.

    ``chunk_bytes``: the most that one message carries. ``in_flight``: messages that a rank may have
    posted and not finished, sent and received together. ``direct_bytes``: contiguous runs of at
    least this length travel without a copy. ``timeout_seconds``: how long a message may take from
    the moment when its turn has come. Raises ValueError unless all are positive.
    """

    chunk_bytes: int = 16 * MIB
    in_flight: int = 4
    direct_bytes: int = MIB
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if min(self.chunk_bytes, self.in_flight, self.direct_bytes) < 1:
            raise ValueError(f"{self}: chunk_bytes, in_flight and direct_bytes must be at least 1")
        if self.timeout_seconds <= 0:
            raise ValueError(f"{self}: timeout_seconds must be above 0")

    @property
    def staging_bytes(self) -> int:
        """The most memory that a rank needs beside the state it has and the state it gets."""
        return self.chunk_bytes * self.in_flight


@dataclass(frozen=True, slots=True)
class Piece(Generic[T]):
    """`nbytes` of state, in runs of `run_nbytes` that are contiguous at both ends.

    `item` is the caller's handle on them.
    """

    item: T
    nbytes: int
    run_nbytes: int


@dataclass(frozen=True, slots=True)
class Segment(Generic[T]):
    """Bytes start..stop-1 of a piece."""

    item: T
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.stop - self.start


StateChunk = tuple[Segment[T], ...]
"""What one message carries, back to back."""


def cut(pieces: Iterable[Piece[T]], limits: Limits) -> Iterator[StateChunk[T]]:
    """The chunks of one stream; every byte of every piece is in exactly one.

    Pieces are drawn as chunks are, so that a stream is never in memory as a whole.
    """
    packed: list[Segment[T]] = []
    room = limits.chunk_bytes
    for piece in pieces:
        if piece.run_nbytes >= limits.direct_bytes:
            for run in range(0, piece.nbytes, piece.run_nbytes):
                end = run + piece.run_nbytes
                for start in range(run, end, limits.chunk_bytes):
                    yield (Segment(piece.item, start, min(start + limits.chunk_bytes, end)),)
            continue
        start = 0
        while start < piece.nbytes:
            stop = min(start + room, piece.nbytes)
            packed.append(Segment(piece.item, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tuple(packed)
                packed, room = [], limits.chunk_bytes
    if packed:
        yield tuple(packed)


@dataclass(frozen=True, slots=True)
class Route:
    """From one rank to another."""

    sender: int
    receiver: int


def in_turn(streams: Mapping[Route, Iterable[T]], size: int) -> Iterator[tuple[Route, T]]:
    """The members of one rank's streams in the global order; `size` is the number of ranks."""

    def turn(route: Route) -> tuple[int, int]:
        return (route.receiver - route.sender) % size, route.sender

    alive = [(route, iter(streams[route])) for route in sorted(streams, key=turn)]
    while alive:
        unfinished = []
        for route, stream in alive:
            for member in islice(stream, 1):
                unfinished.append((route, stream))
                yield route, member
        alive = unfinished


@dataclass(frozen=True, slots=True)
class Post(Generic[T]):
    """Post all of these, then go on."""

    window: tuple[T, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Finish the oldest window that is not finished."""


def windows(chunks: Iterable[T], in_flight: int) -> Iterator[Post[T] | Wait]:
    """What a rank does with its chunks, in order: each is posted once and finished once.

    Where `in_flight` allows, there are two windows, so that one is on its way while the other is
    packed or unpacked.
    """
    width = max(1, in_flight // 2)
    unfinished = 0
    stream = iter(chunks)
    while window := tuple(islice(stream, width)):
        if unfinished == in_flight // width:
            yield Wait()
            unfinished -= 1
        yield Post(window)
        unfinished += 1
    for _ in range(unfinished):
        yield Wait()
