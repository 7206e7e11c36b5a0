"""The gradient sync of one bucket: from complete local gradients to sums over all replicas.

A generator of five steps, between which the bytes of other ranks travel:

1. holders send the pieces that other slots are proxies of;
2. proxies add the pieces, in order of rank, and members give their home part to the all-reduce;
3. the parts of the all-reduce are combined;
4. members have the sums of their home part, and proxies send the sums of their pieces back;
5. holders have the sums of their pieces.

A home that has no leaves, and a replicated bucket, has nothing to add, and its all-reduce begins in
step 1. Each step waits only for what others do in steps before it. All ranks take the steps of
their buckets in the same order, so that messages and collectives match; they take a later step only
when all ranks are sure to take the first one of every bucket (see `ntp.grad_sync`).

Nothing is copied that is contiguous: see `ntp.bundles`. A home part of a slot that adopted nothing
is one run of the gradients. Where a reduced replica's slot is a member (`ntp.sync_plan` makes few),
its home part is packed, because a collective takes a single tensor and the other members' tensor
is all of their bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from ntp.all_reduce import all_reduce
from ntp.buckets import Bucket
from ntp.bundles import Bundle, bundles_of
from ntp.exchange import Message
from ntp.geometry import SlotRef
from ntp.local_shards import LocalShards, Placement
from ntp.marked_exchange import MarkedExchange
from ntp.stable_group import StableGroup
from ntp.sync_exchange import LeafPiece, SlotExchange

TO_PROXY_TAG = 2
TO_HOLDER_TAG = 3


@dataclass(frozen=True, slots=True)
class SyncGroups:
    """Groups of one worker.

    `stage`: all ranks of its pipeline stage. `home`: those that all-reduce its home atoms; None
    where it does so with nobody.
    """

    stage: StableGroup
    home: StableGroup | None


@dataclass(frozen=True, slots=True)
class Letter:
    """A bundle that is exchanged with `peer`, a rank of the stage's group."""

    peer: int
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class BucketSync:
    """What one slot does for one bucket; bundles are views of its gradients.

    `reduced` is summed over `reducing` (both None: with nobody), at once if `at_once`, otherwise
    when `proxied` letters are added. `silent` has gradients that other slots contribute: they count
    as zero.
    """

    stage: StableGroup
    held: tuple[Letter, ...]
    proxied: tuple[Letter, ...]
    reduced: Bundle | None
    reducing: StableGroup | None
    at_once: bool
    silent: Bundle | None

    def steps(self, answers: list[MarkedExchange]) -> Iterator[None]:
        """The five steps of one sync (see module).

        After the last one this slot has its sums, but may still be answering others, in exchanges
        that are added to `answers`. Each step raises RuntimeError when a peer's connection breaks.
        Closing the generator ends what is under way; the groups are of no use afterwards.
        """
        if self.silent is not None:
            self.silent.clear()
        pieces = [letter.bundle.packed() for letter in self.held]
        rooms = [letter.bundle.room() for letter in self.proxied]
        sends, receives = _messages(self.held, pieces), _messages(self.proxied, rooms)
        given = MarkedExchange(self.stage, sends, receives, TO_PROXY_TAG)
        reduction = self._reduction(answers)
        if self.at_once:
            next(reduction, None)
        yield
        given.receive()
        for letter, room in zip(self.proxied, rooms, strict=True):
            letter.bundle.add(room)
        next(reduction, None)
        yield
        next(reduction, None)
        yield
        for _ in reduction:
            pass
        rooms = [
            letter.bundle.packed(room) for letter, room in zip(self.proxied, rooms, strict=True)
        ]
        # The sum of a piece comes back only after all of it has left, so it may take its place.
        sends, receives = _messages(self.proxied, rooms), _messages(self.held, pieces)
        answer = MarkedExchange(self.stage, sends, receives, TO_HOLDER_TAG)
        answers.append(answer)
        yield
        answer.receive()
        given.send()
        for letter, piece in zip(self.held, pieces, strict=True):
            letter.bundle.store(piece)

    def _reduction(self, answers: list[MarkedExchange]) -> Iterator[None]:
        if self.reduced is not None and self.reducing is not None:
            packed = self.reduced.packed()
            yield from all_reduce(self.reducing, packed, answers)
            self.reduced.store(packed)


def _messages(letters: Sequence[Letter], tensors: Sequence[Tensor]) -> list[Message]:
    return [Message(letter.peer, tensor) for letter, tensor in zip(letters, tensors, strict=True)]


def sharded_bucket(
    bucket: Bucket,
    shards: LocalShards,
    gradients: Tensor,
    exchange: SlotExchange,
    ranks: Mapping[SlotRef, int],
    groups: SyncGroups,
    has_leaves: bool,
) -> BucketSync:
    """The sync of a bucket of tensor-parallel tensors.

    `ranks` are those of `groups.stage`; `has_leaves`: whether the slot's home has any.
    """
    placements = _placements(bucket, shards)

    def letters(pieces: Sequence[LeafPiece], peer_of: str) -> tuple[Letter, ...]:
        def peer(piece: LeafPiece) -> int:
            return ranks[getattr(piece, peer_of)]

        # A stable sort: both ends list the pieces between them in the order of the exchange.
        return tuple(
            Letter(rank, bundle)
            for rank, group in groupby(sorted(pieces, key=peer), peer)
            for bundle in bundles_of(
                shards, gradients, [(piece.axis, piece.atoms) for piece in group], placements
            )
        )

    homes = dict(shards.home())
    home = [shards.view(gradients, p, homes[p.spec.axis]) for p in placements]
    return BucketSync(
        stage=groups.stage,
        held=letters(exchange.held, "proxy"),
        proxied=letters(exchange.proxied, "holder"),
        reduced=Bundle(home),
        reducing=groups.home,
        at_once=not has_leaves,
        silent=None,
    )


def replicated_bucket(
    bucket: Bucket, shards: LocalShards, gradients: Tensor, groups: SyncGroups, contributes: bool
) -> BucketSync:
    """The sync of a bucket of replicated tensors.

    `contributes`: whether this slot gives its replica's gradients; of those that are partial sums,
    every slot gives its own.
    """
    placements = _placements(bucket, shards)
    silent = [p for p in placements if not contributes and not p.spec.partial_gradient]
    return BucketSync(
        stage=groups.stage,
        held=(),
        proxied=(),
        reduced=Bundle([shards.tensor(gradients, p) for p in placements]),
        reducing=groups.stage,
        at_once=True,
        silent=Bundle([shards.tensor(gradients, p) for p in silent]) if silent else None,
    )


def _placements(bucket: Bucket, shards: LocalShards) -> list[Placement]:
    """The bucket's tensors in the order of the buffer."""
    return [p for p in shards.placements if p.spec.name in bucket.tensors]
