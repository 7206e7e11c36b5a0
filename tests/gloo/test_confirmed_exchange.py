"""A peer that is lost in the middle of a large message is noticed at once, not by timeout."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
import torch
from harness import TIMEOUT_SECONDS, Cluster, Rank

from ntp.confirmed_exchange import ConfirmedExchange
from ntp.exchange import Message
from ntp.groups import GroupAxis, GroupSpec
from ntp.process_groups import is_connection_error

TAG, READY_TAG = 1, 2
BYTES = 64 << 20
"""Far more than the kernel buffers for a connection, so that the sender waits for the receiver."""
LONG_BYTES = 1 << 30
"""A message that takes far longer to travel than a process takes to kill itself."""


def connect(rank: Rank) -> torch.distributed.ProcessGroup:
    groups = rank.groups()
    world = GroupSpec(GroupAxis.WORLD, (), tuple(range(rank.size)))
    names = [str(number) for number in range(rank.size)]
    groups.adopt([world], names, rank.rank, 1, rank.store(), frozenset())
    return groups.world


def one_message(rank: Rank, sender: int, victim: int | None) -> tuple[str, bool]:
    """Send a message between two ranks of which one may be killed halfway.

    Returns the error, if any, and whether the message came as it was sent.
    """
    group = connect(rank)
    exchange = ConfirmedExchange(group, TAG, timedelta(seconds=TIMEOUT_SECONDS))
    ready = torch.zeros(1)
    peer = 1 - rank.rank
    size = BYTES if victim is None else LONG_BYTES
    if rank.rank == sender:
        tensor = torch.ones(size, dtype=torch.uint8)
        # It follows the receiver's announcement of its receive, so that the send begins at once.
        group.recv([ready], peer, READY_TAG).wait()
        exchange.post([Message(peer, tensor)], [])
    else:
        tensor = torch.zeros(size, dtype=torch.uint8)
        exchange.post([], [Message(peer, tensor)])
        group.send([ready], peer, READY_TAG).wait()
    if victim == rank.rank:
        while not tensor[0]:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        exchange.finish()
        exchange.settle()
    except RuntimeError as caught:
        assert is_connection_error(caught), caught
        exchange.abandon()
        return str(caught), False
    return "", bool(tensor.all())


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_peer_is_lost_in_the_middle_of_a_message(cluster: Cluster, victim: str) -> None:
    sender, lost = 0, 0 if victim == "sender" else 1
    error, _ = cluster.run(one_message, 2, sender, lost, dies={lost})[1 - lost]
    assert error
    assert "Timed out" not in error


def test_a_message_arrives(cluster: Cluster) -> None:
    assert cluster.run(one_message, 2, 0, None) == [("", True)] * 2


def exchange_batches(rank: Rank, batches: int) -> list[int]:
    """All ranks send to each other, in several batches at a time; returns the sums received."""
    group = connect(rank)
    exchange = ConfirmedExchange(group, TAG, timedelta(seconds=TIMEOUT_SECONDS))
    peers = [peer for peer in range(rank.size) if peer != rank.rank]
    received = [[torch.zeros(5) for _ in peers] for _ in range(batches)]
    for number, tensors in enumerate(received):
        value = float(100 * number + rank.rank)
        exchange.post(
            [Message(peer, torch.full((5,), value)) for peer in peers],
            [Message(peer, tensor) for peer, tensor in zip(peers, tensors, strict=True)],
        )
        if number:
            exchange.finish()
    exchange.finish()
    exchange.settle()
    return [int(sum(tensor[0].item() for tensor in tensors)) for tensors in received]


def test_batches_keep_their_order(cluster: Cluster) -> None:
    size, batches = 3, 20
    for rank, sums in enumerate(cluster.run(exchange_batches, size, batches)):
        others = sum(range(size)) - rank
        assert sums == [100 * number * (size - 1) + others for number in range(batches)]
