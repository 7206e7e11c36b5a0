"""An all-reduce of a small tensor over gloo, through the first rank of the group.

Gloo's ring has 2(n-1) dependent rounds, which cost milliseconds each on a busy host. Here the first
rank adds what the others send it, in order of rank, and returns the sum.

Nobody waits for a message that may be partly through, which gloo would forget with its connection
(`ntp.marked_exchange`): a mark follows a part or a sum that does not leave as a whole, and whoever
sent one waits for it when an answer shows that it was received. For a part that is the sum; for a
sum it is the receiver's part of the next all-reduce. Until then the sum is on its way, so it is
sent from a copy. It is not made of MarkedExchanges, as those keep an account of each wait, and here
one is kept of them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ntp.marked_exchange import WHOLE_BYTES

STAR_TAG = 1 << 20
"""Tag of the parts, followed by that of the sums; the exchanges of `ntp.exchange` stay below it."""
MARKS = 2
"""Added to the tag of a message for that of its mark."""


def star_all_reduce(
    group: Any, tensor: torch.Tensor, operation: Any, timeout: timedelta, unanswered: list[Any]
) -> None:
    """Reduce a contiguous `tensor` in place over `group`, a gloo process group.

    `timeout` bounds the wait for each message. `unanswered` is what the group keeps, from one
    all-reduce to the next, of what the first rank sent. Raises RuntimeError when a peer is lost.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    long = tensor.numel() * tensor.element_size() > WHOLE_BYTES
    if rank:
        given = _send(group, tensor, 0, STAR_TAG, long)
        # The sum comes when all of the part has left, so it may take its place.
        _wait(_receive(group, tensor, 0, STAR_TAG + 1, long), timeout)
        _wait(given, timeout)
        return
    parts = [torch.empty_like(tensor) for _ in range(size - 1)]
    pending = [_receive(group, part, peer, STAR_TAG, long) for peer, part in enumerate(parts, 1)]
    for works, part in zip(pending, parts, strict=True):
        _wait(works, timeout)
        if operation == dist.ReduceOp.MAX:
            torch.maximum(tensor, part, out=tensor)
        else:
            assert operation == dist.ReduceOp.SUM, operation
            tensor += part
    _wait(unanswered, timeout)
    unanswered.clear()
    answer = tensor.clone() if long else tensor
    sums = [
        work for peer in range(1, size) for work in _send(group, answer, peer, STAR_TAG + 1, long)
    ]
    if long:
        unanswered += sums
    else:
        _wait(sums, timeout)


def _send(group: Any, tensor: torch.Tensor, peer: int, tag: int, marked: bool) -> list[Any]:
    works = [group.send([tensor], peer, tag)]
    if marked:
        works.append(group.send([_mark()], peer, tag + MARKS))
    return works


def _receive(group: Any, tensor: torch.Tensor, peer: int, tag: int, marked: bool) -> list[Any]:
    """In the order in which to wait: the message is there when its mark is."""
    works = [group.recv([tensor], peer, tag)]
    if marked:
        works.insert(0, group.recv([_mark()], peer, tag + MARKS))
    return works


def _mark() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _wait(works: Iterable[Any], timeout: timedelta) -> None:
    for work in works:
        work.wait(timeout)
