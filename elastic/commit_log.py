"""Which step each worker of a generation committed last.

Pure. What is asked with every report, how far the job is and whether it is done, is kept up to date
rather than searched for: there may be a hundred thousand workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from elastic.topology import Member


class CommitLog:
    """Begins with the `steps` that are known (-1: none) of the `placed` workers.

    `steps` has the last one of each worker, `newest` that of all, and `behind` are those of the
    placed that have yet to commit step `last`.
    """

    def __init__(self, placed: Iterable[Member], steps: Mapping[Member, int], last: int) -> None:
        self.steps = {member: steps[member] for member in placed if member in steps}
        self.newest = max(self.steps.values(), default=-1)
        self.behind = {member for member in placed if self.steps.get(member, -1) < last}
        self._last = last

    def take(self, member: Member, step: int) -> None:
        """`member` committed `step`, if not more."""
        if step <= self.steps.get(member, -1):
            return
        self.steps[member] = step
        self.newest = max(self.newest, step)
        if step >= self._last:
            self.behind.discard(member)
