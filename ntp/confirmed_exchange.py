"""Exchanges that notice a lost peer in the middle of a message.

Theory of operation. When a connection breaks, gloo wakes those who wait for an operation that has
not begun. An operation that is partly through is forgotten: whoever waits for it learns nothing
until the timeout passes (measured with torch 2.13; so is a send that fails at its first byte). The
larger the message, the likelier. So nobody here waits for a message while it may be on its way:

- A *mark*, one byte, follows each message on the same connection. The receiver waits for the mark,
  then for the message, which by then is complete.
- The receiver answers with a *receipt*, one byte. The sender waits for the receipt, then for what
  it sent, which by then is complete.

Both are received by operations that were posted before the message, and that a broken connection
wakes. A batch of messages is thus finished only when the receivers have finished them.

NCCL needs none of this: there a batch is one group call, and a lost peer ends in an abort of the
communicator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ntp.exchange import Message, post

MARK_TAG = 1 << 18
"""Added to the tag of a message for its mark; tags are below."""

RECEIPT_TAG = 1 << 19


@dataclass(frozen=True, slots=True)
class _Arrival:
    """Works of a message that is received."""

    peer: int
    mark: Any
    message: Any


@dataclass(frozen=True, slots=True)
class _Departure:
    """Works of a message that is sent."""

    receipt: Any
    message: Any
    mark: Any


@dataclass(frozen=True, slots=True)
class _Batch:
    """Works of messages that were posted together; `grouped` where they are one group call."""

    arrivals: list[_Arrival] = field(default_factory=list)
    departures: list[_Departure] = field(default_factory=list)
    grouped: list[Any] = field(default_factory=list)


class ConfirmedExchange:
    """Batches of messages of one rank, finished in the order in which they were posted.

    Messages are matched as in `ntp.exchange`. A batch is finished receives first, each kind in the
    order given; see `ntp.state_chunks` for an order of batches that is safe from deadlocks.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int, timeout: timedelta) -> None:
        assert 0 <= tag < MARK_TAG, tag
        self._group = group
        self._tag = tag
        self._timeout = timeout
        self._byte = torch.zeros(1, dtype=torch.uint8)
        self._batches: deque[_Batch] = deque()
        self._receipts: list[Any] = []

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Start a batch. Raises RuntimeError when a peer's connection is broken."""
        batch = _Batch()
        self._batches.append(batch)
        if any(message.tensor.is_cuda for message in (*sends, *receives)):
            batch.grouped.extend(post(self._group, sends, receives, self._tag))
            return
        for message in receives:
            arriving = self._receive(message)
            mark = self._receive(Message(message.peer, self._byte), MARK_TAG)
            batch.arrivals.append(_Arrival(message.peer, mark, arriving))
        for message in sends:
            # Posted first, so that the receiver knows of it when it has the message.
            receipt = self._receive(Message(message.peer, self._byte), RECEIPT_TAG)
            leaving = self._send(message)
            mark = self._send(Message(message.peer, self._byte), MARK_TAG)
            batch.departures.append(_Departure(receipt, leaving, mark))

    def finish(self) -> None:
        """Wait for the oldest batch: all its messages are then received, at both ends.

        Raises RuntimeError when a peer's connection breaks or the timeout passes.
        """
        batch = self._batches[0]
        for arrival in batch.arrivals:
            arrival.mark.wait(self._timeout)
            arrival.message.wait(self._timeout)
            self._receipts.append(self._send(Message(arrival.peer, self._byte), RECEIPT_TAG))
        for departure in batch.departures:
            departure.receipt.wait(self._timeout)
            departure.message.wait(self._timeout)
            departure.mark.wait(self._timeout)
        for work in batch.grouped:
            work.wait()
        self._batches.popleft()

    def settle(self) -> None:
        """Wait until the receipts of finished batches are sent. Raises RuntimeError as `finish`."""
        assert not self._batches, "finish all batches first"
        while self._receipts:
            self._receipts.pop(0).wait(self._timeout)

    def abandon(self) -> None:
        """Let go of all that is not finished; gloo then reads and writes no tensor any more."""
        for batch in self._batches:
            batch.arrivals.clear()
            batch.departures.clear()
            batch.grouped.clear()
        self._batches.clear()
        self._receipts.clear()

    def _receive(self, message: Message, offset: int = 0) -> Any:
        return self._group.recv([message.tensor], message.peer, self._tag + offset)

    def _send(self, message: Message, offset: int = 0) -> Any:
        return self._group.send([message.tensor], message.peer, self._tag + offset)
