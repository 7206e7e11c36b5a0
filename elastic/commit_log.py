"""Which step each worker of a generation committed last.

Pure. What is asked with every report, how far the job is and whether it is done, is kept up to date
rather than searched for: there may be a hundred thousand workers.
"""

from __future__ import annotations

from collections.abc import Iterator

from elastic.topology import Member


class CommitLog:
    """Begins with the `steps` that are known of the `placed` workers (-1: none yet).

    `steps` has the last one of each worker, and `newest` that of all. The job ends with step
    `last`.
    """

    def __init__(self, placed: frozenset[Member], steps: dict[Member, int], last: int) -> None:
        self.steps = steps
        self.newest = max(steps.values(), default=-1)
        self._placed = placed
        self._last = last
        self._done = sum(step >= last for step in steps.values()) if self.newest >= last else 0

    @property
    def complete(self) -> bool:
        """Whether all that are placed committed the last step."""
        return 0 < len(self._placed) == self._done

    @property
    def behind(self) -> Iterator[Member]:
        """Who is placed and did not commit the last step yet, each looked at in its turn."""
        return (m for m in self._placed if self.steps.get(m, -1) < self._last)

    def take(self, member: Member, step: int) -> None:
        """`member` committed `step`, if not more. Who has no place does not count."""
        known = self.steps.get(member, -1)
        if step <= known or member not in self._placed:
            return
        self.steps[member] = step
        self.newest = max(self.newest, step)
        self._done += known < self._last <= step
