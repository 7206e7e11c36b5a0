"""What is kept of an interrupted step, and who computes the rest of it: as values in a plan.

A failure ends the step in flight for all. A healthy replica whose gradients no other replica's have
come into keeps them, with the samples they stand for, and the next generation computes the
remaining samples only. These go to all replicas, also to those that keep some, so that all are done
early. Every sample of the batch is thereby behind the gradient of one replica, and behind it once.

Pure. Which replicas can keep their gradients is found by `elastic.kept_gradients`. Samples are
named by their indices in the global batch of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from elastic.apportion import apportion
from ntp.ranges import Range, deal, subtract


@dataclass(frozen=True, slots=True)
class Kept:
    """Gradients of a replica, computed under the plan of `generation` over `samples`."""

    replica: int
    generation: int
    samples: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Salvage:
    """How the first step of a generation goes on from what is `kept` of it.

    `shares` are the samples that each replica computes beside, in the layout's order; 0 for one
    that computes nothing in this step.
    """

    kept: tuple[Kept, ...]
    shares: tuple[int, ...]

    @property
    def kept_samples(self) -> int:
        """Samples that need not be computed again."""
        return sum(count(each.samples) for each in self.kept)

    def is_whole(self, batch: int) -> bool:
        """Whether kept and computed samples are those of a batch, each of them once."""
        kept = sorted(chain.from_iterable(each.samples for each in self.kept))
        disjoint = all(one.stop <= other.start for one, other in pairwise(kept))
        return (
            disjoint
            and (not kept or kept[-1].stop <= batch)
            and min(self.shares, default=0) >= 0
            and self.kept_samples + sum(self.shares) == batch
        )

    def fresh(self, batch: int) -> list[tuple[Range, ...]]:
        """The samples that each replica computes, in the layout's order."""
        kept = chain.from_iterable(each.samples for each in self.kept)
        return list(deal(subtract(Range(0, batch), kept), self.shares))


@dataclass(frozen=True, slots=True)
class StepShare:
    """The samples behind one replica's gradient of a step: `kept`, and `fresh` ones to compute."""

    kept: tuple[Range, ...]
    fresh: tuple[Range, ...]


def salvage(kept: Sequence[Kept], batch: int, costs: Sequence[float], least: int) -> Salvage | None:
    """The rest of a batch split so that all are done early; None if nothing is kept.

    `costs` are those of a sample for each replica; one that computes any takes at least `least`.
    """
    if not kept:
        return None
    rest = batch - sum(count(each.samples) for each in kept)
    return Salvage(tuple(kept), split_rest(rest, costs, least))


def split_rest(total: int, costs: Sequence[float], least: int) -> tuple[int, ...]:
    """Shares of `total` samples, each 0 or at least `least`, whose largest ``share * cost`` is low.

    It is the lowest there is where `least` is 1. Raises ValueError for a total between 0 and
    `least`, which is no sum of such shares.
    """
    if 0 < total < least:
        raise ValueError(f"{total} samples cannot be split into shares of {least} or more")
    by_cost = sorted(range(len(costs)), key=costs.__getitem__)
    bearers = sorted(by_cost[: max(1, total // least)])
    while True:
        shares = apportion(total, [costs[bearer] for bearer in bearers], 0)
        short = [b for b, share in zip(bearers, shares, strict=True) if 0 < share < least]
        if not short:
            share_of = dict(zip(bearers, shares, strict=True))
            return tuple(share_of.get(bearer, 0) for bearer in range(len(costs)))
        bearers.remove(max(short, key=costs.__getitem__))


def count(samples: Iterable[Range]) -> int:
    """How many samples these are."""
    return sum(map(len, samples))
