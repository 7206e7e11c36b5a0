"""What state there is when a plan is made: nobody's yet, or that which survivors hold.

Pure. The survivors' answers decide together which layout everybody's state has and what becomes of
the interrupted step (`elastic.session`). From that and the plan of that layout follows who of it is
lost, who is to hand over, and who holds nothing and is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
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
    empty |= _elsewhere(resume.layout_generation, situation)
    lost = _lost(source, situation, empty)
    leaving = _leaving(source, situation, lost)
    return State(StateSource.PEERS, resume, source, lost, leaving)


def other_states(situation: Situation, state: State) -> Iterator[State]:
    """What is held of the same step in other layouts than that of `state`, the newest first.

    For when too much of that is missing. Who leaves keeps the layout before until it has passed the
    barrier; others may have passed it, and be lost. Or they had not, and lost some of the layout
    before, when one had received all of the next. Either will do as long as the same step is to be
    resumed, as the layout changes nothing in the state.
    """
    assert state.source is not None
    answers = situation.answers.by_member.values()
    held = [each.standing for each in answers if each.standing is not None]
    layouts = {each.layout_generation for each in held} | {each.pending_generation for each in held}
    for layout in sorted(layouts - {0, state.source.generation}, reverse=True):
        alone = Answers(_only_in(layout, each) for each in answers)
        found = find_state(replace(situation, answers=alone))
        if isinstance(found, State) and found.resume.resume_step == state.resume.resume_step:
            reason = (
                f"{state.resume.reason}, on the state in the layout of generation {layout}, "
                f"as that of generation {state.source.generation} is not whole"
            )
            resume = replace(found.resume, redone=state.resume.redone, reason=reason)
            yield replace(found, resume=resume)


def _only_in(layout: int, answer: Quiesced) -> Quiesced:
    """The answer of a worker that would hold nothing but the layout of that generation."""
    held = answer.standing
    if held is None or held.layout_generation == layout:
        return answer
    if held.pending_generation == layout:
        held = replace(held, layout_generation=layout, pending_generation=0)
    else:
        held = None
    return msgspec.structs.replace(answer, standing=held)


def _survivors(situation: Situation) -> tuple[list[tuple[Standing, int]], set[Member]]:
    """What the survivors hold, and how many hold alike; and who answered, but holds nothing that
    counts.

    Nothing counts that a worker holds which idled since a plan that others adopted, or which has
    none of that plan's layout because a later one had it go on from another, or begin anew.
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
        bound = _bound_to(newest, situation.history)
        apart = {
            answer.member
            for standing, group in held
            if standing.layout_generation
            and newest not in (standing.layout_generation, standing.pending_generation)
            for answer in group
            if answer.member not in bound
        }
        empty |= apart
        held = [
            (standing, [answer for answer in group if answer.member not in apart])
            for standing, group in held
        ]
    return [(standing, len(group)) for standing, group in held if group], empty


def _bound_to(layout: int, history: Mapping[int, Plan]) -> set[Member]:
    """Who must hold the layout of that generation, as some have adopted it.

    A later plan may have been interrupted when only some had settled on what it goes on from. Those
    hold no other layout any more; and who was to begin anew may hold an earlier one yet.
    """
    bound = set(map(itemgetter(1), history[layout].placement))
    for generation, plan in history.items():
        if generation > layout:
            if plan.source_generation != layout:
                return set()
            bound.difference_update(plan.newcomers)
    return bound


def _elsewhere(layout: int, situation: Situation) -> set[Member]:
    """Who holds something, but nothing of the layout of that generation.

    One that was to receive everything anew, in whatever place, let go of what it had.
    """
    return {
        answer.member
        for group in situation.answers.alike
        if (held := group[0].standing) is not None
        and layout not in (held.layout_generation, held.pending_generation)
        for answer in group
    }


def _lost(source: Plan, situation: Situation, empty: Set[Member]) -> tuple[Assignment, ...]:
    """The places of `source` whose worker no longer holds, or may not give, what belongs there."""
    answers, quarantined = situation.answers.by_member, situation.quarantined
    silent = situation.silent
    # Most of those who hold nothing had no place.
    empty = source.members.intersection(empty)
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
