"""Chunks: every byte once, and no pattern of streams in which ranks wait for each other forever.

The oracle is a slow simulator of ranks whose messages move only when both ends have begun them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.state_chunks import (
    MIB,
    Limits,
    Piece,
    Post,
    Route,
    Segment,
    StateChunk,
    Wait,
    cut,
    in_turn,
    windows,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)

Chunk = StateChunk[int]
Part = tuple[Route, Chunk]
Program = list[Post[Part] | Wait]
Message = tuple[Route, int]
"""The n-th message of a route; both ends count them."""


class Deadlock(AssertionError):
    """No rank can go on."""


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece[int]]:
    """A stream of pieces that are numbered."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), max_size=6))
    return [Piece(item, rows * run, run) for item, (rows, run) in enumerate(shapes)]


limits = st.builds(Limits, st.integers(1, 40), st.integers(1, 6), st.integers(1, 40))


@st.composite
def traffic(draw: st.DrawFn) -> tuple[int, dict[Route, list[Piece[int]]]]:
    """A number of ranks and any streams between them."""
    size = draw(st.integers(2, 6))
    routes = [Route(a, b) for a in range(size) for b in range(size) if a != b]
    chosen = draw(st.sets(st.sampled_from(routes), max_size=12))
    return size, {route: draw(pieces()) for route in sorted(chosen, key=routes.index)}


def size_of(chunk: Iterable[Segment[int]]) -> int:
    return sum(segment.nbytes for segment in chunk)


@PROPERTY
@given(pieces(), limits)
def test_every_byte_is_in_one_chunk(stream: list[Piece[int]], limit: Limits) -> None:
    chunks = list(cut(stream, limit))
    carried = [
        (segment.item, byte)
        for chunk in chunks
        for segment in chunk
        for byte in range(segment.start, segment.stop)
    ]
    assert sorted(carried) == [(p.item, byte) for p in stream for byte in range(p.nbytes)]
    assert all(0 < size_of(chunk) <= limit.chunk_bytes for chunk in chunks)


@PROPERTY
@given(pieces(), limits)
def test_long_runs_stay_alone_and_short_ones_fill_chunks(
    stream: list[Piece[int]], limit: Limits
) -> None:
    def is_long(item: int) -> bool:
        return stream[item].run_nbytes >= limit.direct_bytes

    chunks = list(cut(stream, limit))
    packed = [chunk for chunk in chunks if not is_long(chunk[0].item)]
    assert all(size_of(chunk) == limit.chunk_bytes for chunk in packed[:-1])
    for chunk in chunks:
        assert len({is_long(segment.item) for segment in chunk}) == 1
        if is_long(chunk[0].item):
            (segment,) = chunk
            run = stream[segment.item].run_nbytes
            assert segment.start // run == (segment.stop - 1) // run


def test_a_small_stream_is_one_chunk() -> None:
    stream = [Piece(item, 4000, 40) for item in range(200)]
    assert len(list(cut(stream, Limits()))) == 1
    # A long run leaves the packed chunk open.
    stream.insert(100, Piece(-1, 2 * MIB, 2 * MIB))
    first, second = cut(stream, Limits())
    assert first == (Segment(-1, 0, 2 * MIB),)
    assert size_of(second) == 200 * 4000


def test_pieces_are_drawn_as_needed() -> None:
    drawn = 0

    def endless() -> Iterable[Piece[int]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Piece(drawn, 10, 10)

    chunks = cut(endless(), Limits(chunk_bytes=25))
    next(iter(chunks))
    assert drawn == 3


def walk(
    size: int, rank: int, streams: Mapping[Route, Sequence[Piece[int]]], limit: Limits
) -> Program:
    """What a rank does, derived from its own streams alone."""
    own = {
        route: cut(stream, limit)
        for route, stream in streams.items()
        if rank in (route.sender, route.receiver)
    }
    return list(windows(in_turn(own, size), limit.in_flight))


class Mode(Enum):
    """When a message begins, and when its sender has finished it."""

    CONFIRMED = "begins when posted; finished when the receiver has waited for it"
    GROUPED = "begins when the window before is complete; finished when both ends have begun"


class Network:
    """At how many ends each message has begun, and which ones the receiver has waited for."""

    def __init__(self) -> None:
        self.begun: Counter[Message] = Counter()
        self.confirmed: set[Message] = set()

    def moved(self, message: Message) -> bool:
        return self.begun[message] == 2


class SimulatedRank:
    """One rank at work on its program."""

    def __init__(self, rank: int, program: Program, mode: Mode, network: Network) -> None:
        self.rank = rank
        self.steps = deque(program)
        self._mode = mode
        self._network = network
        self._posted: list[list[Message]] = []
        self._begun = 0
        self._finished = 0
        self._numbers: Counter[Route] = Counter()

    def advance(self) -> None:
        """Begin what may begin, and do the next step unless it has to wait."""
        if self._begun < len(self._posted) and self._may_begin():
            self._network.begun.update(self._posted[self._begun])
            self._begun += 1
        match self.steps[0] if self.steps else None:
            case Post(window):
                self._posted.append([self._numbered(route) for route, _ in window])
                self.steps.popleft()
            case Wait() if self._finished < self._begun and self._finish():
                self._finished += 1
                self.steps.popleft()

    def _may_begin(self) -> bool:
        before = self._posted[self._begun - 1] if self._begun else []
        return self._mode is not Mode.GROUPED or all(map(self._network.moved, before))

    def _numbered(self, route: Route) -> Message:
        self._numbers[route] += 1
        return route, self._numbers[route]

    def _finish(self) -> bool:
        """Receives in order, then sends, as far as it goes; confirmations stay given."""
        window = self._posted[self._finished]
        for message in window:
            if message[0].receiver == self.rank:
                if not self._network.moved(message):
                    return False
                self._network.confirmed.add(message)
        sent = [message for message in window if message[0].sender == self.rank]
        if self._mode is Mode.CONFIRMED:
            return self._network.confirmed.issuperset(sent)
        return all(map(self._network.moved, sent))


def simulate(programs: Sequence[Program], mode: Mode) -> None:
    """Run all ranks until nothing moves; raises Deadlock unless all are through.

    Nothing that a rank does stands in the way of another, so one order of turns is all orders.
    """
    network = Network()
    ranks = [SimulatedRank(rank, program, mode, network) for rank, program in enumerate(programs)]

    def progress() -> tuple[int, int, int]:
        left = sum(len(rank.steps) for rank in ranks)
        return left, network.begun.total(), len(network.confirmed)

    before = None
    while before != (before := progress()):
        for rank in ranks:
            rank.advance()
    if stuck := [rank.rank for rank in ranks if rank.steps]:
        raise Deadlock(f"ranks {stuck} cannot go on")


@PROPERTY
@given(traffic(), st.data(), st.sampled_from(Mode))
def test_no_deadlock(
    case: tuple[int, dict[Route, list[Piece[int]]]], data: st.DataObject, mode: Mode
) -> None:
    size, streams = case
    limit = data.draw(limits)
    # Ranks may even differ in how much they have in flight.
    flights = data.draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
    own = [Limits(limit.chunk_bytes, flight, limit.direct_bytes) for flight in flights]
    simulate([walk(size, rank, streams, own[rank]) for rank in range(size)], mode)


@PROPERTY
@given(traffic(), limits)
def test_every_chunk_is_posted_and_waited_for_within_the_limits(
    case: tuple[int, dict[Route, list[Piece[int]]]], limit: Limits
) -> None:
    size, streams = case
    for rank in range(size):
        flying: list[int] = []
        total = 0
        for step in walk(size, rank, streams, limit):
            match step:
                case Post(window):
                    flying.append(len(window))
                    total += len(window)
                case Wait():
                    flying.pop(0)
            assert sum(flying) <= limit.in_flight
        assert not flying
        mine = [s for route, s in streams.items() if rank in (route.sender, route.receiver)]
        assert total == sum(len(list(cut(stream, limit))) for stream in mine)


@pytest.mark.parametrize("mode", Mode)
def test_the_simulator_sees_a_deadlock(mode: Mode) -> None:
    # Three ranks in a ring that all receive before they send, one message at a time.
    size = 3
    chunk: Chunk = (Segment(0, 0, 1),)

    def receive_first(rank: int) -> Program:
        receive, send = Route((rank - 1) % size, rank), Route(rank, (rank + 1) % size)
        return list(windows([(receive, chunk), (send, chunk)], in_flight=1))

    with pytest.raises(Deadlock):
        simulate([receive_first(rank) for rank in range(size)], mode)


def test_a_round_has_every_rank_send_and_receive() -> None:
    size = 4
    streams = {Route(a, b): "01" for a in range(size) for b in range(size) if a != b}
    for rank in range(size):
        own = {route: s for route, s in streams.items() if rank in (route.sender, route.receiver)}
        walked = list(in_turn(own, size))
        assert [number for _, number in walked] == ["0"] * 6 + ["1"] * 6
        for pair in range(0, len(walked), 2):
            routes = [route for route, _ in walked[pair : pair + 2]]
            assert {route.sender == rank for route in routes} == {True, False}


def test_limits_are_positive() -> None:
    for wrong in ({"chunk_bytes": 0}, {"in_flight": 0}, {"direct_bytes": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            Limits(**wrong)
    with pytest.raises(ValueError, match="above 0"):
        Limits(timeout_seconds=0.0)
    assert Limits(chunk_bytes=10, in_flight=3).staging_bytes == 30
