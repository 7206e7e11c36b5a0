"""What an agent has to tell of its workers.

Pure. Words of the past are gone once the next are written, so each worker's are summed up, for a
controller that did not hear them. Whether the node is stalled is part of the news for as long as it
lasts, and news itself when it begins and when it ends.
"""

from __future__ import annotations

from elastic.messages import NodeProgress, WorkerStatus
from elastic.topology import Member
from elastic.worker_status import Word, fresh_status, summed_up
from health.liveness import Stalled


class NodeNews:
    """The news of `node` between one NodeProgress and the next."""

    def __init__(self, node: int) -> None:
        self._node = node
        self._notes: list[Word] = []
        self._statuses: dict[Member, WorkerStatus] = {}
        self._stall: Stalled | None = None
        self._stall_is_told = True

    @property
    def committed(self) -> int:
        """The last step that one of the workers committed; -1 if none did."""
        return max((status.committed for status in self._statuses.values()), default=-1)

    @property
    def is_any(self) -> bool:
        """Whether there is something that was not told."""
        return bool(self._notes) or not self._stall_is_told

    def hear(self, member: Member, word: Word) -> None:
        """A worker said this."""
        self._notes.append(word)
        known = self._statuses.get(member, fresh_status(member))
        self._statuses[member] = summed_up(known, word)

    def forget(self, member: Member) -> None:
        """The worker is gone."""
        self._statuses.pop(member, None)

    def judge(self, stall: Stalled | None) -> bool:
        """The node is stalled, or not; returns whether that is to be told at once."""
        if _generation(stall) != _generation(self._stall):
            self._stall_is_told = False
        self._stall = stall
        return not self._stall_is_told

    def tell(self) -> NodeProgress | None:
        """All that was not told yet; None: nothing."""
        if not self.is_any:
            return None
        notes, self._notes, self._stall_is_told = tuple(self._notes), [], True
        return NodeProgress(self._node, notes, tuple(self._statuses.values()), self._stall)


def _generation(stall: Stalled | None) -> int:
    return stall.generation if stall is not None else 0
