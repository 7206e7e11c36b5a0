"""Plans: who is placed where, what moves, what is kept, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from scenes import VOTE, committed, job_shape, node_devices, prepared

from elastic import planner
from elastic.answers import Answers
from elastic.candidates import Choice
from elastic.memory_fit import memory_fit
from elastic.messages import Quiesced
from elastic.notes import plan_notes
from elastic.pace import Pace
from elastic.placement import Roster, seat
from elastic.plan import Action, NoPlan, Plan, StateSource
from elastic.plan_change import changed, difference
from elastic.planner import JobShape, Situation, home_devices, plan_generation, split_batch
from elastic.session import Session, standing
from elastic.topology import Coordinate, DeviceId, Member
from elastic.workload import SplitBatchBy
from ntp.geometry import full_layout

SHAPE = job_shape()


def workers(shape: JobShape = SHAPE) -> dict[Coordinate, Member]:
    homes = home_devices(shape, node_devices(shape))
    return {place: Member(device, 1) for place, device in homes.items()}


def answer(
    plan: Plan,
    member: Member,
    session: Session,
    *,
    generation: int = 2,
    layout: int | None = None,
    pending: int = 0,
    intact: bool = True,
    unbroken: bool = False,
) -> Quiesced:
    slot = next(a.coordinate.slot_ref for a in plan.placement if a.member == member)
    layout = plan.generation if layout is None else layout
    held = standing(slot, session, layout, pending)
    return Quiesced(generation, member, held, intact, 0.0, unbroken)


def situation(
    alive: Mapping[Coordinate, Member],
    answers: Mapping[Member, Quiesced],
    *history: Plan,
) -> Situation:
    past = {plan.generation: plan for plan in history}
    ready = {member.device: member for member in alive.values()}
    homes = home_devices(SHAPE, node_devices(SHAPE))
    return Situation(
        max(past, default=0) + 1, ready, Answers(answers.values()), past, "node0:7", homes
    )


def first_plan(shape: JobShape = SHAPE) -> Plan:
    plan = plan_generation(shape, situation(workers(shape), {}))
    assert isinstance(plan, Plan)
    return plan


def without(*lost: tuple[int, int]) -> dict[Coordinate, Member]:
    return {p: m for p, m in workers().items() if (p.replica, p.slot) not in lost}


def next_plan(alive: Mapping[Coordinate, Member], session: Session) -> Plan | NoPlan:
    first = first_plan()
    placed = {a.member for a in first.placement}
    answers = {m: answer(first, m, session) for m in alive.values() if m in placed}
    return plan_generation(SHAPE, situation(alive, answers, first))


def test_home_devices_fill_replica_by_replica_and_spares_have_no_place() -> None:
    devices = (*node_devices(SHAPE), DeviceId(9, 0))
    homes = home_devices(SHAPE, devices)
    assert list(homes) == [Coordinate(r, 0, s) for r in (0, 1) for s in (0, 1)]
    assert list(homes.values()) == list(node_devices(SHAPE))


def test_the_first_plan_initialises_everybody() -> None:
    plan = first_plan()
    assert plan.state_source is StateSource.INITIALIZE and plan.source_layout is None
    assert plan.layout == full_layout(SHAPE.counts, 2, 2)
    assert (plan.resume_step, plan.reshard[0].moves, plan.kept_replicas) == (0, (), ())
    assert "TP2+TP2" in plan.reason


def test_a_lost_slot_is_taken_over_by_its_replica_and_the_other_keeps_its_group() -> None:
    plan = next_plan(without((0, 1)), prepared(3))
    assert isinstance(plan, Plan)
    assert plan.action is Action.REDUCE_TP and plan.degrees() == ((1,), (2,))
    assert plan.kept_replicas == (1,)
    assert {move.target.replica for move in plan.reshard[0].moves} == {0}
    assert {(m.source.replica, m.source.slot) for m in plan.reshard[0].moves} == {(1, 1)}
    assert (plan.resume_step, plan.redone, plan.apply_vote) == (3, True, None)
    assert "replica 0 slot 1 is vacant, replica 0 goes to TP1; step 3 is redone" in plan.reason


UNBROKEN = dict.fromkeys(workers(), committed(3))
AHEAD = {Coordinate(0, 0, 0): committed(4)}


@pytest.mark.parametrize(
    ("change", "unbroken"),
    [
        ({}, True),
        # An urgent announcement, of which one has not heard.
        ({"severed": set(UNBROKEN) - {Coordinate(1, 0, 1)}}, False),
        # One that broke in a planned departure.
        ({"severed": {Coordinate(1, 0, 1)}}, False),
        ({"lost": Coordinate(0, 0, 1)}, False),
        # A step was interrupted, or one holds a vote that others lack.
        ({"sessions": UNBROKEN | {Coordinate(0, 0, 0): prepared(4)}}, False),
        ({"sessions": dict.fromkeys(UNBROKEN, prepared(4)) | AHEAD}, False),
        # One holds the state of a plan that none has run since.
        ({"newer": True}, False),
    ],
)
def test_groups_shrink_only_where_all_of_the_last_plan_say_that_all_of_theirs_work(
    change: Mapping[str, Any], unbroken: bool
) -> None:
    first = first_plan()
    severed, sessions = change.get("severed", ()), change.get("sessions", UNBROKEN)
    answers = {
        m: answer(first, m, sessions[place], unbroken=place not in severed)
        for place, m in workers().items()
        if place != change.get("lost")
    }
    history = [first, replace(first, generation=2)] if change.get("newer") else [first]
    known = situation(without(), answers, *history)
    plan = plan_generation(SHAPE, replace(known, leaving=frozenset({DeviceId(0, 1)})))
    assert isinstance(plan, Plan) and plan.degrees() == ((1,), (2,))
    assert plan.unbroken is unbroken
    if not change:
        told = difference(first, plan)
        assert told is not None and changed(first, told).unbroken


def test_a_plan_that_interrupted_a_step_cannot_call_groups_unbroken() -> None:
    plan = next_plan(without((0, 1)), prepared(3))
    assert isinstance(plan, Plan) and plan.redone
    with pytest.raises(ValueError, match="groups are unbroken only where"):
        replace(plan, unbroken=True)
    with pytest.raises(ValueError, match="groups are unbroken only where"):
        replace(first_plan(), unbroken=True)


@pytest.mark.parametrize(
    ("session", "pending", "where"),
    [
        (committed(3), 0, "before step 4"),
        (committed(3).start(), 0, "before the vote of step 4"),
        (prepared(4), 0, "in the vote of step 4"),
        (prepared(4).hold_vote(VOTE), 0, "after the vote of step 4"),
        (committed(3), 2, "in the barrier of generation 2"),
    ],
)
def test_a_group_that_a_member_calls_broken_is_not_kept_and_the_journal_says_where_it_stood(
    session: Session, pending: int, where: str
) -> None:
    first = first_plan()
    there = without((0, 1))
    broken = Coordinate(1, 0, 0)
    answers = {
        member: answer(first, member, session, pending=pending, intact=place != broken)
        for place, member in there.items()
    }
    plan = plan_generation(SHAPE, situation(there, answers, first))
    assert isinstance(plan, Plan) and plan.kept_replicas == ()
    notes = plan_notes(plan, first, SHAPE.sizes, Answers(answers.values()), 0)
    told = [note.fields for note in notes if note.event == "groups_not_kept"]
    assert told == [{"generation": 2, "workers": [f"{there[broken]} {where}"]}]


def test_a_vote_that_one_survivor_holds_is_given_to_all() -> None:
    first = first_plan()
    alive = without((0, 1))
    ahead, *behind = alive.values()
    answers = {m: answer(first, m, prepared(3)) for m in behind}
    answers[ahead] = answer(first, ahead, prepared(3).hold_vote(VOTE))
    plan = plan_generation(SHAPE, situation(alive, answers, first))
    assert isinstance(plan, Plan)
    assert (plan.resume_step, plan.apply_vote) == (4, VOTE)


def test_a_returned_slot_takes_its_home_back_and_only_that_moves() -> None:
    reduced = next_plan(without((0, 1)), committed(3))
    assert isinstance(reduced, Plan)
    alive = without((0, 1)) | {Coordinate(0, 0, 1): Member(DeviceId(0, 1), 2)}
    answers = {
        a.member: answer(reduced, a.member, committed(5), generation=3) for a in reduced.placement
    }
    plan = plan_generation(SHAPE, situation(alive, answers, first_plan(), reduced))
    assert isinstance(plan, Plan)
    assert plan.action is Action.GROW_TP and plan.layout == full_layout(SHAPE.counts, 2, 2)
    assert {(m.target.replica, m.target.slot) for m in plan.reshard[0].moves} == {(0, 1)}
    assert "replica 0 slot 1 returned, replica 0 goes to TP2" in plan.reason


def test_a_worker_replaced_in_place_gets_all_its_state_anew() -> None:
    alive = without((0, 1)) | {Coordinate(0, 0, 1): Member(DeviceId(0, 1), 2)}
    plan = next_plan(alive, committed(3))
    assert isinstance(plan, Plan)
    assert plan.action is Action.CONTINUE and "1 workers replaced in place" in plan.reason
    assert {(m.target.replica, m.target.slot) for m in plan.reshard[0].moves} == {(0, 1)}
    assert any(move.axis is None for move in plan.reshard[0].moves)
    assert plan.kept_replicas == (1,)


def test_a_replica_without_devices_is_dropped_and_its_batch_goes_to_the_others() -> None:
    plan = next_plan(without((1, 0), (1, 1)), committed(3))
    assert isinstance(plan, Plan)
    assert plan.action is Action.DROP_REPLICA and plan.batch_split == (8,)
    assert plan.reshard[0].moves == () and "replica 1 is dropped" in plan.reason


@pytest.mark.parametrize(
    ("alive", "reason"),
    [
        ({}, "no worker is left"),
        (
            without((0, 0), (1, 0)),
            "nobody alive holds KV groups 0-1, MLP columns 0-2 and vocabulary rows 0-2, and there "
            "are no checkpoints",
        ),
    ],
)
def test_nothing_to_be_done_is_said_with_a_reason(
    alive: dict[Coordinate, Member], reason: str
) -> None:
    plan = next_plan(alive, committed(3))
    assert isinstance(plan, NoPlan) and reason in plan.reason


def test_newcomers_alone_hold_no_state() -> None:
    fresh = {place: Member(member.device, 2) for place, member in workers().items()}
    plan = next_plan(fresh, committed(3))
    assert isinstance(plan, NoPlan) and "no survivor holds any state" in plan.reason


def test_a_layout_that_one_survivor_passed_to_is_where_all_go_on_from() -> None:
    first, alive = first_plan(), without((0, 1))
    second = next_plan(alive, committed(3))
    assert isinstance(second, Plan)
    passed, *waiting = alive.values()
    answers = {m: answer(second, m, committed(3), layout=1, pending=2) for m in waiting}
    answers[passed] = answer(second, passed, committed(3), layout=2)
    plan = plan_generation(SHAPE, situation(alive, answers, first, second))
    assert isinstance(plan, Plan)
    assert plan.source_generation == 2 and plan.source_layout == second.layout
    assert plan.reshard[0].moves == ()
    # Nobody passed: everybody goes back to the old layout, and the moves are made again.
    answers = {m: answer(second, m, committed(3), layout=1, pending=2) for m in alive.values()}
    plan = plan_generation(SHAPE, situation(alive, answers, first, second))
    assert isinstance(plan, Plan)
    assert plan.source_generation == 1 and plan.reshard == second.reshard


LEAVING = frozenset(DeviceId(0, index) for index in range(SHAPE.tensor))
"""The devices of replica 0."""


def left_behind(committed_since: int) -> tuple[Situation, Plan]:
    """Replica 0 hands over and leaves; a worker of replica 1 is lost before that has forgotten what
    it held. Also the newest plan, which lets it go."""
    first, there = first_plan(), workers()
    stopped = {m: answer(first, m, committed(3)) for m in there.values()}
    second = plan_generation(SHAPE, replace(situation(there, stopped, first), leaving=LEAVING))
    assert isinstance(second, Plan) and {m.device for _, m in second.donors} == LEAVING
    alive = without((1, 1))
    answers = {
        m: answer(first, m, committed(3), generation=3)
        for m in alive.values()
        if m.device in LEAVING
    }
    stays = alive[Coordinate(1, 0, 0)]
    answers[stays] = answer(second, stays, committed(committed_since).start(), generation=3)
    return replace(situation(alive, answers, first, second), leaving=LEAVING), second


@pytest.mark.parametrize("leaving", [LEAVING, frozenset()], ids=["leave", "may stay"])
def test_what_leavers_still_hold_counts_as_long_as_no_step_is_committed_without_them(
    leaving: frozenset[DeviceId],
) -> None:
    seen, second = left_behind(3)
    third = plan_generation(SHAPE, replace(seen, leaving=leaving))
    assert isinstance(third, Plan)
    assert (third.source_generation, third.resume_step, third.redone) == (1, 4, True)
    assert third.newcomers == (workers()[Coordinate(1, 0, 0)],), "what it holds is of no use"
    assert {m.device for _, m in third.donors} == leaving
    assert "on the state in the layout of generation 1" in third.reason
    change = difference(second, third)
    assert change is not None and changed(second, change) == third


def test_what_leavers_still_hold_is_of_no_use_once_a_step_is_committed_without_them() -> None:
    third = plan_generation(SHAPE, left_behind(4)[0])
    assert isinstance(third, NoPlan) and "nobody alive holds" in third.reason


@pytest.mark.parametrize("had_begun", [True, False])
def test_who_let_go_of_its_state_in_its_old_place_gets_all_of_it_anew_again(
    had_begun: bool,
) -> None:
    """The change to what was still held is interrupted, in the midst of it or before it began."""
    seen, second = left_behind(3)
    third = plan_generation(SHAPE, seen)
    assert isinstance(third, Plan)
    first, stays = first_plan(), workers()[Coordinate(1, 0, 0)]
    answers = {m: answer(first, m, committed(3), generation=4) for m in seen.answers.by_member}
    answers[stays] = (
        answer(first, stays, committed(3), generation=4, layout=0, pending=3)
        if had_begun
        else answer(second, stays, committed(3).start(), generation=4)
    )
    alive = {p: m for p, m in workers().items() if m in answers}
    fourth = plan_generation(
        SHAPE, replace(situation(alive, answers, first, second, third), leaving=LEAVING)
    )
    assert isinstance(fourth, Plan)
    assert (fourth.source_generation, fourth.newcomers) == (1, (stays,))
    assert fourth.reshard == third.reshard


@pytest.mark.parametrize("came", [0, 1, 2], ids=["none", "one", "two"])
def test_a_change_to_what_only_some_received_goes_on_however_many_have_settled(came: int) -> None:
    """A fresh worker received the last copy of its shards, and of its mates one did not come so
    far. That one is to begin anew, and does not know it when the change is interrupted."""
    first, there = first_plan(), workers()
    fresh = Member(DeviceId(0, 1), 2)
    alive = {**there, Coordinate(0, 0, 1): fresh}
    held = {m: answer(first, m, committed(3)) for m in there.values() if m in alive.values()}
    second = plan_generation(SHAPE, situation(alive, held, first))
    assert isinstance(second, Plan) and second.newcomers == (fresh,)
    del alive[Coordinate(1, 0, 1)]
    stays, behind = alive[Coordinate(0, 0, 0)], alive[Coordinate(1, 0, 0)]
    answers = {
        stays: answer(first, stays, committed(3), generation=3, pending=2),
        fresh: answer(second, fresh, committed(3), generation=3, layout=0, pending=2),
        behind: answer(first, behind, committed(3), generation=3),
    }
    third = plan_generation(SHAPE, situation(alive, answers, first, second))
    assert isinstance(third, Plan)
    assert (third.source_generation, third.newcomers) == (2, (behind,))
    answers = {member: structs.replace(each, generation=4) for member, each in answers.items()}
    for member in (stays, fresh)[:came]:
        answers[member] = answer(second, member, committed(3), generation=4)
    fourth = plan_generation(SHAPE, situation(alive, answers, first, second, third))
    assert isinstance(fourth, Plan)
    assert (fourth.source_generation, fourth.newcomers) == (2, (behind,))
    assert (fourth.resume_step, fourth.reshard) == (4, third.reshard)


def test_a_contradiction_is_no_plan_rather_than_a_crash() -> None:
    first, alive = first_plan(), without((0, 1))
    ahead, *behind = alive.values()
    answers = {m: answer(first, m, committed(1)) for m in behind}
    answers[ahead] = answer(first, ahead, committed(3))
    plan = plan_generation(SHAPE, situation(alive, answers, first))
    assert isinstance(plan, NoPlan) and "step 3 was decided" in plan.reason


@given(st.integers(1, 6), st.integers(0, 12), st.sampled_from(SplitBatchBy))
def test_at_full_strength_the_batch_is_split_as_evenly_as_it_divides(
    replicas: int, extra: int, by: SplitBatchBy
) -> None:
    shape = replace(SHAPE, replicas=replicas, global_batch_size=replicas + extra, split_batch_by=by)
    split = split_batch(shape, full_layout(shape.counts, 2, replicas), {})
    assert sum(split) == replicas + extra and max(split) - min(split) <= 1
    assert list(split) == sorted(split, reverse=True)


def test_a_wounded_replica_takes_fewer_samples_and_the_plan_says_so() -> None:
    plan = next_plan(without((0, 1)), committed(3))
    assert isinstance(plan, Plan)
    # TP1 beside TP2: 3 samples take its slot as long as 6 would take the others'.
    assert plan.batch_split == (3, 5)
    assert plan.reason.endswith("; step 4 follows; 3 to 5 samples a replica, by degree")
    assert first_plan().reason.endswith("; 4 samples a replica")


@pytest.mark.parametrize(
    ("by", "paces", "split", "why"),
    [
        (SplitBatchBy.EQUAL, {}, (4, 4), "4 samples a replica"),
        (SplitBatchBy.SPEED, {}, (3, 5), "3 to 5 samples a replica, by degree, as no speed"),
        # Measured at TP2, replica 0 was three times as fast; at TP1 it is still ahead.
        (SplitBatchBy.SPEED, {0: 1.0, 1: 3.0}, (5, 3), "3 to 5 samples a replica, by speed"),
        (SplitBatchBy.SPEED, {0: 1.0}, (3, 5), "by speed"),
        (SplitBatchBy.DEGREE, {0: 1.0, 1: 3.0}, (3, 5), "by degree"),
    ],
)
def test_the_batch_follows_what_the_job_says(
    by: SplitBatchBy, paces: dict[int, float], split: tuple[int, ...], why: str
) -> None:
    first = first_plan()
    alive = without((0, 1))
    answers = {m: answer(first, m, committed(3)) for m in alive.values()}
    measured = {
        replica: Pace(seconds, first.layout.replica(replica)) for replica, seconds in paces.items()
    }
    plan = plan_generation(
        replace(SHAPE, split_batch_by=by),
        replace(situation(alive, answers, first), paces=measured),
    )
    assert isinstance(plan, Plan)
    assert plan.batch_split == split and why in plan.reason


def test_the_digest_of_a_plan_depends_on_what_it_says() -> None:
    assert first_plan().digest == first_plan().digest
    other = next_plan(without((0, 1)), committed(3))
    assert isinstance(other, Plan) and other.digest != first_plan().digest


def test_newcomers_that_received_but_never_switched_do_not_crash_the_planner() -> None:
    """The last old worker dies while the newcomers wait in the barrier of their first layout."""
    fresh = {place: Member(member.device, 2) for place, member in workers().items()}
    answers = {
        member: Quiesced(2, member, standing(place.slot_ref, committed(3), 0, 2), False, 0.0)
        for place, member in fresh.items()
    }
    outcome = plan_generation(SHAPE, situation(fresh, answers, first_plan()))
    assert isinstance(outcome, Plan | NoPlan)


def test_parity_padding_is_caught(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, str], None]
) -> None:
    """Megatron's parity: all replicas reduced alike, which throws healthy devices away."""

    def idle(plan: Plan | NoPlan) -> set[Member]:
        assert isinstance(plan, Plan)
        return set(alive.values()) - {assignment.member for assignment in plan.placement}

    def padded(shape: JobShape, roster: Roster, *_: object) -> Choice:
        degree = min(map(len, roster.rows.values()))
        seating = seat(shape, memory_fit(shape), roster, dict.fromkeys(roster.rows, degree))
        assert seating is not None
        return Choice(seating, ())

    alive = without((0, 1))
    assert not idle(plan_generation(SHAPE, situation(alive, {})))
    monkeypatch.setattr(planner, "choose", padded)
    wasted = idle(plan_generation(SHAPE, situation(alive, {})))
    assert len(wasted) == 1
    record_property("planted bug", f"parity_padding, by test_planner: {len(wasted)} worker idles")
