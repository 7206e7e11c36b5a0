"""Plans as changes to the ones before them: whatever happened, the readers get the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from clusters import Cluster, devices_on, start
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import job_shape

from elastic.answers import Answers
from elastic.keys import COMPRESS_BYTES, decode, encode, key_of
from elastic.messages import Adopt, Quiesced, StoreMessage, WholePlan
from elastic.plan import Plan
from elastic.plan_chain import PlanChain, chain_of, generation_of, publication, rebuilt
from elastic.plan_change import PlanChange, changed, difference
from elastic.planner import plan_generation
from elastic.session import Session, standing
from elastic.topology import Member
from elastic.workload import SplitBatchBy

GRIDS = ((2, 1, 2), (3, 1, 3), (4, 1, 2), (2, 2, 3), (1, 2, 3))
"""Tensor-parallel degree, pipeline stages and replicas."""


def interrupted(cluster: Cluster) -> Plan | None:
    """The next plan where the newest was never adopted, so that its source's layout is used."""
    situation, source = cluster.situation(), cluster.history[cluster.plan.source_generation]
    answers = Answers(
        Quiesced(
            situation.generation,
            member,
            standing(place.slot_ref, Session(5), source.generation, 0),
            True,
            0.0,
        )
        for place, member in source.placement
        if cluster.workers.get(member.device) == member
    )
    plan = plan_generation(cluster.shape, replace(situation, answers=answers))
    return plan if isinstance(plan, Plan) else None


@st.composite
def chains(draw: st.DrawFn) -> Sequence[Plan]:
    """The plans of a run with losses and returns, some of them interrupted."""
    tensor, stages, replicas = draw(st.sampled_from(GRIDS))
    shape = replace(
        job_shape(tensor=tensor, stages=stages, replicas=replicas),
        global_batch_size=draw(st.integers(replicas, 20)),
        split_batch_by=draw(st.sampled_from((SplitBatchBy.EQUAL, SplitBatchBy.DEGREE))),
    )
    cluster = start(shape, draw(st.sampled_from((1, 2, 4))), draw(st.integers(0, 2)))
    for _ in range(draw(st.integers(1, 6))):
        some = st.sets(st.sampled_from(cluster.devices), max_size=3)
        lost = draw(some)
        returned = draw(some) - cluster.workers.keys()
        after = cluster.without(lost).back(*sorted(returned - lost))
        if draw(st.booleans()) and after.plan.source_generation:
            plan = interrupted(after)
        else:
            found = after.next_plan()
            plan = found if isinstance(found, Plan) else None
        if plan is None:
            continue
        cluster = replace(after, history={**after.history, plan.generation: plan})
    return list(cluster.history.values())


def told(plans: Sequence[Plan]) -> list[Adopt | PlanChange]:
    """What is published of them, as it comes out of the store."""
    known: dict[int, Plan] = {}
    published = []
    for plan in plans:
        message = publication(known, plan)
        known[plan.generation] = plan
        found = decode("job", key_of("job", message), encode(message))
        assert isinstance(found, Adopt | PlanChange)
        published.append(found)
    return published


def two_plans() -> tuple[Plan, Plan]:
    before = start(job_shape(tensor=4))
    return before.plan, before.without([before.devices[1]]).advance().plan


@settings(max_examples=150, deadline=None)
@given(chains())
def test_a_base_and_its_change_make_the_plan(plans: Sequence[Plan]) -> None:
    chain = PlanChain()
    for plan, message in zip(plans, told(plans), strict=True):
        assert isinstance(message, Adopt) == (plan is plans[0])
        assert chain.take(message)
        assert not chain.take(message)
        assert chain.newest() == plan


@settings(max_examples=100, deadline=None)
@given(chains(), st.data())
def test_whoever_comes_late_gets_the_same_plans(plans: Sequence[Plan], data: st.DataObject) -> None:
    """From the whole plan on, whichever of the plans before it are deleted already."""
    oldest = data.draw(st.sampled_from(plans))
    messages = told(plans)
    left = [
        m for m in messages if generation_of(m) >= oldest.generation or data.draw(st.booleans())
    ]
    shuffled: list[StoreMessage] = data.draw(st.permutations([*left, WholePlan(oldest)]))
    assert chain_of(shuffled).newest() == plans[-1]
    found = rebuilt(WholePlan(oldest), left)
    kept = [plan for plan in plans if plan.generation >= oldest.generation]
    assert [found[plan.generation] for plan in kept] == kept
    assert all(found[plan.generation] == plan for plan in plans if plan.generation in found)
    assert list(found) == sorted(found)


def test_a_change_is_only_as_long_as_what_changes() -> None:
    sizes = []
    for replicas in (4, 64):
        shape = replace(job_shape(tensor=4, replicas=replicas), global_batch_size=8 * replicas)
        before = start(shape)
        after = before.without([before.devices[1]]).advance()
        change = publication(before.history, after.plan)
        sizes.append((len(encode(change)), len(msgspec.msgpack.encode(Adopt(after.plan)))))
    (few, whole_of_few), (many, whole_of_many) = sizes
    assert whole_of_many > 10 * whole_of_few
    # A reduced replica does less, and all others share that.
    assert many < few + 64 * 4


def test_a_change_without_its_base_is_refused() -> None:
    first, second = two_plans()
    change = difference(first, second)
    assert change is not None
    with pytest.raises(ValueError, match="plan 2 changes plan 1, not plan 2"):
        changed(second, change)
    chain = PlanChain()
    chain.take(change)
    with pytest.raises(ValueError, match="plan 2 changes plan 1: unknown"):
        chain.newest()
    with pytest.raises(ValueError, match="plan 2 changes plan 1, which nobody wrote"):
        rebuilt(None, [change])
    late = msgspec.structs.replace(change, generation=4, base=3)
    with pytest.raises(ValueError, match="plan 4 changes plan 3, which nobody wrote"):
        rebuilt(WholePlan(first), [change, late])


def test_another_base_of_the_same_generation_is_refused() -> None:
    first, second = two_plans()
    change = difference(first, second)
    assert change is not None
    member = first.placement[-1].member
    another = first.placement[-1]._replace(member=Member(member.device, 7))
    other = replace(first, placement=(*first.placement[:-1], another))
    with pytest.raises(ValueError, match="the bases differ"):
        changed(other, change)
    with pytest.raises(ValueError, match="the bases differ"):
        changed(first, msgspec.structs.replace(change, digest="0" * 64))


@pytest.mark.parametrize("field", ["rows", "layouts", "shares", "rebuilt"])
def test_a_change_that_lacks_a_part_is_refused(field: str) -> None:
    first, second = two_plans()
    change = difference(first, second)
    assert change is not None and getattr(change, field)
    with pytest.raises(ValueError):
        changed(first, msgspec.structs.replace(change, **{field: ()}))


def test_a_plan_whose_source_the_base_does_not_know_is_published_whole() -> None:
    shape = job_shape(tensor=4, replicas=3)
    plans = [start(shape)]
    for device in devices_on(shape, 8)[:3]:
        plans.append(plans[-1].without([device]).advance())
    first, *_, third, fourth = (cluster.plan for cluster in plans)
    odd = replace(fourth, source_generation=1, source_layout=first.layout)
    assert third.source_generation == 2 and difference(third, odd) is None
    assert publication({3: third}, odd) == Adopt(odd)


def test_long_values_are_compressed() -> None:
    shape = replace(job_shape(tensor=4, replicas=100), global_batch_size=400)
    plan = start(shape).plan
    value = encode(Adopt(plan))
    assert len(value) < COMPRESS_BYTES < len(msgspec.msgpack.encode(Adopt(plan)))
    assert decode("job", key_of("job", Adopt(plan)), value) == Adopt(plan)
