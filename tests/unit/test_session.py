"""A step's state machine, and the decision rule against every interleaving of a small model.

The model: ranks go through their steps independently, but a vote is obtained only when all are
prepared, and a new layout is switched to only when all have received it. Whoever survives a cut
must be able to go on from what `decide_resume` says, whatever the others had done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, combinations_with_replacement, product

import pytest

from elastic.session import (
    Resume,
    Session,
    SessionError,
    Standing,
    StepPoint,
    UnrecoverableStep,
    decide_resume,
    standing,
)
from ntp.geometry import SlotRef

Decide = Callable[[Sequence[Standing]], Resume]
STEPS = 2


def vote_of(step: int) -> tuple[float, ...]:
    return (float(step), 0.5)


def at(point: StepPoint, committed: int = -1) -> Session:
    """A session that came to `point` of the step after `committed`."""
    session = Session()
    for step in range(committed + 1):
        session = session.start().prepare().hold_vote(vote_of(step)).commit()
    if point is not StepPoint.IDLE:
        session = session.start()
    if point in (StepPoint.PREPARED, StepPoint.VOTED):
        session = session.prepare()
    if point is StepPoint.VOTED:
        session = session.hold_vote(vote_of(session.step))
    return session


EVENTS: dict[str, Callable[[Session], Session]] = {
    "start": Session.start,
    "prepare": Session.prepare,
    "hold_vote": lambda session: session.hold_vote(vote_of(session.step)),
    "commit": Session.commit,
}
ALLOWED = {
    ("start", StepPoint.IDLE): StepPoint.COMPUTING,
    ("prepare", StepPoint.COMPUTING): StepPoint.PREPARED,
    ("hold_vote", StepPoint.PREPARED): StepPoint.VOTED,
    ("commit", StepPoint.VOTED): StepPoint.IDLE,
}


@pytest.mark.parametrize("point", StepPoint)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_point_moves_on_or_is_refused(event: str, point: StepPoint) -> None:
    session = at(point, committed=4)
    if (event, point) in ALLOWED:
        assert EVENTS[event](session).point is ALLOWED[(event, point)]
        return
    with pytest.raises(SessionError) as refused:
        EVENTS[event](session)
    assert event in str(refused.value) and str(point) in str(refused.value)
    assert "step 5" in str(refused.value)


def test_a_step_ends_committed_and_keeps_its_vote_until_the_next() -> None:
    session = at(StepPoint.IDLE, committed=2)
    assert (session.committed, session.step, session.voted) == (2, 3, 2)
    assert session.vote == vote_of(2)
    assert session.start().prepare().vote == vote_of(2)
    assert session.start().prepare().hold_vote(vote_of(3)).voted == 3


@pytest.mark.parametrize("point", StepPoint)
def test_a_dropped_step_is_redone_and_forgets_nothing(point: StepPoint) -> None:
    session = at(point, committed=2)
    dropped = session.drop()
    assert dropped.point is StepPoint.IDLE
    assert replace(dropped, point=session.point) == session


def test_gradients_are_kept_from_behind_backward_to_the_next_attempt() -> None:
    stopped = at(StepPoint.COMPUTING, committed=2).keep(7)
    assert standing(SlotRef(1, 0), stopped, 7, 0).kept == 7
    salvaged = stopped.drop(salvaged=True)
    assert (salvaged.kept, salvaged.step, salvaged.point) == (7, 3, StepPoint.IDLE)
    assert salvaged.start().kept == 0, "what is added to gradients is not complete before the end"
    assert stopped.drop().kept == 0
    for point in (StepPoint.IDLE, StepPoint.PREPARED, StepPoint.VOTED):
        with pytest.raises(SessionError, match="keep"):
            at(point).keep(7)


@pytest.mark.parametrize(
    ("point", "begun", "prepared", "voted"),
    [
        (StepPoint.IDLE, 2, 2, 2),
        (StepPoint.COMPUTING, 3, 2, 2),
        (StepPoint.PREPARED, 3, 3, 2),
        (StepPoint.VOTED, 3, 3, 3),
    ],
)
def test_a_standing_says_how_far_the_step_came(
    point: StepPoint, begun: int, prepared: int, voted: int
) -> None:
    report = standing(SlotRef(1, 0), at(point, committed=2), 4, 5)
    assert (report.committed, report.begun, report.prepared, report.voted) == (
        2,
        begun,
        prepared,
        voted,
    )
    assert report.vote == vote_of(voted)
    assert (report.layout_generation, report.pending_generation) == (4, 5)


# The model of steps. A rank's position counts the events it went through, four a step.

POINTS = tuple(StepPoint)


def session_at(position: int) -> Session:
    return at(POINTS[position % 4], committed=position // 4 - 1)


SESSIONS = [session_at(position) for position in range(4 * STEPS + 1)]


def reachable(ranks: int) -> Iterator[tuple[int, ...]]:
    """Every cut of the model: no rank holds a vote of a step that another is not prepared for.

    Ranks are alike here, so one order of their positions stands for all.
    """
    for positions in combinations_with_replacement(range(4 * STEPS + 1), ranks):
        votes_held = (max(positions) + 1) // 4  # of steps 0..votes_held - 1
        if all(position >= 4 * (votes_held - 1) + 2 for position in positions):
            yield positions


def survivors_of(ranks: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, ranks + 1):
        yield from combinations(range(ranks), count)


def settle(session: Session, resume: Resume) -> Session:
    """What `Worker._settle` makes of a session; fails where the worker could not."""
    if session.committed < resume.resume_step - 1:
        step = session.step
        assert resume.vote == vote_of(step), f"step {step} would be applied with {resume.vote}"
        if session.point is StepPoint.PREPARED:
            session = session.hold_vote(resume.vote)
        assert session.point is StepPoint.VOTED, f"{session} is to apply what it has not prepared"
        session = session.commit()
    session = session.drop()
    assert session.committed == resume.resume_step - 1, f"{session} is not where {resume} says"
    return session


def standings_of(sessions: Sequence[Session]) -> list[Standing]:
    return [standing(SlotRef(0, rank), session, 1, 0) for rank, session in enumerate(sessions)]


def check_steps(decide: Decide, ranks: int) -> int:
    """Check the rule in every reachable cut and for all survivors; returns how many cases."""
    cases = 0
    for positions in reachable(ranks):
        for survivors in survivors_of(ranks):
            sessions = [SESSIONS[positions[rank]] for rank in survivors]
            resume = decide(standings_of(sessions))
            settled = [settle(session, resume) for session in sessions]
            furthest = max(max(s.committed, s.voted) for s in sessions)
            assert resume.resume_step > furthest, "a committed or voted step is lost"
            assert resume.resume_step - 1 <= max(position // 4 for position in positions)
            begun = [s for s in sessions if s.point is not StepPoint.IDLE]
            assert resume.redone == any(s.step == resume.resume_step for s in begun)
            # A second failure, while only some have settled.
            for first in survivors_of(len(survivors)):
                mixed = [
                    settled[i] if i in first else session for i, session in enumerate(sessions)
                ]
                for left in combinations(mixed, max(1, len(mixed) - 1)):
                    again = decide(standings_of(left))
                    assert {settle(s, again).committed for s in left} == {again.resume_step - 1}
                    assert again.resume_step == resume.resume_step or not set(left) & set(settled)
                    cases += 1
            cases += 1
    return cases


@pytest.mark.parametrize(("ranks", "at_least"), [(2, 100), (3, 1_000), (4, 5_000)])
def test_every_cut_of_every_interleaving_is_recovered(ranks: int, at_least: int) -> None:
    assert check_steps(decide_resume, ranks) > at_least


# The model of a change of layout: two generations in a row, the second with the survivors.

HELD, RECEIVED, PASSED = range(3)


def layout_standing(rank: int, layout: int, pending: int) -> Standing:
    return standing(SlotRef(0, rank), at(StepPoint.IDLE, 3), layout, pending)


def progresses(ranks: int) -> Iterator[tuple[int, ...]]:
    """How far each rank came: nobody passes the barrier before all have received."""
    for progress in product((HELD, RECEIVED, PASSED), repeat=ranks):
        if PASSED not in progress or HELD not in progress:
            yield progress


def advanced(layouts: Sequence[int], progress: Sequence[int], generation: int) -> list[Standing]:
    return [
        layout_standing(
            rank,
            generation if way == PASSED else layout,
            generation if way == RECEIVED else 0,
        )
        for rank, (layout, way) in enumerate(zip(layouts, progress, strict=True))
    ]


def check_cut(decide: Decide, standings: Sequence[Standing]) -> int:
    """Check the layout that is decided; returns it."""
    layout = decide(standings).layout_generation
    assert layout == max(s.layout_generation for s in standings), "a passed barrier is undone"
    for each in standings:
        newcomer = each.layout_generation == 0 and each.pending_generation != layout
        assert newcomer or layout in (each.layout_generation, each.pending_generation)
    return layout


def check_layouts(decide: Decide, ranks: int) -> int:
    """All ranks but the last hold layout 1 and become 2, then 3; the last is a newcomer.

    Four ranks are left with one change, for time.
    """
    cases = 0
    start = [1] * (ranks - 1) + [0]
    for progress in progresses(ranks):
        before = advanced(start, progress, 2)
        for survivors in survivors_of(ranks):
            standings = [before[rank] for rank in survivors]
            if not any(s.layout_generation for s in standings):
                continue
            layout = check_cut(decide, standings)
            cases += 1
            # Next generation: some have settled on `layout` and come further, some have not.
            settled = [
                layout
                if layout in (s.layout_generation, s.pending_generation)
                else s.layout_generation
                for s in standings
            ]
            for further in progresses(len(standings)) if ranks < 4 else ():
                after = advanced(settled, further, 3)
                for unsettled in survivors_of(len(standings)):
                    mixed = [
                        standings[i] if further[i] == HELD and i in unsettled else each
                        for i, each in enumerate(after)
                    ]
                    if any(s.layout_generation for s in mixed):
                        check_cut(decide, mixed)
                        cases += 1
    return cases


@pytest.mark.parametrize(("ranks", "at_least"), [(2, 30), (3, 500), (4, 200)])
def test_every_cut_of_a_change_of_layout_is_recovered(ranks: int, at_least: int) -> None:
    assert check_layouts(decide_resume, ranks) > at_least


# Planted bugs: the model must tell a broken rule from the right one.


def ignores_votes(standings: Sequence[Standing]) -> Resume:
    return decide_resume([replace(s, voted=s.committed) for s in standings])


def takes_the_lowest(standings: Sequence[Standing]) -> Resume:
    lowest = min(standing.committed for standing in standings)
    return replace(decide_resume(standings), resume_step=lowest + 1, vote=None)


def ignores_pending(standings: Sequence[Standing]) -> Resume:
    return decide_resume([replace(s, pending_generation=0) for s in standings])


def takes_the_oldest_layout(standings: Sequence[Standing]) -> Resume:
    oldest = min(s.layout_generation for s in standings if s.layout_generation)
    return replace(decide_resume(standings), layout_generation=oldest)


@pytest.mark.parametrize("broken", [ignores_votes, takes_the_lowest])
def test_the_model_finds_a_broken_rule_for_steps(broken: Decide) -> None:
    with pytest.raises((AssertionError, UnrecoverableStep, SessionError)):
        check_steps(broken, 2)


@pytest.mark.parametrize("broken", [ignores_pending, takes_the_oldest_layout])
def test_the_model_finds_a_broken_rule_for_layouts(broken: Decide) -> None:
    with pytest.raises((AssertionError, UnrecoverableStep)):
        check_layouts(broken, 2)


def test_standings_that_contradict_the_protocol_are_refused() -> None:
    ahead, behind = at(StepPoint.IDLE, 3), at(StepPoint.COMPUTING, 2)
    with pytest.raises(UnrecoverableStep, match="step 3 was decided"):
        decide_resume(standings_of([ahead, behind]))
    voteless = [replace(s, vote=None) for s in standings_of([ahead, at(StepPoint.PREPARED, 2)])]
    with pytest.raises(UnrecoverableStep, match="no survivor holds its vote"):
        decide_resume(voteless)
    with pytest.raises(UnrecoverableStep, match="generation 5 was adopted"):
        decide_resume([layout_standing(0, 5, 0), layout_standing(1, 4, 0)])
