"""What the workers said that stopped, sorted as it comes in.

Pure. All workers of a healthy job say the same of themselves, but for where they sit. So answers
are gathered by what they say, while others are still awaited; a question about everybody is then
asked of one of each kind, and takes no longer in a larger job.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from operator import attrgetter

from elastic.messages import Quiesced
from elastic.session import Standing
from elastic.topology import Member

_HELD = attrgetter(*(each.name for each in fields(Standing) if each.name != "slot"))


class Answers:
    """Grows by one answer at a time. `by_member` has them all; `committed` the last step of each
    worker that holds state; `last_at` is when the last one stopped (seconds since the epoch)."""

    def __init__(self, answers: Iterable[Quiesced] = ()) -> None:
        self.by_member: dict[Member, Quiesced] = {}
        self.committed: dict[Member, int] = {}
        self.last_at = 0.0
        self._alike: dict[object, list[Quiesced]] = {}
        for answer in answers:
            self.take(answer)

    def take(self, answer: Quiesced, member: Member | None = None) -> None:
        """One more; of each worker the first one counts. `member` is the answer's, or its equal."""
        member = member or answer.member
        if member in self.by_member:
            return
        self.by_member[member] = answer
        self.last_at = max(self.last_at, answer.at)
        held = None
        if answer.standing is not None:
            held = _HELD(answer.standing)
            self.committed[member] = answer.standing.committed
        alike = (held, answer.replica_groups_intact, answer.unbroken)
        self._alike.setdefault(alike, []).append(answer)

    @property
    def alike(self) -> Collection[list[Quiesced]]:
        """Those that differ in worker, slot and time alone lie together."""
        return self._alike.values()
