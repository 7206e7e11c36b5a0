"""How far the workers of a generation came in the change to it.

Pure. The change has three parts, which every worker that is involved finishes and reports; a part
counts when the last of them has. Meanwhile, and afterwards, a worker may lose a connection. That is
usually the echo of a failure whose report is on its way, and acting on it at once would cost a
second generation; so it is kept as a suspicion, until a failure explains it or its deadline passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from elastic.effects import Phase
from elastic.messages import PhaseDone, RecoveryPhase
from elastic.topology import Member

_NEXT = {
    RecoveryPhase.REBUILD: Phase.RESHARDING,
    RecoveryPhase.RESHARD: Phase.RESUMING,
    RecoveryPhase.RESUME: Phase.RUNNING,
}

_UNDER_WAY = {
    Phase.REBUILDING: RecoveryPhase.REBUILD,
    Phase.RESHARDING: RecoveryPhase.RESHARD,
    Phase.RESUMING: RecoveryPhase.RESUME,
}


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Workers lost a connection, and no failure explains it by `deadline` (seconds)."""

    deadline: float
    cause: str


class Adoption:
    """One generation's change. `phase` is REBUILDING, RESHARDING, RESUMING or RUNNING."""

    def __init__(self, generation: int, involved: Iterable[Member]) -> None:
        self.generation = generation
        self.phase = Phase.REBUILDING
        self.suspicion: Suspicion | None = None
        self._involved = frozenset(involved)
        self._awaited: dict[RecoveryPhase, set[Member]] = {}
        self._done_at = dict.fromkeys(RecoveryPhase, 0.0)

    @property
    def awaited(self) -> Collection[Member]:
        """Who has not finished the part that is under way; nobody once all are."""
        part = _UNDER_WAY.get(self.phase)
        return () if part is None else self._awaited.get(part, self._involved)

    def take(self, note: PhaseDone) -> float | None:
        """A worker finished a part; returns when the last one did, once all have."""
        if note.phase not in self._awaited:
            self._awaited[note.phase] = set(self._involved)
        awaited = self._awaited[note.phase]
        if note.member not in awaited:
            return None
        awaited.discard(note.member)
        self._done_at[note.phase] = max(self._done_at[note.phase], note.at)
        if awaited:
            return None
        self.phase = _NEXT[note.phase]
        return self._done_at[note.phase]

    def suspect(self, member: Member, deadline: float) -> None:
        """`member` lost a connection; only the first such loss counts."""
        if self.suspicion is None:
            cause = f"{member} lost a connection that no failure explains"
            self.suspicion = Suspicion(deadline, cause)

    def postpone(self, seconds: float) -> None:
        """Time passed in which nobody could report."""
        if self.suspicion is not None:
            deadline = self.suspicion.deadline + seconds
            self.suspicion = Suspicion(deadline, self.suspicion.cause)

    def overdue(self, now: float) -> Suspicion | None:
        """The suspicion that nothing explained in time."""
        suspicion = self.suspicion
        return suspicion if suspicion is not None and now >= suspicion.deadline else None
