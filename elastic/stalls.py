"""Whether everybody in a job waits for everybody.

Pure. A node whose workers all wait for others cannot know who holds them up: it says that it is
stalled, and in which generation (`health.liveness`). As long as any node with a placed worker is
not stalled, somebody there computes, whose own deadlines are watched, or its agent is gone, which
its lease tells. If all of them are, a message was lost without a connection that broke, and nothing
but a timeout of the backend would end the wait.

A node whose workers have stopped for an announcement is not asked any more.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic.topology import Member
from health.liveness import Stalled


class Stalls:
    """Which nodes with workers in `placed` are stalled in `generation`, the one of their plan."""

    def __init__(self, generation: int, placed: Iterable[Member]) -> None:
        self._generation = generation
        self._nodes = {member.device.node for member in placed}
        self._stalled: dict[int, Stalled] = {}

    def take(self, node: int, stall: Stalled | None) -> None:
        """What `node` says of itself now. A stall in an earlier generation is over."""
        if node in self._nodes and stall is not None and stall.generation == self._generation:
            self._stalled[node] = stall
        else:
            self._stalled.pop(node, None)

    def drop(self, node: int) -> None:
        """Nobody on `node` is waited for any more."""
        self._nodes.discard(node)
        self._stalled.pop(node, None)

    def cause(self) -> str | None:
        """Why nothing goes on, naming the longest wait; None: somebody may go on."""
        if not self._nodes or len(self._stalled) < len(self._nodes):
            return None
        longest = max(self._stalled.values(), key=lambda stall: stall.waiting_seconds)
        return (
            f"everybody waits for others, {longest.device} in {longest.activity} of step "
            f"{longest.step} for {longest.waiting_seconds:.3g} s, more than "
            f"{longest.deadline.seconds:.3g} s ({longest.deadline.basis})"
        )


def nobody() -> Stalls:
    """No node is watched."""
    return Stalls(0, ())
