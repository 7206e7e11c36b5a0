"""Planted bugs in what workers hold and do: each is found, by the invariant that it breaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from sim_gradient import Gradient
from sim_groups import GroupKey, Groups
from sim_worker import SimWorker
from violations import first_violation

from elastic import degrees, held_state, kept_gradients, moves, placement, planner
from elastic.membership import Membership
from elastic.messages import AgentMessage, Quiesce
from elastic.plan import Plan
from elastic.session import Resume, Standing, StepPoint, decide_resume
from elastic.topology import Coordinate, Member
from ntp.geometry import SlotRef
from ntp.reshard_plan import Move, ReshardPlan, plan_reshard_among

Members = Mapping[GroupKey, tuple[Member, ...]]


def test_a_vote_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(standings: Sequence[Standing], counts: Sequence[int]) -> Resume:
        lowest = min(standing.committed for standing in standings if standing.layout_generation)
        resume = decide_resume(standings, counts)
        return replace(resume, resume_step=lowest + 1, vote=None)

    monkeypatch.setattr(held_state, "decide_resume", blind)
    found = first_violation()[0]
    assert "to resume at" in found


def test_a_stale_plan_that_is_adopted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def anything(worker: SimWorker, plan: Plan, announced: int) -> bool:
        return any(assignment.member == worker.member for assignment in plan.placement)

    monkeypatch.setattr(SimWorker, "may_adopt", anything)
    found = first_violation()[0]
    # Whoever acts on it alone waits for others, and is not there when these wait for it.
    signs = ("overtaken by", "stuck", "but answered", "a drain alone")
    assert any(words in found for words in signs)


def test_a_failed_member_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(membership: Membership, member: Member) -> None:
        return None

    monkeypatch.setattr(Membership, "remove", keep)
    found = first_violation()[0]
    # Either it is placed again, or everybody waits for its answer until the patience ends.
    assert "are placed" in found or "stuck" in found


def test_pieces_that_are_swapped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(move: Move) -> tuple[SlotRef, str, int]:
        return move.target, move.axis or "", move.atoms.start if move.atoms else 0

    def swapped(*arguments: Any) -> ReshardPlan:
        """Two moves of one axis exchange their atoms."""
        found = list(plan_reshard_among(*arguments).moves)
        for first, one in enumerate(found):
            for second in range(first + 1, len(found)):
                other = found[second]
                if one.axis is other.axis and one.atoms != other.atoms:
                    found[first] = replace(one, atoms=other.atoms)
                    found[second] = replace(other, atoms=one.atoms)
                    return ReshardPlan(tuple(sorted(found, key=order)))
        return ReshardPlan(tuple(found))

    monkeypatch.setattr(moves, "plan_reshard_among", swapped)
    found = first_violation()[0]
    assert any(
        words in found
        for words in ("is to send", "too much or too little", "differ from the reference", "twice")
    )


def test_a_tensor_group_kept_by_a_worker_that_left_the_vote_or_barrier_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never_in_doubt(worker: SimWorker) -> bool:
        return True

    monkeypatch.setattr(SimWorker, "may_keep", never_in_doubt)
    found = first_violation()[0]
    assert "is fenced, but works" in found


def test_a_tensor_group_kept_behind_the_vote_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_vote_alone(worker: SimWorker) -> bool:
        return worker.session.point is not StepPoint.PREPARED

    monkeypatch.setattr(SimWorker, "may_keep", in_vote_alone)
    found = first_violation()[0]
    assert "is fenced, but works" in found


def test_a_fresh_worker_that_counts_as_a_survivor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_lost(
        shape: Any, source: Any, layout: Any, lost: Any, leaving: Any, movers: Any
    ) -> Any:
        return moves.plan_moves(shape, source, layout, (), leaving, movers)

    monkeypatch.setattr(planner, "plan_moves", nobody_lost)
    found = first_violation()[0]
    assert "to send" in found or "too much or too little" in found


def test_state_that_is_whole_in_another_layout_alone_and_not_used_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "other_states", lambda situation, state: iter(()))
    assert "halted although all is held" in first_violation()[0]


def test_a_slot_that_lacks_a_stage_but_is_active_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_stage(places: Iterable[Coordinate], stages: int) -> tuple[int, ...]:
        return tuple(sorted({place.slot for place in places}))

    monkeypatch.setattr(degrees, "complete_slots", any_stage)
    monkeypatch.setattr(placement, "_fill", lambda *_: True)
    found = first_violation()[0]
    assert "placement fills the layout's slots" in found


def test_gradients_that_are_kept_although_a_sync_began_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimWorker, "unmixed", lambda worker: True)
    assert "spoiled gradients" in first_violation()[0]


def test_a_replica_that_keeps_what_some_of_it_lost_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def anybody(row: Any, claims: Any) -> int:
        return max(claims.get(member, 0) for _, member in row)

    monkeypatch.setattr(kept_gradients, "_claim", anybody)
    assert "told to keep" in first_violation()[0]


def test_gradients_that_are_cleared_although_they_count_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget(gradient: Gradient, *arguments: Any) -> None:
        begin(gradient, *arguments)
        gradient.samples = []

    begin = Gradient.begin
    monkeypatch.setattr(Gradient, "begin", forget)
    found = first_violation()[0]
    assert "computed from the samples" in found or "had" in found


def test_a_violation_tells_its_story_and_how_to_rerun_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "remove", lambda membership, member: None)
    lines = first_violation()
    assert lines[-1].startswith("rerun: EVERSTEP_SIM_SEED=")
    assert any("dies in step" in line for line in lines)


def test_ranks_that_shrink_a_group_by_what_each_sees_of_it_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_own_end(groups: Groups, plan: Plan, wanted: Members) -> Members:
        held = groups.smaller(wanted)
        return {key: names for key, names in held.items() if not groups.broken({key: names})}

    monkeypatch.setattr(Groups, "shrinking", by_own_end)
    assert "and others make it anew" in first_violation()[0]


def test_a_group_that_is_kept_although_everybody_waits_in_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hear = SimWorker.hear

    def keep(worker: SimWorker, message: AgentMessage) -> None:
        if isinstance(message, Quiesce):
            message = msgspec.structs.replace(message, sever_all=False)
        hear(worker, message)

    monkeypatch.setattr(SimWorker, "hear", keep)
    found = first_violation()[0]
    assert "is fenced, but works" in found or "is left waiting" in found
