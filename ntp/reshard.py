"""Runs a reshard plan: state flows from the slots that have it to the slots that shall hold it.

The order of chunks, and why it cannot deadlock, is in `ntp.state_chunks`; here chunks meet tensors.
A chunk that is one contiguous run at this end is sent from, or received into, the flat buffer
itself. Any other is packed into a staging buffer before it is sent, or unpacked from one after it
came; each end decides for itself. Staging buffers are used again and again, at most
`Limits.in_flight` of `Limits.chunk_bytes` each, and that is all the memory a reshard needs.

State is moved as bytes, so buffers may differ in dtype and chunks may end anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist

from ntp.confirmed_exchange import ConfirmedExchange
from ntp.exchange import Message
from ntp.geometry import ParallelLayout, SlotRef
from ntp.local_shards import AtomRange, LocalShards
from ntp.reshard_plan import Move, ReshardPlan, kept_ranges
from ntp.state_chunks import Limits, Piece, Post, Route, StateChunk, Wait, cut, in_turn, windows

RESHARD_TAG = 1
DEFAULT_LIMITS = Limits()

FlatState = tuple[LocalShards, Sequence[torch.Tensor]]
"""A map with the contiguous flat buffers it describes."""


def reshard(
    plan: ReshardPlan,
    slot: SlotRef,
    ranks: Mapping[SlotRef, int],
    group: dist.ProcessGroup,
    source: FlatState | None,
    target: FlatState,
    kept: Sequence[AtomRange],
    limits: Limits = DEFAULT_LIMITS,
    sends_as: SlotRef | None = None,
) -> int:
    """Run `plan` for one slot; returns the bytes received.

    `source` is what the slot held before (None in a fresh process) and `target` what it shall hold:
    the same kinds of state in the same order, with the same dtypes on all ranks. `kept` ranges are
    copied locally. Only `target` is written. Every slot of the plan calls this with equal `limits`.
    `sends_as` is the slot that `source` belongs to, if the process goes from that one to `slot`;
    both have its rank.

    Raises RuntimeError when a peer is lost; `target` is then undefined, `source` is as it was, and
    nothing of either is read or written any more.
    """
    me = ranks[slot]
    old = slot if sends_as is None else sends_as
    here = [move for move in plan.moves if (move.source, move.target) == (old, slot)]
    sent = [move for move in plan.moves if move.source == old and move.target != slot]
    gained = [move for move in plan.moves if move.target == slot and move.source != old]
    streams: dict[Route, Iterator[StateChunk[torch.Tensor]]] = {}
    for peer, moves in _by_peer(sent, "target"):
        assert source is not None, "a fresh process holds nothing to send"
        streams[Route(me, ranks[peer])] = cut(_pieces(source, moves), limits)
    for peer, moves in _by_peer(gained, "source"):
        streams[Route(ranks[peer], me)] = cut(_pieces(target, moves), limits)
    received = 0
    timeout = timedelta(seconds=limits.timeout_seconds)
    flight = _Flight(ConfirmedExchange(group, RESHARD_TAG, timeout), me, target[1][0].device)
    try:
        for step in windows(in_turn(streams, group.size()), limits.in_flight):
            match step:
                case Post(window):
                    flight.post(window)
                case Wait():
                    received += flight.wait()
        flight.settle()
    finally:
        flight.abandon()
    if source is not None:
        _copy(source, target, [*kept, *((move.axis, move.atoms) for move in here)])
    return received


def ranges_kept(source: ParallelLayout, target: ParallelLayout, slot: SlotRef) -> list[AtomRange]:
    """What a surviving slot keeps across a change of layout: its common atoms, and all replicated
    tensors."""
    return [*kept_ranges(source, target, slot), (None, None)]


def _by_peer(moves: Sequence[Move], end: str) -> list[tuple[SlotRef, list[Move]]]:
    ordered = sorted(moves, key=lambda move: getattr(move, end))
    return [(peer, list(group)) for peer, group in groupby(ordered, lambda m: getattr(m, end))]


def _pieces(state: FlatState, moves: Iterable[Move]) -> Iterator[Piece[torch.Tensor]]:
    """One piece per move, buffer and tensor; its item is a view of the tensor's bytes."""
    shards, buffers = state
    for move in moves:
        runs = shards.runs(move.axis)
        for buffer in buffers:
            views = shards.views(buffer, (move.axis, move.atoms))
            for view, count in zip(views, runs, strict=True):
                yield Piece(view.view(torch.uint8), view.nbytes, view.nbytes // count)


def _copy(source: FlatState, target: FlatState, ranges: Iterable[AtomRange]) -> None:
    for atoms in ranges:
        for old, new in zip(source[1], target[1], strict=True):
            views = zip(source[0].views(old, atoms), target[0].views(new, atoms), strict=True)
            for old_view, new_view in views:
                new_view.copy_(old_view)


def _blocks(view: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Slices of `view` that make up its elements start..stop-1, counted row by row."""
    if stop - start == view.numel():
        yield view
        return
    row = view.numel() // len(view)
    first, skipped = divmod(start, row)
    last, rest = divmod(stop, row)
    if first == last:
        yield from _blocks(view[first], skipped, rest)
        return
    if skipped:
        yield from _blocks(view[first], skipped, row)
        first += 1
    if first < last:
        yield view[first:last]
    if rest:
        yield from _blocks(view[last], 0, rest)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """This end of a chunk, and the tensor that travels: `staging`, or where that is None the state
    itself."""

    chunk: StateChunk[torch.Tensor]
    carrier: torch.Tensor
    staging: torch.Tensor | None

    def pack(self) -> None:
        """Fill the staging buffer from the state."""
        for block, part in self._parts():
            part.copy_(block)

    def unpack(self) -> None:
        """Fill the state from the staging buffer."""
        for block, part in self._parts():
            block.copy_(part)

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.staging is None:
            return
        offset = 0
        for segment in self.chunk:
            for block in _blocks(segment.item, segment.start, segment.stop):
                yield block, self.carrier[offset : offset + block.numel()].view(block.shape)
                offset += block.numel()


@dataclass(frozen=True, slots=True)
class _Window:
    """Parcels that were posted together."""

    sent: list[_Parcel]
    received: list[_Parcel]


class _Flight:
    """The windows of one rank that are on their way, oldest first, and its staging buffers."""

    def __init__(self, exchange: ConfirmedExchange, rank: int, device: torch.device) -> None:
        self._exchange = exchange
        self._rank = rank
        self._device = device
        self._windows: deque[_Window] = deque()
        self._staging: list[torch.Tensor] = []

    def post(self, window: Iterable[tuple[Route, StateChunk[torch.Tensor]]]) -> None:
        """Start a window."""
        parcels = _Window([], [])
        sends, receives = [], []
        for route, chunk in window:
            parcel = self._parcel(chunk)
            if route.sender == self._rank:
                parcel.pack()
                parcels.sent.append(parcel)
                sends.append(Message(route.receiver, parcel.carrier))
            else:
                parcels.received.append(parcel)
                receives.append(Message(route.sender, parcel.carrier))
        self._exchange.post(sends, receives)
        self._windows.append(parcels)

    def wait(self) -> int:
        """Finish the oldest window; returns the bytes it received."""
        self._exchange.finish()
        window = self._windows.popleft()
        for parcel in window.received:
            parcel.unpack()
        parcels = (*window.sent, *window.received)
        self._staging += [parcel.staging for parcel in parcels if parcel.staging is not None]
        return sum(parcel.carrier.nbytes for parcel in window.received)

    def settle(self) -> None:
        """After the last window: return when the other ends know that it is finished."""
        self._exchange.settle()

    def abandon(self) -> None:
        """Let everything go; what is still on its way ends."""
        self._exchange.abandon()
        self._windows.clear()
        self._staging.clear()

    def _parcel(self, chunk: StateChunk[torch.Tensor]) -> _Parcel:
        if len(chunk) == 1:
            blocks = list(_blocks(chunk[0].item, chunk[0].start, chunk[0].stop))
            if len(blocks) == 1 and blocks[0].is_contiguous():
                return _Parcel(chunk, blocks[0].view(-1), None)
        nbytes = sum(segment.nbytes for segment in chunk)
        staging = self._staging.pop() if self._staging else None
        if staging is None or staging.numel() < nbytes:
            staging = None  # first let go of the smaller buffer
            staging = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return _Parcel(chunk, staging[:nbytes], staging)
