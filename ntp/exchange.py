"""Exchange of tensors between pairs of ranks.

Messages of one exchange are matched by sender, receiver and tag, in the order in which both sides
list them; both derive that order from the same plan. Everything is posted before anything is waited
for, so an exchange cannot deadlock whatever the pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Message:
    """A contiguous tensor to or from `peer` (a rank of the group)."""

    peer: int
    tensor: torch.Tensor


def exchange(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message], tag: int
) -> None:
    """Send and fill all messages; returns when all are done.

    Raises RuntimeError when a peer's connection breaks or the group's timeout passes.
    """
    works: list[Any] = []
    try:
        works += post(group, sends, receives, tag)
        while works:
            works.pop(0).wait()
    finally:
        # The traceback of an error would keep what is not done, and with it the tensors.
        works.clear()


def post(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message], tag: int
) -> list[Any]:
    """Start all messages; returns what to wait for: receives, then sends, or one for them all.

    Raises RuntimeError when a peer's connection is broken.
    """
    messages = [*receives, *sends]
    if not messages:
        return []
    device = messages[0].tensor.device
    if device.type == "cuda":
        # NCCL runs point-to-point operations of one stream in order, and would deadlock on two
        # ranks that both receive first, unless they are one group call.
        group._start_coalescing(device)
    works = [group.recv([m.tensor], m.peer, tag) for m in receives]
    works += [group.send([m.tensor], m.peer, tag) for m in sends]
    return [group._end_coalescing(device)] if device.type == "cuda" else works
