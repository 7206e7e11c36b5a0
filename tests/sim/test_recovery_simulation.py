"""Recovery under every interleaving that a seed can think of, with the real decisions.

Default: 300 seeds. EVERSTEP_SIM_SEEDS sets another number, EVERSTEP_SIM_SEED plays one alone.
The planted bugs show that the invariants bite: each must be found, by the invariant it breaks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sim_worker import SimWorker
from world import Ended, Violation, World

from elastic import degrees, placement, planner
from elastic.membership import Membership
from elastic.plan import Plan
from elastic.session import Resume, Standing, StepPoint, decide_resume
from elastic.topology import Coordinate, Member
from ntp.geometry import SlotRef
from ntp.reshard_plan import Move, ReshardPlan, plan_reshard

SEEDS = int(os.environ.get("EVERSTEP_SIM_SEEDS", "300"))
PLANTED_SEEDS = 200


def seeds() -> Sequence[int]:
    """The seeds to play: one, if a person asks for it."""
    chosen = os.environ.get("EVERSTEP_SIM_SEED")
    return range(SEEDS) if chosen is None else (int(chosen),)


def first_violation(count: int = PLANTED_SEEDS) -> str | None:
    """What the first failing seed violates; None if all hold."""
    for seed in range(count):
        try:
            World(seed).run()
        except Violation as violation:
            return str(violation)
    return None


def test_all_invariants_hold_for_all_seeds() -> None:
    ended: list[Ended] = [World(seed).run() for seed in seeds()]
    outcomes = Counter(each.outcome for each in ended)
    assert sum(outcomes.values()) == len(ended)
    if len(ended) >= 100:
        # The seeds must exercise recovery, and mostly a recovery that succeeds.
        assert outcomes["completed"] > 0.6 * len(ended), outcomes
        assert outcomes["halted"] > 0, outcomes
        assert sum(each.generations for each in ended) > 2 * len(ended)


def test_a_seed_tells_the_same_story_twice() -> None:
    first, second = World(8), World(8)
    assert first.run() == second.run()
    assert [at for at, _, _ in first.story] == [at for at, _, _ in second.story]
    assert len(first.story) > 10


# Planted bugs.


def test_a_vote_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(standings: Sequence[Standing]) -> Resume:
        lowest = min(standing.committed for standing in standings if standing.layout_generation)
        resume = decide_resume(standings)
        return replace(resume, resume_step=lowest + 1, vote=None)

    monkeypatch.setattr(planner, "decide_resume", blind)
    found = first_violation()
    assert found is not None and "to resume at" in found.splitlines()[0]


def test_a_stale_plan_that_is_adopted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def anything(worker: SimWorker, plan: Plan, announced: int) -> bool:
        return any(assignment.member == worker.member for assignment in plan.placement)

    monkeypatch.setattr(SimWorker, "may_adopt", anything)
    found = first_violation()
    assert found is not None and "overtaken by" in found.splitlines()[0]


def test_a_failed_member_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(membership: Membership, member: Member) -> None:
        return None

    monkeypatch.setattr(Membership, "remove", keep)
    found = first_violation()
    assert found is not None
    # Either it is placed again, or everybody waits for its answer until the patience ends.
    assert "are placed" in found.splitlines()[0] or "stuck" in found.splitlines()[0]


def test_pieces_that_are_swapped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(move: Move) -> tuple[SlotRef, str, int]:
        return move.target, move.axis or "", move.atoms.start if move.atoms else 0

    def swapped(*arguments: Any) -> ReshardPlan:
        """Two moves of one axis exchange their atoms."""
        moves = list(plan_reshard(*arguments).moves)
        for first, one in enumerate(moves):
            for second in range(first + 1, len(moves)):
                other = moves[second]
                if one.axis is other.axis and one.atoms != other.atoms:
                    moves[first] = replace(one, atoms=other.atoms)
                    moves[second] = replace(other, atoms=one.atoms)
                    return ReshardPlan(tuple(sorted(moves, key=order)))
        return ReshardPlan(tuple(moves))

    monkeypatch.setattr(planner, "plan_reshard", swapped)
    found = first_violation()
    assert found is not None
    assert any(
        words in found.splitlines()[0]
        for words in ("is to send", "too much or too little", "differ from the reference", "twice")
    )


def test_a_tensor_group_kept_by_a_worker_that_left_the_vote_or_barrier_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never_in_doubt(worker: SimWorker) -> bool:
        return True

    monkeypatch.setattr(SimWorker, "may_keep", never_in_doubt)
    found = first_violation()
    assert found is not None and "is fenced, but works" in found.splitlines()[0]


def test_a_tensor_group_kept_behind_the_vote_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_vote_alone(worker: SimWorker) -> bool:
        return worker.session.point is not StepPoint.PREPARED

    monkeypatch.setattr(SimWorker, "may_keep", in_vote_alone)
    found = first_violation()
    assert found is not None and "is fenced, but works" in found.splitlines()[0]


def test_a_fresh_worker_that_counts_as_a_survivor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reshard = planner._reshard

    def nobody_lost(shape: Any, source: Any, layout: Any, lost: Any, movers: Any) -> Any:
        return reshard(shape, source, layout, (), movers)

    monkeypatch.setattr(planner, "_reshard", nobody_lost)
    found = first_violation()
    assert found is not None and "to send" in found.splitlines()[0]


def test_a_slot_that_lacks_a_stage_but_is_active_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_stage(places: Iterable[Coordinate], stages: int) -> tuple[int, ...]:
        return tuple(sorted({place.slot for place in places}))

    monkeypatch.setattr(degrees, "complete_slots", any_stage)
    monkeypatch.setattr(placement, "_fill", lambda *_: True)
    found = first_violation()
    assert found is not None and "placement fills the layout's slots" in found.splitlines()[0]


def test_a_fence_that_also_strikes_those_who_answered_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(World, "spares", lambda world, agent, member: False)
    found = first_violation()
    assert found is not None and "is fenced, but works" in found.splitlines()[0]


def test_a_violation_tells_its_story_and_how_to_rerun_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "remove", lambda membership, member: None)
    found = first_violation()
    assert found is not None
    lines = found.splitlines()
    assert lines[-1].startswith("rerun: EVERSTEP_SIM_SEED=")
    assert any("dies in step" in line for line in lines)
