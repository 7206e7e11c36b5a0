"""Whole samples over replicas of unlike speed, so that the slowest is done as early as can be.

A step takes as long as its slowest replica, so the split that matters is the one that minimises
``max(share * cost)``. Giving the samples out one by one, each to the replica that would be done
with it first, does exactly that. A replica takes at least one sample, as it takes part in every
step; only of a step that was begun before may there be nothing left for it (`elastic.salvage`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def apportion(total: int, costs: Sequence[float], least: int = 1) -> tuple[int, ...]:
    """Shares of `total` samples that minimise the largest ``share * cost``; each at least `least`.

    `costs` are the times that the bearers take for one sample, in any unit; with equal costs the
    shares differ by at most one. Ties go to the earlier bearer. Shares add up to `total`; the cost
    of the computation does not depend on it. Raises ValueError if there are no bearers, fewer
    samples than bearers, or a cost is not positive.
    """
    if not costs or len(costs) * least > total:
        raise ValueError(
            f"{total} samples cannot give each of {len(costs)} replicas {least} or more; use 1 to "
            f"{total // max(1, least)} replicas, or raise the global batch size"
        )
    if not all(cost > 0 for cost in costs):
        raise ValueError(f"costs {tuple(costs)} must all be above 0")
    # Whatever is done by some moment comes first in any order of giving out. At this moment it is
    # never more than the total, as max(least, floor(x)) <= least + x, and nearly all of it.
    moment = (total - least * len(costs)) / sum(1 / cost for cost in costs)
    shares = [max(least, int(moment / cost)) for cost in costs]
    queue = [((shares[bearer] + 1) * cost, bearer) for bearer, cost in enumerate(costs)]
    heapq.heapify(queue)
    for _ in range(total - sum(shares)):
        _, bearer = queue[0]
        shares[bearer] += 1
        heapq.heapreplace(queue, ((shares[bearer] + 1) * costs[bearer], bearer))
    return tuple(shares)
