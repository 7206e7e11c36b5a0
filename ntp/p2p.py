"""Exchange of tensors between pairs of ranks, and the run of a reshard plan on top of it.

Messages of one exchange are matched by sender, receiver and tag, in the order in which both sides
list them; both derive that order from the same plan. Everything is posted before anything is waited
for, so an exchange cannot deadlock whatever the pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from ntp.geometry import ParallelLayout, SlotRef
from ntp.local_shards import AtomRange, LocalShards
from ntp.reshard_plan import Move, ReshardPlan, kept_ranges

RESHARD_TAG = 1


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
    messages = [*receives, *sends]
    if not messages:
        return
    device = messages[0].tensor.device
    if device.type == "cuda":
        # NCCL runs point-to-point operations of one stream in order, and would deadlock on two
        # ranks that both receive first, unless they are one group call.
        group._start_coalescing(device)
    pending = [group.recv([m.tensor], m.peer, tag) for m in receives]
    pending += [group.send([m.tensor], m.peer, tag) for m in sends]
    if device.type == "cuda":
        pending = [group._end_coalescing(device)]
    for work in pending:
        work.wait()


def reshard(
    plan: ReshardPlan,
    slot: SlotRef,
    ranks: Mapping[SlotRef, int],
    group: dist.ProcessGroup,
    source: tuple[LocalShards, Sequence[torch.Tensor]] | None,
    target: tuple[LocalShards, Sequence[torch.Tensor]],
    kept: Sequence[AtomRange],
) -> int:
    """Run `plan` for one slot; returns the bytes received.

    `source` is what the slot held before (None in a fresh process) and `target` what it shall hold:
    each a map with the flat buffers it describes, the same kinds of state in the same order.
    `kept` ranges are copied locally. All moves between two ranks travel as one message.
    """
    outgoing = _by_peer([move for move in plan.moves if move.source == slot], "target")
    incoming = _by_peer([move for move in plan.moves if move.target == slot], "source")
    sends = []
    for peer, moves in outgoing:
        assert source is not None, "a fresh process holds nothing to send"
        sends.append(Message(ranks[peer], _pack(source, _ranges(moves))))
    receives = []
    for _, moves in incoming:
        shards, buffers = target
        size = shards.elements(_ranges(moves)) * len(buffers)
        receives.append(Message(ranks[moves[0].source], buffers[0].new_empty(size)))
    exchange(group, sends, receives, RESHARD_TAG)
    if source is not None:
        _unpack(target, kept, _pack(source, kept))
    for (_, moves), message in zip(incoming, receives, strict=True):
        _unpack(target, _ranges(moves), message.tensor)
    return sum(message.tensor.nbytes for message in receives)


def ranges_kept(source: ParallelLayout, target: ParallelLayout, slot: SlotRef) -> list[AtomRange]:
    """What a surviving slot keeps across a change of layout: its common atoms, and all replicated
    tensors."""
    return [*kept_ranges(source, target, slot), (None, None)]


def _by_peer(moves: Sequence[Move], end: str) -> list[tuple[SlotRef, list[Move]]]:
    ordered = sorted(moves, key=lambda move: getattr(move, end))
    return [(peer, list(group)) for peer, group in groupby(ordered, lambda m: getattr(m, end))]


def _ranges(moves: Sequence[Move]) -> list[AtomRange]:
    return [(move.axis, move.atoms) for move in moves]


def _pack(
    state: tuple[LocalShards, Sequence[torch.Tensor]], ranges: Sequence[AtomRange]
) -> torch.Tensor:
    shards, buffers = state
    return torch.cat([shards.pack(buffer, ranges) for buffer in buffers])


def _unpack(
    state: tuple[LocalShards, Sequence[torch.Tensor]],
    ranges: Sequence[AtomRange],
    packed: torch.Tensor,
) -> None:
    shards, buffers = state
    for buffer, part in zip(buffers, packed.chunk(len(buffers)), strict=True):
        shards.unpack(buffer, ranges, part)
