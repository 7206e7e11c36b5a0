"""What is kept of interrupted steps: every sample once, whatever fails in whatever attempt.

The oracle keeps for every worker the list of samples that its gradient really is the sum of, and
what the worker says of it. It plays chains of failures within one step, through the real planner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from clusters import start
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import committed, job_shape

from elastic.answers import Answers
from elastic.job_shape import JobShape
from elastic.messages import Quiesced
from elastic.plan import NoPlan, Plan
from elastic.planner import Situation, plan_generation
from elastic.salvage import Kept, Salvage, salvage, split_rest
from elastic.session import Session, standing
from elastic.topology import Coordinate, Member
from ntp.ranges import Range

STEP = 3


def indices(samples: Sequence[Range]) -> list[int]:
    return [index for part in samples for index in range(part.start, part.stop)]


def replicas_of(plan: Plan) -> list[int]:
    return [replica.replica for replica in plan.layout.replicas]


# The split of what is left.


def splits(total: int, bearers: int, least: int) -> Iterator[tuple[int, ...]]:
    shares = [0, *range(least, total + 1)]
    return (each for each in product(shares, repeat=bearers) if sum(each) == total)


@given(total=st.integers(0, 7), costs=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_rest_is_split_so_that_all_are_done_as_early_as_can_be(
    total: int, costs: list[int]
) -> None:
    shares = split_rest(total, costs, least=1)
    done = [max(s * c for s, c in zip(e, costs, strict=True)) for e in splits(total, len(costs), 1)]
    assert sum(shares) == total
    assert max(s * c for s, c in zip(shares, costs, strict=True)) == min(done)


@given(
    total=st.integers(0, 40),
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    least=st.integers(1, 4),
)
def test_whoever_takes_a_share_takes_enough_for_its_schedule(
    total: int, costs: list[int], least: int
) -> None:
    if 0 < total < least:
        with pytest.raises(ValueError, match="cannot be split"):
            split_rest(total, costs, least)
        return
    shares = split_rest(total, costs, least)
    assert sum(shares) == total and all(share == 0 or share >= least for share in shares)


def test_a_slow_replica_is_spared_when_little_is_left() -> None:
    assert split_rest(2, [3, 3, 10], 1) == (1, 1, 0)
    assert split_rest(5, [1, 1, 1, 1], 2) == (3, 2, 0, 0)
    assert split_rest(0, [1, 1], 2) == (0, 0)


def test_nothing_kept_is_no_salvage() -> None:
    assert salvage((), 8, (1, 1), 1) is None


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Salvage((Kept(1, 1, (Range(4, 8),)),), (2, 1)), "once"),
        (Salvage((Kept(1, 1, (Range(4, 8),)), Kept(0, 1, (Range(0, 5),))), (0, -1)), "once"),
        (Salvage((Kept(1, 1, (Range(3, 7), Range(5, 8))),), (1, 0)), "once"),
        (Salvage((Kept(1, 1, (Range(6, 10),)),), (2, 2)), "once"),
        (Salvage((Kept(1, 1, (Range(4, 8),)),), (4,)), "once"),
        (Salvage((Kept(1, 2, (Range(4, 8),)),), (2, 2)), "earlier generations"),
        (Salvage((Kept(5, 1, (Range(4, 8),)),), (2, 2)), "earlier generations"),
    ],
)
def test_a_plan_refuses_to_lose_or_repeat_a_sample(broken: Salvage, why: str) -> None:
    chain = Chain(job_shape())
    chain.fail({Coordinate(0, 0, 1)})
    with pytest.raises(ValueError, match=why):
        replace(chain.plan, salvage=broken)


# Chains of failures.


@dataclass
class Process:
    """A worker: what it says, and the samples its gradient is the sum of (-1: not only its own)."""

    session: Session
    layout: int
    pending: int = 0
    gradient: list[int] = field(default_factory=list)


class Chain:
    """One step that is attempted again and again; each attempt ends with a failure."""

    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self.cluster = start(shape)
        self.history = dict(self.cluster.history)
        self.processes = {
            member: Process(committed(STEP - 1), 1) for _, member in self.plan.placement
        }

    @property
    def plan(self) -> Plan:
        return self.history[max(self.history)]

    def places(self, replica: int) -> list[tuple[Coordinate, Member]]:
        return list(self.plan.rows()[replica])

    def compute(self, replica: int, *, mixed: bool = False, stuck: int = 0) -> None:
        """A replica attempts the step, and is stopped; its first `stuck` workers do not get far."""
        share = dict(self.plan.shares(STEP))[replica]
        kept = self.plan.kept_from(replica)
        for number, (_, member) in enumerate(self.places(replica)):
            process = self.processes[member]
            if not kept:
                process.gradient = []
            process.session = process.session.start()
            process.gradient += indices(share.fresh)
            if number < stuck or mixed:
                process.gradient.append(-1)
            else:
                process.session = process.session.keep(self.plan.generation)

    def fail(self, lost: set[Coordinate], *, adopt: bool = True) -> bool:
        """Whoever is in `lost` is gone; the next plan is made, and adopted or only received.

        Returns whether there is one.
        """
        for place, member in self.plan.placement:
            if place in lost:
                del self.processes[member]
        generation = self.plan.generation + 1
        places = {
            member: place for plan in self.history.values() for place, member in plan.placement
        }
        answers = Answers(
            Quiesced(
                generation,
                member,
                standing(places[member].slot_ref, each.session, each.layout, each.pending),
                True,
                0.0,
            )
            for member, each in self.processes.items()
        )
        ready = {member.device: member for member in self.processes}
        homes = self.cluster.homes
        plan = plan_generation(
            self.shape, Situation(generation, ready, answers, self.history, "node0:7", homes)
        )
        if isinstance(plan, NoPlan):
            return False
        self.history[generation] = plan
        for place, member in plan.placement:
            process = self.processes[member]
            if process.pending == plan.source_generation:
                process.layout = process.pending
            kept = plan.kept_from(place.replica)
            assert kept in (0, process.session.kept)
            process.session = process.session.drop(salvaged=kept > 0)
            process.pending = generation
            if adopt:
                process.layout, process.pending = generation, 0
        return True

    def check(self) -> None:
        """Every sample of the resumed step is behind one gradient, once."""
        batch: Counter[int] = Counter()
        for replica, share in self.plan.shares(STEP):
            kept = indices(share.kept)
            batch.update([*kept, *indices(share.fresh)])
            for _, member in self.places(replica):
                assert sorted(self.processes[member].gradient) == kept or not kept
        assert batch == Counter(range(self.shape.global_batch_size))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_sample_counts_once_whatever_fails(data: st.DataObject) -> None:
    replicas, stages = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 2))
    least = data.draw(st.integers(1, 2))
    shape = replace(
        job_shape(data.draw(st.integers(1, 3)), replicas, stages=stages),
        global_batch_size=replicas * least + data.draw(st.integers(0, 5)),
        least_share=least,
    )
    chain = Chain(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        whole = []
        for replica in replicas_of(chain.plan):
            # A layout that not all have switched to is computed with by nobody.
            if any(chain.processes[member].pending for _, member in chain.places(replica)):
                continue
            match data.draw(st.sampled_from(("idle", "whole", "whole", "mixed", "stuck"))):
                case "whole":
                    chain.compute(replica)
                    whole.append(replica)
                case "mixed":
                    chain.compute(replica, mixed=True)
                case "stuck":
                    chain.compute(replica, stuck=1)
        places = [place for place, _ in chain.plan.placement]
        lost = data.draw(st.sets(st.sampled_from(places), max_size=3))
        before = chain.plan
        if not chain.fail(lost, adopt=data.draw(st.booleans())):
            return
        chain.check()
        rows = chain.plan.rows()
        for replica in whole:
            if rows.get(replica) == before.rows()[replica]:
                empty = not (share := dict(before.shares(STEP))[replica]).kept and not share.fresh
                assert empty or chain.plan.kept_from(replica) == before.generation


def test_a_second_failure_loses_only_what_is_lost_with_it() -> None:
    chain = Chain(replace(job_shape(2, 3), global_batch_size=12))
    for replica in (1, 2):
        chain.compute(replica)
    chain.fail({Coordinate(0, 0, 0)})
    assert chain.plan.salvage is not None and chain.plan.salvage.kept_samples == 8
    for replica in (1, 2):
        chain.compute(replica)
    chain.fail({Coordinate(1, 0, 0)})
    chain.check()
    kept = chain.plan.salvage
    assert kept is not None and {each.replica: each.generation for each in kept.kept} == {2: 2}
    assert kept.kept_samples == 4 + chain.history[2].salvage.shares[2]  # type: ignore[union-attr]


def test_gradients_that_a_plan_did_not_keep_are_not_believed_later() -> None:
    chain = Chain(job_shape(2, 2))
    chain.compute(1, stuck=1)
    chain.fail({Coordinate(0, 0, 0)})
    assert chain.plan.salvage is None
    chain.fail({Coordinate(0, 0, 1)})
    assert chain.plan.salvage is None
