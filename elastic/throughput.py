"""How fast the job is with its replicas at certain degrees, before anybody is placed.

Pure. A step takes as long as its slowest replica, and a replica's sample as long as the work of its
most loaded slot (`elastic.workload`). Atoms are spread evenly, so the degree tells that work, and
replicas of one degree and pace are alike: a *crew*. The cost of a question depends on the number of
kinds of crews, not on that of replicas, and all times are whole numbers, so that ties are ties.

Under `split_batch_by: speed` a replica's measured pace counts, in tenths of the typical one: state
should not move because a measurement is noisy.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from elastic.job_shape import JobShape
from elastic.pace import Pace
from elastic.workload import SplitBatchBy, replica_work, replica_works
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import ParallelLayout

TYPICAL = 10
"""Pace of a typical replica; one of 20 takes twice as long for the same work."""


class Crew(NamedTuple):
    """A replica as the planner weighs it.

    `degree`: active slots, 0 if it is left out. `pace`: see TYPICAL. `held`: the degree at which
    its survivors hold their state; 0 if nobody is missing, nobody holds any, or memory is
    unlimited. `nodes`: where it is, if the placement must respect nodes; none otherwise.
    `wounded`: it lacks a survivor.
    """

    degree: int
    pace: int = TYPICAL
    held: int = 0
    nodes: tuple[int, ...] = ()
    wounded: bool = False


Score = tuple[int, int, float]
"""Larger is better: whether there are two copies of the state (`copies`), minus the time of a step,
samples a second if the batch were endless."""


def copies(crews: Mapping[Crew, int]) -> int:
    """Replicas at work, at most 2: the last one is what all others are restored from, so a second
    is worth more than the throughput of doing without it."""
    return min(2, sum(count for crew, count in crews.items() if crew.degree))


def fullest_slot(counts: AtomCounts, sizes: AtomSizes, degree: int) -> int:
    """Elements of sharded tensors that the fullest of `degree` slots holds."""
    return sum(-(-counts.of(axis) // degree) * sizes.of(axis) for axis in counts.axes)


def makespan(total: int, crews: Sequence[tuple[int, int]], least: int) -> int | None:
    """Time until `total` samples are done, by crews given as (time of a sample, replicas).

    Each replica takes at least `least` samples, and the split is the best there is, that of
    `elastic.apportion`. None if there are fewer samples than that takes, or no replica.
    """
    bearers = sum(count for _, count in crews)
    if not bearers or bearers * least > total:
        return None
    moment = (total - least * bearers) / sum(count / cost for cost, count in crews)
    shares = [max(least, int(moment / cost)) for cost, _ in crews]
    given = sum(share * count for share, (_, count) in zip(shares, crews, strict=True))
    end = max(share * cost for share, (cost, _) in zip(shares, crews, strict=True))
    queue = [
        ((share + 1) * cost, cost, count)
        for share, (cost, count) in zip(shares, crews, strict=True)
    ]
    heapq.heapify(queue)
    while given < total:
        done, cost, count = queue[0]
        end, given = max(end, done), given + count
        heapq.heapreplace(queue, (done + cost, cost, count))
    return end


@dataclass(frozen=True, slots=True)
class ThroughputModel:
    """Answers how long a step takes. `works[degree]`: time of a sample at a typical pace, over
    TYPICAL; `full_step`: time of a step at full strength."""

    works: tuple[int, ...]
    batch: int
    least_share: int
    split_batch_by: SplitBatchBy
    full_step: int

    def step(self, crews: Mapping[Crew, int]) -> int | None:
        """Time of a step; None if these replicas cannot share the batch."""
        return _step(self.works, self.batch, self.least_share, self.split_batch_by, crews)

    def throughput(self, crews: Mapping[Crew, int]) -> float:
        """Samples a second relative to full strength."""
        step = self.step(crews)
        return self.full_step / step if step else 0.0

    def score(self, crews: Mapping[Crew, int]) -> Score | None:
        """For comparing; None if these replicas cannot share the batch."""
        step = self.step(crews)
        if step is None:
            return None
        rate = sum(
            n / (self.works[c.degree] * c.pace) for c, n in sorted(crews.items()) if c.degree
        )
        return copies(crews), -step, round(rate * self.full_step / self.batch, 9)


def throughput_model(shape: JobShape, paces: Mapping[int, int]) -> ThroughputModel:
    """The model of a job; `paces` are those of `relative_paces`."""
    works = tuple(
        max(fullest_slot(shape.counts, sizes, degree) for sizes in set(shape.sizes))
        for degree in range(1, shape.tensor + 1)
    )
    whole = Counter(Crew(shape.tensor, pace) for pace in paces.values())
    whole[Crew(shape.tensor)] += shape.replicas - len(paces)
    settings = ((0, *works), shape.global_batch_size, shape.least_share, shape.split_batch_by)
    full_step = _step(*settings, whole)
    assert full_step, f"{shape.global_batch_size} samples are too few for {shape.replicas} replicas"
    return ThroughputModel(*settings, full_step)


def _step(
    works: tuple[int, ...], batch: int, least: int, by: SplitBatchBy, crews: Mapping[Crew, int]
) -> int | None:
    costs = sorted((works[c.degree] * c.pace, n) for c, n in crews.items() if c.degree and n)
    if by is not SplitBatchBy.EQUAL:
        return makespan(batch, costs, least)
    replicas = sum(count for _, count in costs)
    if not replicas or replicas * least > batch:
        return None
    return -(-batch // replicas) * costs[-1][0]


def relative_paces(shape: JobShape, paces: Mapping[int, Pace]) -> dict[int, int]:
    """How long each measured replica takes for the same work; see TYPICAL."""
    if shape.split_batch_by is not SplitBatchBy.SPEED or not paces:
        return {}
    seconds = {
        replica: pace.seconds_per_sample / replica_work(pace.layout, shape.sizes)
        for replica, pace in paces.items()
    }
    typical = median(seconds.values())
    return {replica: max(1, round(TYPICAL * own / typical)) for replica, own in seconds.items()}


def planned_throughput(
    shape: JobShape, layout: ParallelLayout, split: Sequence[int], paces: Mapping[int, int]
) -> float:
    """Throughput of a layout with its batch split, relative to full strength."""
    works = replica_works(layout, shape.sizes)
    slowest = max(
        share * work * paces.get(replica.replica, TYPICAL)
        for share, work, replica in zip(split, works, layout.replicas, strict=True)
    )
    return throughput_model(shape, paces).full_step / slowest
