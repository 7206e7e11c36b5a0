"""Who still has to stop for a generation that was announced.

Pure. Every worker that is involved and alive answers where it stopped; one that takes too long is
fenced, after which its failure is what is waited for. If no failure explains why the generation was
announced, somebody must be gone who cannot say so: then each agent is asked to answer for itself as
well, which takes it no longer than a message, and one that does not is lost with its node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

from elastic.answers import Answers
from elastic.messages import NodeReport
from elastic.topology import Member


class Quiescence:
    """What one announcement waits for, for `patience` from `now` on; who is `lost` cannot answer.
    Times are in seconds."""

    def __init__(
        self, awaited: Iterable[Member], now: float, patience: float, lost: Iterable[Member] = ()
    ) -> None:
        # Answers are kept under the members of the plan, not under their equals in a report:
        # what is compared with the plan, and let go, is tens of thousands of them.
        self._awaited = {member: member for member in awaited}
        self.lost = set(lost)
        self.answers = Answers()
        self.patience = patience
        self._deadline = now + patience
        self._silent: set[int] = set()
        self._silence_deadline = math.inf

    def expect_agents(self, nodes: Iterable[int], deadline: float) -> None:
        """The agents of `nodes` are to say by then that they live."""
        self._silent, self._silence_deadline = set(nodes), deadline

    @property
    def awaited(self) -> Set[Member]:
        """Who is to answer yet."""
        return self._awaited.keys()

    def take(self, report: NodeReport) -> None:
        """A node's answers. Those of workers that are not awaited, or not any more, are dropped."""
        for answer in report.workers:
            member = self._awaited.pop(answer.member, None)
            if member is not None:
                self.answers.take(answer, member)
        self.hear(report.node)

    def hear(self, node: int) -> None:
        """The agent of `node` lives."""
        self._silent.discard(node)

    def drop(self, member: Member) -> None:
        """Nothing will come from `member` any more."""
        if self._awaited.pop(member, None) is not None:
            self.lost.add(member)

    def postpone(self, seconds: float) -> None:
        """Time passed in which nobody could report."""
        self._deadline += seconds
        self._silence_deadline += seconds

    def is_late(self, now: float) -> bool:
        """Whether the time to stop is over."""
        return now >= self._deadline

    def extend(self, now: float, patience: float) -> None:
        """Those that are late were dealt with, and get so much longer."""
        self.patience = patience
        self._deadline = now + patience

    def silent(self, now: float) -> list[int]:
        """The nodes whose agents did not answer in time."""
        return sorted(self._silent) if now >= self._silence_deadline else []
