"""Gradient sync between replicas of unlike degrees: runs a SyncPlan over real groups.

Per home slot h the ranks that hold h all-reduce its home atoms. Where a replica lost h, the slots
that adopted pieces of it send those to proxies before the all-reduce and get the sums back after
it (design of nonuniform tensor parallelism: the replica is a leaf of h's group). Replicated tensors
are reduced once over the world, so that all slots of all replicas receive the same bits. One slot
of each replica contributes to them; to those whose gradients are partial sums, every slot does.

Gradients are summed here, never averaged: the optimizer divides by the global number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from ntp.geometry import SlotRef
from ntp.local_shards import AtomRange, LocalShards
from ntp.p2p import Message, exchange
from ntp.sync_plan import LeafPiece, SyncPlan

TO_PROXY_TAG = 2
TO_HOLDER_TAG = 3


@dataclass(frozen=True, slots=True)
class SyncGroups:
    """Groups of one worker: all ranks, and those that share its home slot (None if it is alone)."""

    world: dist.ProcessGroup
    home: dist.ProcessGroup | None


class GradientSync:
    """Sums the gradients of one slot with those of all replicas, in place."""

    def __init__(
        self,
        plan: SyncPlan,
        slot: SlotRef,
        ranks: Mapping[SlotRef, int],
        shards: LocalShards,
        groups: SyncGroups,
        contributes_replicated: bool,
    ) -> None:
        pieces = [piece for home in plan.homes for piece in home.pieces]
        self._shards = shards
        self._groups = groups
        self._contributes_replicated = contributes_replicated
        self._held = _by_rank([p for p in pieces if p.holder == slot], lambda p: ranks[p.proxy])
        self._proxied = _by_rank([p for p in pieces if p.proxy == slot], lambda p: ranks[p.holder])

    def run(self, gradients: torch.Tensor, between: Callable[[], None] = lambda: None) -> None:
        """Replace `gradients` (flat, local) by the sums over all replicas.

        `between` is called once when some of the exchanges are done and some are not. Raises
        RuntimeError when a peer is lost.
        """
        self._reduce_replicated(gradients)
        between()
        self._to_proxies(gradients)
        if self._groups.home is not None:
            home = self._shards.pack_home(gradients)
            dist.all_reduce(home, group=self._groups.home)
            self._shards.unpack_home(gradients, home)
        self._to_holders(gradients)

    def _reduce_replicated(self, gradients: torch.Tensor) -> None:
        replicated = gradients[self._shards.sharded :]
        if not self._contributes_replicated:
            replicated[self._shards.partial :].zero_()
        dist.all_reduce(replicated, group=self._groups.world)

    def _to_proxies(self, gradients: torch.Tensor) -> None:
        sends = [Message(rank, self._shards.pack(gradients, ranges)) for rank, ranges in self._held]
        receives = [
            Message(rank, gradients.new_empty(self._shards.elements(ranges)))
            for rank, ranges in self._proxied
        ]
        exchange(self._groups.world, sends, receives, TO_PROXY_TAG)
        # In order of rank, so that the sum has one rounding whatever arrived first.
        for (_, ranges), message in zip(self._proxied, receives, strict=True):
            self._shards.add(gradients, ranges, message.tensor)

    def _to_holders(self, gradients: torch.Tensor) -> None:
        sends = [
            Message(rank, self._shards.pack(gradients, ranges)) for rank, ranges in self._proxied
        ]
        receives = [
            Message(rank, gradients.new_empty(self._shards.elements(ranges)))
            for rank, ranges in self._held
        ]
        exchange(self._groups.world, sends, receives, TO_HOLDER_TAG)
        for (_, ranges), message in zip(self._held, receives, strict=True):
            self._shards.unpack(gradients, ranges, message.tensor)


def _by_rank(
    pieces: list[LeafPiece], rank: Callable[[LeafPiece], int]
) -> list[tuple[int, list[AtomRange]]]:
    """Pieces by the other end's rank, each end listing them in the same order."""
    ordered = sorted(pieces, key=lambda p: (rank(p), p.home, p.axis, p.atoms.start))
    return [
        (peer, [(piece.axis, piece.atoms) for piece in group])
        for peer, group in groupby(ordered, rank)
    ]
