"""Marked exchanges over real groups: what arrives, and what a lost peer leaves behind."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from dense import SHAPE, layout_of
from harness import Cluster, Rank

from ntp.exchange import Message
from ntp.marked_exchange import MarkedExchange
from ntp.process_groups import ProcessGroups, is_connection_error

BIG = 64 * 1024 * 1024
"""Elements of a message that takes far longer to travel than a process takes to kill itself."""


def joined(rank: Rank) -> ProcessGroups:
    layout = layout_of(SHAPE, 2, *[(0,)] * rank.size)
    groups = rank.groups()
    rank.adopt(groups, layout, layout.slots()[rank.rank])
    return groups


def everyone_to_everyone(rank: Rank) -> list[tuple[list[float], float]]:
    """Several messages of several sizes between any two ranks, in two exchanges at once.

    Returns what was in each message when its mark was there, and what its sender had put there.
    """
    groups = joined(rank)
    others = [peer for peer in range(rank.size) if peer != rank.rank]
    exchanges, arriving = [], []
    for tag in (11, 12):
        sends, receives = [], []
        for peer in others:
            for size in (1, 1000, 100_000):
                value = tag * 1000 + size
                sends.append(Message(peer, torch.full((size,), value + 10.0 * rank.rank)))
                receives.append(Message(peer, torch.empty(size)))
                arriving.append((receives[-1].tensor, value + 10.0 * peer))
        exchanges.append(MarkedExchange(groups.world, sends, receives, tag))
    for exchange in reversed(exchanges):
        exchange.receive()
    arrived = [(tensor.unique().tolist(), value) for tensor, value in arriving]
    for exchange in exchanges:
        exchange.send()
    return arrived


def test_all_messages_are_there_when_their_marks_are(cluster: Cluster) -> None:
    for arrived in cluster.run(everyone_to_everyone, 3):
        assert len(arrived) == 2 * 2 * 3
        for found, value in arrived:
            assert found == [value]


def sender_dies(rank: Rank) -> tuple[bool, str]:
    """Whether what the receiver is told is a lost connection, and its words."""
    groups = joined(rank)
    tensor = torch.zeros(BIG)
    if rank.rank == 0:
        MarkedExchange(groups.world, [Message(1, tensor)], [], 11)
        os.kill(os.getpid(), signal.SIGKILL)
    # The connection may be gone before the receive is posted.
    with pytest.raises(RuntimeError) as caught:
        MarkedExchange(groups.world, [], [Message(0, tensor)], 11).receive()
    return is_connection_error(caught.value), str(caught.value)


def test_a_sender_lost_in_the_middle_of_a_message_is_noticed(cluster: Cluster) -> None:
    _, (lost_connection, words) = cluster.run(sender_dies, 2, dies={0})
    assert lost_connection, words
    assert "imed out" not in words
