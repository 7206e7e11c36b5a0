"""Whether everybody in a job waits for everybody.

Pure. A node whose workers all wait for others cannot know who holds them up: it says that it is
stalled, and in which generation (`health.liveness`). As long as any node is not stalled that has a
worker who is awaited, somebody there computes, whose own deadlines are watched, or its agent is
gone, which its lease tells. If all of them are, a message was lost without a connection that broke,
and nothing but a timeout of the backend would end the wait.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic.topology import Member
from health.liveness import Stalled


class Stalls:
    """Which nodes are stalled in `generation`; none ever is in generation 0."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._stalled: dict[int, Stalled] = {}

    def take(self, node: int, stall: Stalled | None) -> None:
        """What `node` says of itself now. A stall in an earlier generation is over."""
        if stall is not None and stall.generation == self._generation:
            self._stalled[node] = stall
        else:
            self._stalled.pop(node, None)

    def cause(self, awaited: Iterable[Member]) -> str | None:
        """Why none of `awaited` goes on, naming the longest wait; None: one of them may."""
        if not self._stalled:
            return None
        stalls = []
        for member in awaited:
            stall = self._stalled.get(member.device.node)
            if stall is None:
                return None
            stalls.append(stall)
        if not stalls:
            return None
        longest = max(stalls, key=lambda stall: stall.waiting_seconds)
        return (
            f"everybody waits for others, {longest.device} in {longest.activity} of step "
            f"{longest.step} for {longest.waiting_seconds:.3g} s, more than "
            f"{longest.deadline.seconds:.3g} s ({longest.deadline.basis})"
        )
