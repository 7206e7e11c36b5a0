"""Whether everybody in a job waits for everybody.

Pure. A node whose workers all wait for others cannot know who holds them up: it says that it is
stalled, and in which generation (`health.liveness`). As long as any node is not stalled that has a
worker who is awaited, somebody there computes, whose own deadlines are watched, or its agent is
gone, which its lease tells. If all of them are, a message was lost without a connection that broke,
and nothing but a timeout of the backend would end the wait.

A node goes on before it can say so, and who has committed the last step is awaited no more. So the
nodes must have agreed for longer than a word is under way.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic.topology import Member
from health.liveness import Stalled


class Stalls:
    """What nodes say of themselves, and whether all are stalled in the generation that is watched.

    `now` is a reading of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._stalled: dict[int, Stalled] = {}
        self._watched = 0
        self._agreed_at: float | None = None

    def watch(self, generation: int) -> None:
        """From here on stalls in `generation` count, also those told before; in 0 nobody ever is.

        After an outage of the store all words come at once, in any order: a stall behind the first
        steps of a generation before somebody's word that its groups are built.
        """
        self._watched = generation
        self._agreed_at = None

    def take(self, node: int, stall: Stalled | None) -> None:
        """Whether `node` is stalled now."""
        if stall is not None:
            self._stalled[node] = stall
        else:
            self._stalled.pop(node, None)

    def postpone(self, seconds: float) -> None:
        """Nobody could say anything for so long."""
        if self._agreed_at is not None:
            self._agreed_at += seconds

    def cause(self, awaited: Iterable[Member], now: float, patience: float) -> str | None:
        """Why none of `awaited` goes on, naming the longest wait.

        None: one of them may, or not all have been found waiting for `patience` seconds.
        """
        longest = self._longest(awaited)
        if longest is None:
            self._agreed_at = None
            return None
        if self._agreed_at is None:
            self._agreed_at = now
        if now - self._agreed_at < patience:
            return None
        return (
            f"everybody waits for others, {longest.device} in {longest.activity} of step "
            f"{longest.step} for {longest.waiting_seconds:.3g} s, more than "
            f"{longest.deadline.seconds:.3g} s ({longest.deadline.basis})"
        )

    def _longest(self, awaited: Iterable[Member]) -> Stalled | None:
        """The longest wait; None: one of `awaited` may go on, or nobody is awaited."""
        if not self._watched or not self._stalled:
            return None
        stalls = []
        for member in awaited:
            stall = self._stalled.get(member.device.node)
            if stall is None or stall.generation != self._watched:
                return None
            stalls.append(stall)
        return max(stalls, key=lambda stall: stall.waiting_seconds, default=None)
