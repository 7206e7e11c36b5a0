"""What state there is when a plan is made: nobody's yet, or that which survivors hold.

Pure. The survivors' answers decide together which layout everybody's state has and what becomes of
the interrupted step (`elastic.session`). From that and the plan of that layout follows who of it is
lost, who is to hand over, and who holds nothing and is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import itemgetter

import msgspec

from elastic.answers import Answers
from elastic.messages import Quiesced
from elastic.plan import NoPlan, Plan, StateSource
from elastic.session import Resume, Standing, UnrecoverableStep, decide_resume
from elastic.situation import Situation
from elastic.topology import Assignment, DeviceId, Member


@dataclass(frozen=True, slots=True)
class State:
    """Where the state comes from: the workers of `source` but those `lost`; or no worker (None).

    `leaving` are places of `source` whose workers hold state that they are to hand over.
    """

    kind: StateSource
    resume: Resume
    source: Plan | None = None
    lost: tuple[Assignment, ...] = ()
    leaving: tuple[Assignment, ...] = ()


def find_state(situation: Situation) -> State | NoPlan:
    """What the workers hold together."""
    survivors, empty = _survivors(situation)
    switched = any(standing.layout_generation for standing, _ in survivors)
    if not switched and _nothing_was_committed(situation):
        return State(StateSource.INITIALIZE, Resume(0, None, False, 0, "the job starts"))
    if not survivors:
        return NoPlan("no survivor holds any state")
    try:
        resume = decide_resume([held for held, _ in survivors], [n for _, n in survivors])
    except UnrecoverableStep as error:
        return NoPlan(str(error))
    source = situation.history.get(resume.layout_generation)
    if source is None:
        return NoPlan(f"survivors hold generation {resume.layout_generation}, which has no plan")
    lost = _lost(source, situation, empty)
    leaving = _leaving(source, situation, lost)
    return State(StateSource.PEERS, resume, source, lost, leaving)


def as_it_was_before(situation: Situation, state: State) -> Situation | None:
    """The same, but whoever has the layout of `state` holds nothing; None: nobody has another.

    A worker that is told to hand over keeps what it holds until it has passed the barrier. Others
    may have passed it, and have lost what only they held since then.
    """
    assert state.source is not None
    newest = state.source.generation
    answers = list(situation.answers.by_member.values())
    layouts = {each.standing.layout_generation for each in answers if each.standing is not None}
    if not layouts - {0, newest}:
        return None
    emptied = (
        msgspec.structs.replace(each, standing=None)
        if each.standing is not None and each.standing.layout_generation == newest
        else each
        for each in answers
    )
    return replace(situation, answers=Answers(emptied))


def _survivors(situation: Situation) -> tuple[list[tuple[Standing, int]], set[Member]]:
    """What the survivors hold, and how many hold alike; and who answered, but holds nothing that
    counts.

    Nothing counts that a worker holds which idled since a plan that others adopted.
    """
    held: list[tuple[Standing, list[Quiesced]]] = []
    empty = set[Member]()
    for group in situation.answers.alike:
        if (standing := group[0].standing) is not None:
            held.append((standing, group))
        else:
            empty.update(answer.member for answer in group)
    generations = {standing.layout_generation for standing, _ in held}
    newest = max(generations, default=0)
    if newest in situation.history and generations - {0, newest}:
        placed = set(map(itemgetter(1), situation.history[newest].placement))
        idled = {
            answer.member
            for standing, group in held
            if standing.layout_generation
            for answer in group
            if answer.member not in placed
        }
        empty |= idled
        held = [
            (standing, [answer for answer in group if answer.member not in idled])
            for standing, group in held
        ]
    return [(standing, len(group)) for standing, group in held if group], empty


def _lost(source: Plan, situation: Situation, empty: Set[Member]) -> tuple[Assignment, ...]:
    """The places of `source` whose worker no longer holds, or may not give, what belongs there."""
    answers, quarantined = situation.answers.by_member, situation.quarantined
    silent = situation.silent
    if source is situation.previous and silent is not None:
        lost = [each for each in source.placement if each[1] in silent]
    else:
        lost = [each for each in source.placement if each[1] not in answers]
    if empty or quarantined:
        lost += [
            each
            for each in source.placement
            if each.member in empty
            or (each.member.device in quarantined and each.member in answers)
        ]
    return tuple(lost)


def _leaving(
    source: Plan, situation: Situation, lost: Sequence[Assignment]
) -> tuple[Assignment, ...]:
    """The places of `source` whose worker can give what belongs there, but is not to stay."""
    if not situation.leaving:
        return ()
    gone = set(lost)
    return tuple(
        each
        for each in source.placement
        if each.member.device in situation.leaving and each not in gone
    )


def free_workers(
    workers: Mapping[DeviceId, Member], situation: Situation, state: State
) -> list[Member]:
    """Workers that hold none of the state that is used."""
    assert state.source is not None
    placement, answers = state.source.placement, situation.answers.by_member
    if situation.idle is not None:
        free = [member for member in situation.idle if workers.get(member.device) == member]
    else:
        free = [member for member in workers.values() if member not in answers]
    if len(answers) > len(placement) - len(state.lost):
        holding = set(map(itemgetter(1), placement)).difference(map(itemgetter(1), state.lost))
        free += [m for m in answers if m not in holding and workers.get(m.device) == m]
    return free


def _nothing_was_committed(situation: Situation) -> bool:
    """Whether state may be initialised: at the start, or again after a failed start.

    A worker that was placed and did not switch to its shards never passed the barrier, without
    which nobody can have taken part in a vote.
    """
    if situation.previous is None:
        return True
    placed = {assignment.member for assignment in situation.previous.placement}
    only_started = all(
        plan.state_source is StateSource.INITIALIZE for plan in situation.history.values()
    )
    return only_started and not placed.isdisjoint(situation.answers.by_member)
