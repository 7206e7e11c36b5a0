"""Bytes per step of a gradient sync: as planned, of a uniform job, and in Megatron's scheme.

Every slot sends as much as it receives, so one number says both. No slot can finish before the
busiest one, whose bytes are what schemes are compared by. An all-reduce is taken to be a ring: each
of n ranks sends 2 (n - 1) / n of its data. Only sharded tensors are counted, since replicated ones
are summed alike in all schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from ntp.atoms import AtomSizes
from ntp.geometry import ParallelLayout, SlotRef
from ntp.sync_exchange import LeafPiece, exchange_of
from ntp.sync_plan import SyncPlan


@dataclass(frozen=True, slots=True)
class MegatronTraffic:
    """Bytes that the busiest slot of Megatron's scheme sends per step.

    `between` replicas, in the all-reduce; `within` its replica, to return sums to spare ranks.
    """

    between: int
    within: int


def ring_bytes(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends in order to all-reduce `size` bytes, rounded up."""
    return -(-2 * (ranks - 1) * size // ranks)


def sync_bytes(
    plan: SyncPlan,
    layout: ParallelLayout,
    buckets: Sequence[AtomSizes],
    bytes_per_element: int,
    slots: Iterable[SlotRef] | None = None,
) -> dict[SlotRef, int]:
    """Bytes that each of `slots` (by default all) sends per step; it receives as many.

    `buckets` are the sizes of the atoms in the bucket of each turn; in a sync of everything at once
    there is one bucket, with the model's sizes.
    """
    traffic: dict[SlotRef, int] = {}
    for slot in layout.slots() if slots is None else slots:
        members = plan.homes[slot.slot].members
        ring = pieces = 0
        for turn, sizes in enumerate(buckets):
            exchange = exchange_of(plan, layout, slot, turn)
            if slot in members:
                ring += ring_bytes(
                    _home(layout, slot.slot, sizes) * bytes_per_element, len(members)
                )
            pieces += _elements(chain(exchange.held, exchange.proxied), sizes) * bytes_per_element
        # A piece is sent by its holder and, summed, by its proxy: a slot sends all it has part in.
        traffic[slot] = ring + pieces
    return traffic


def uniform_ring_bytes(layout: ParallelLayout, sizes: AtomSizes, bytes_per_element: int) -> int:
    """Bytes that the busiest slot would send per step if all replicas had their full degree."""
    size = max(_home(layout, home, sizes) for home in range(layout.tp_base))
    return ring_bytes(size * bytes_per_element, len(layout.replicas))


def megatron_bytes(
    layout: ParallelLayout, sizes: AtomSizes, bytes_per_element: int
) -> MegatronTraffic:
    """What Megatron's scheme would send, with the reduced degree of the most reduced replica.

    There all replicas reduce at that degree: the spare ranks of a healthy replica send their shards
    to its core ranks, these all-reduce the core ranks' shares, and send the spares' sums back.
    """
    degree = min(replica.degree for replica in layout.replicas)
    core = spare = 0
    for axis, homes in layout.homes:
        # Shares differ where the degree does not divide; the first core rank's is the biggest.
        share = -(-homes[-1].stop // degree)
        core += share * sizes.of(axis)
        spare += (share - len(homes[0])) * sizes.of(axis)
    between = ring_bytes(core * bytes_per_element, len(layout.replicas))
    return MegatronTraffic(between, spare * bytes_per_element)


def _home(layout: ParallelLayout, slot: int, sizes: AtomSizes) -> int:
    return sum(len(homes[slot]) * sizes.of(axis) for axis, homes in layout.homes)


def _elements(pieces: Iterable[LeafPiece], sizes: AtomSizes) -> int:
    return sum(len(piece.atoms) * sizes.of(piece.axis) for piece in pieces)
