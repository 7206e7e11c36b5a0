"""A worker's step as a state machine, and the rule that decides what an interrupted step becomes.

A step passes through three points. *Prepared*: this rank holds its reduced gradients. *Voted*: it
holds the result of the commit vote, an all-reduce to which every rank contributes only after it is
prepared. *Committed*: it has updated its parameters.

Whoever holds a vote therefore knows that every rank is prepared. If a failure interrupts the step,
each survivor reports how far it came, and `decide_resume` follows: where any survivor holds the
vote of step s or has committed s, all survivors are prepared for s and can apply it with that vote;
where none does, nobody has updated anything and s is redone. No committed step is lost either way.

A change of layout is decided in the same way. A worker that received its new shards keeps the old
ones until it has passed a barrier behind the exchange. Whoever passed it knows that every rank
received everything; so the newest layout that any survivor passed to is held by all that have a
place in it, as their current state or as their pending one. Who is to leave keeps the old layout
until it has passed too, the state of the same step, should the new one be lost
(`elastic.held_state`).

A rank that is stopped behind its backward pass, before any other replica's gradients came into its
own, *keeps* these and says under which generation's plan it computed them. What becomes of them is
`elastic.salvage`'s business; a step that is dropped without salvage loses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ntp.geometry import SlotRef


class StepPoint(StrEnum):
    """How far the step in flight has come."""

    IDLE = "idle"
    COMPUTING = "computing"
    PREPARED = "prepared"
    VOTED = "voted"


class SessionError(RuntimeError):
    """An event that the session's state does not allow: a bug in the caller."""


@dataclass(frozen=True, slots=True)
class Session:
    """State of one worker between and within steps.

    `committed` is the last step this rank committed (-1: none). `vote` is the newest vote held and
    `voted` its step (-1: none); it is kept until the next one, because a peer may still need it.
    The vote's fields have meaning to the trainer alone. `kept`: the generation under whose plan the
    gradients of the step in flight were computed, to the end and unmixed with other replicas' (0:
    they were not).
    """

    committed: int = -1
    point: StepPoint = StepPoint.IDLE
    voted: int = -1
    vote: tuple[float, ...] | None = None
    kept: int = 0

    @property
    def step(self) -> int:
        """The step in flight, or the next one."""
        return self.committed + 1

    def start(self) -> Session:
        """The step in flight begins, and adds to whatever gradients were kept of it."""
        self._check("start", StepPoint.IDLE)
        return replace(self, point=StepPoint.COMPUTING, kept=0)

    def keep(self, generation: int) -> Session:
        """The step stops behind backward: its gradients are those of `generation`'s plan alone."""
        self._check("keep", StepPoint.COMPUTING)
        return replace(self, kept=generation)

    def prepare(self) -> Session:
        """Reduced gradients are held."""
        self._check("prepare", StepPoint.COMPUTING)
        return replace(self, point=StepPoint.PREPARED)

    def hold_vote(self, vote: tuple[float, ...]) -> Session:
        """The vote's result is held."""
        self._check("hold_vote", StepPoint.PREPARED)
        return replace(self, point=StepPoint.VOTED, vote=vote, voted=self.step)

    def commit(self) -> Session:
        """Parameters are updated."""
        self._check("commit", StepPoint.VOTED)
        return replace(self, point=StepPoint.IDLE, committed=self.step)

    def drop(self, salvaged: bool = False) -> Session:
        """The step in flight is given up, to be redone: all of it, or what is not `salvaged`."""
        return replace(self, point=StepPoint.IDLE, kept=self.kept if salvaged else 0)

    def _check(self, event: str, source: StepPoint) -> None:
        if self.point is not source:
            raise SessionError(f"{event} in step {self.step}, which is {self.point}, not {source}")


@dataclass(frozen=True, slots=True)
class Standing:
    """What a survivor reports.

    `begun` is the newest step it started, `prepared` the newest whose reduced gradients it held,
    `voted` that of `vote`; -1: none.
    `layout_generation` is the generation whose layout its state has, and `pending_generation` one
    whose shards it has received in full without having passed the barrier; 0: none.
    `kept` is the generation under whose plan the gradients were computed that it holds of the step
    after `committed`, complete and its replica's alone; 0: it holds none.
    """

    slot: SlotRef
    committed: int
    begun: int
    prepared: int
    voted: int
    vote: tuple[float, ...] | None
    layout_generation: int
    pending_generation: int
    kept: int = 0


def standing(
    slot: SlotRef, session: Session, layout_generation: int, pending_generation: int
) -> Standing:
    """The report of a session."""
    holds_gradients = session.point in (StepPoint.PREPARED, StepPoint.VOTED)
    return Standing(
        slot=slot,
        committed=session.committed,
        begun=session.committed if session.point is StepPoint.IDLE else session.step,
        prepared=session.step if holds_gradients else session.committed,
        voted=session.voted,
        vote=session.vote,
        layout_generation=layout_generation,
        pending_generation=pending_generation,
        kept=session.kept,
    )


@dataclass(frozen=True, slots=True)
class Resume:
    """What becomes of the interrupted step.

    Survivors that have not committed `resume_step - 1` apply it with `vote`; then all go on with
    `resume_step`. `redone`: some survivor had begun `resume_step`, and that work is dropped.
    `layout_generation` is the generation whose layout everybody's state has.
    """

    resume_step: int
    vote: tuple[float, ...] | None
    redone: bool
    layout_generation: int
    reason: str


class UnrecoverableStep(ValueError):
    """The survivors' standings contradict the protocol: no common step or layout exists."""


def decide_resume(standings: Sequence[Standing], counts: Sequence[int] = ()) -> Resume:
    """The rules of the module's docstring; `standings` are those of all survivors (at least one).

    Of those that differ in the slot alone one will do; `counts` says for how many each stands.
    Raises UnrecoverableStep, which only a bug or a lost state can cause.
    """
    survivors = list(zip(standings, counts or [1] * len(standings), strict=True))
    layout = max(s.layout_generation for s, _ in survivors)
    if layout == 0:
        # Only newcomers are left, none of which switched: what they received is as good.
        layout = max(s.pending_generation for s, _ in survivors)
    # A newcomer whose first shards nobody switched to holds nothing that counts.
    survivors = [
        (s, n) for s, n in survivors if s.layout_generation or s.pending_generation == layout
    ]
    elsewhere = [
        s.slot for s, _ in survivors if layout not in (s.layout_generation, s.pending_generation)
    ]
    if elsewhere:
        raise UnrecoverableStep(f"generation {layout} was adopted, but {elsewhere} hold none of it")
    decided = max(max(s.committed, s.voted) for s, _ in survivors)
    redone = max(s.begun for s, _ in survivors) > decided
    behind = [(s, n) for s, n in survivors if s.committed < decided]
    if not behind:
        reason = f"step {decided + 1} is redone" if redone else f"step {decided + 1} follows"
        return Resume(decided + 1, None, redone, layout, reason)
    unprepared = [s.slot for s, _ in behind if s.prepared != decided]
    if unprepared:
        raise UnrecoverableStep(
            f"step {decided} was decided, but {unprepared} hold no reduced gradients for it"
        )
    vote = next((s.vote for s, _ in survivors if s.voted == decided and s.vote is not None), None)
    if vote is None:
        raise UnrecoverableStep(f"step {decided} was committed, but no survivor holds its vote")
    return Resume(
        decided + 1,
        vote,
        redone,
        layout,
        f"step {decided} was decided: {_count(behind)} of {_count(survivors)} survivors apply it "
        "with the vote that others hold",
    )


def _count(survivors: Iterable[tuple[Standing, int]]) -> int:
    return sum(number for _, number in survivors)
