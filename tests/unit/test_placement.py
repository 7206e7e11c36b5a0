"""Who sits where: spares, trades between wounded replicas, memory, quarantine, restoring."""

from __future__ import annotations

from dataclasses import replace

import pytest
from clusters import Cluster, start
from scenes import job_shape

from elastic.job_shape import JobShape, PlacementRules
from elastic.plan import Action, NoPlan, Plan, StateSource
from elastic.planner import newcomers
from elastic.topology import Coordinate, DeviceId
from elastic.workload import SplitBatchBy
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import SlotRef

AT_HOME = PlacementRules(tensor_across_nodes=False)


def eight_groups(tensor: int = 4, replicas: int = 2, stages: int = 1) -> JobShape:
    """KV groups weigh nearly everything: a sample takes ceil(8 / degree)."""
    return replace(
        job_shape(tensor=tensor, replicas=replicas, stages=stages),
        counts=AtomCounts(8, 8, 8),
        sizes=(AtomSizes(1000, 1, 1, 5),) * stages,
        global_batch_size=48,
    )


def plan_of(cluster: Cluster) -> Plan:
    plan = cluster.next_plan()
    assert isinstance(plan, Plan), plan
    return plan


def device_at(plan: Plan, *place: int) -> DeviceId:
    return dict(plan.placement)[Coordinate(*place)].device


# Spares.


def test_a_spare_takes_the_place_and_nothing_else_changes() -> None:
    before = start(job_shape(), per_node=2, spares=1)
    plan = plan_of(before.without_places((0, 0, 1)))
    assert plan.action is Action.SWAP_SPARE and plan.degrees() == ((2,), (2,))
    assert device_at(plan, 0, 0, 1) == DeviceId(2, 0)
    assert plan.layout == before.plan.layout and plan.throughput == 1.0
    assert {move.target.slot for move in plan.reshard[0].moves} == {1}
    assert [str(member) for member in plan.newcomers] == ["node2/0#1"]
    assert plan.kept_replicas == (1,)
    assert plan.reason.startswith("node2/0 takes replica 0 slot 1; step 6 follows")


def test_a_spare_on_the_node_of_the_group_comes_first() -> None:
    # Three devices a node: replica 1 begins on node0, and the spares are node1/1 and node1/2.
    cluster = start(replace(job_shape(), rules=AT_HOME), per_node=3, spares=2)
    assert device_at(plan_of(cluster.without_places((1, 0, 0))), 1, 0, 0).node == 1
    # For replica 0 they are elsewhere.
    reduced = plan_of(cluster.without_places((0, 0, 1)))
    assert reduced.action is Action.REDUCE_TP
    (why,) = [a.why_not for a in reduced.alternatives if a.action is Action.SWAP_SPARE]
    assert why == "2 idle workers are on other nodes, and cluster.tensor_across_nodes is off"


def test_a_node_of_spares_takes_the_place_of_a_whole_group() -> None:
    cluster = start(replace(job_shape(), rules=AT_HOME), per_node=2, spares=2)
    plan = plan_of(cluster.without_places((1, 0, 0), (1, 0, 1)))
    assert plan.action is Action.SWAP_SPARE
    assert [device_at(plan, 1, 0, slot).node for slot in (0, 1)] == [2, 2]


def test_who_holds_a_place_keeps_it_when_its_home_is_back() -> None:
    cluster = start(job_shape(), per_node=2, spares=1)
    swapped = cluster.without_places((0, 0, 1)).advance()
    back = swapped.back(DeviceId(0, 1))
    assert newcomers(back.shape, back.situation(), back.plan) == ()
    again = plan_of(back)
    assert again.action is Action.CONTINUE and again.placement == swapped.plan.placement
    # It is a spare now, also for another replica.
    assert device_at(plan_of(back.without_places((1, 0, 0))), 1, 0, 0) == DeviceId(0, 1)


def test_a_home_is_preferred_to_a_spare() -> None:
    cluster = start(job_shape(), per_node=3, spares=2)
    reduced = cluster.without([DeviceId(0, 1), DeviceId(1, 1), DeviceId(1, 2)]).advance()
    assert reduced.plan.action is Action.REDUCE_TP
    both = reduced.back(DeviceId(1, 1), DeviceId(0, 1))
    assert [str(m) for m in newcomers(both.shape, both.situation(), both.plan)] == ["node0/1#2"]
    plan = plan_of(both)
    assert plan.action is Action.GROW_TP and "replica 0 slot 1 returned" in plan.reason


def test_a_replica_that_was_dropped_comes_back_with_as_many_devices_as_there_are() -> None:
    cluster = start(eight_groups(), per_node=4)
    alone = cluster.without([DeviceId(1, index) for index in range(4)]).advance()
    assert alone.plan.action is Action.DROP_REPLICA and alone.plan.batch_split == (48,)
    back = alone.back(DeviceId(1, 1), DeviceId(1, 3))
    grown = plan_of(back)
    assert grown.action is Action.GROW_TP and grown.degrees() == ((4,), (2,))
    assert grown.layout.replica(1).active == (1, 3)
    assert newcomers(back.shape, back.situation(), back.plan) == grown.newcomers


# Trades.


def test_wounded_replicas_trade_a_slot_where_that_is_faster() -> None:
    before = start(eight_groups(), per_node=4)
    plan = plan_of(before.without_places((0, 0, 3), (1, 0, 2)))
    # 3 + 3 slots take 3 groups each, that is two thirds of full speed; 4 + 2 make three quarters.
    assert plan.degrees() == ((4,), (2,)) and plan.throughput == pytest.approx(0.75, abs=0.01)
    ((old, member),) = plan.movers
    assert old == Coordinate(1, 0, 3) and device_at(plan, 0, 0, 3) == member.device
    assert plan.survives(member) and plan.donors == ()
    assert "node1/3 moves from replica 1 slot 3 to replica 0 slot 3" in plan.reason
    steady = plan.alternatives[0]
    assert (steady.action, steady.throughput) == (Action.REDUCE_TP, pytest.approx(0.667, abs=0.01))


def test_a_trade_that_gains_too_little_is_only_mentioned() -> None:
    shape = replace(eight_groups(), rules=PlacementRules(least_gain=0.5))
    plan = plan_of(start(shape, per_node=4).without_places((0, 0, 3), (1, 0, 2)))
    assert plan.degrees() == ((3,), (3,)) and plan.movers == ()
    assert plan.alternatives[0].throughput > plan.throughput
    assert "for less than 50% of what a replica does" in plan.alternatives[0].why_not


def test_nobody_trades_across_nodes_where_that_is_forbidden() -> None:
    shape = replace(eight_groups(), rules=AT_HOME)
    plan = plan_of(start(shape, per_node=4).without_places((0, 0, 3), (1, 0, 2)))
    assert plan.degrees() == ((3,), (3,)) and plan.movers == ()
    # On one node they may.
    assert plan_of(start(shape, per_node=8).without_places((0, 0, 3), (1, 0, 2))).movers


def test_the_idle_stages_of_a_slot_heal_another_replica() -> None:
    before = start(eight_groups(tensor=2, stages=2), per_node=4)
    plan = plan_of(before.without_places((0, 0, 1), (1, 1, 1)))
    assert plan.degrees() == ((2, 2), (1, 1))
    ((old, member),) = plan.movers
    assert old == Coordinate(1, 0, 1) and device_at(plan, 0, 0, 1) == member.device
    # It has held this slot and stage, so it needs no shards from others.
    ranks = plan.meeting_ranks(0)
    healed = SlotRef(0, 1)
    moves = [m for m in plan.reshard[0].moves if m.target == healed and m.axis is not None]
    assert moves and all(ranks[move.source] == ranks[healed] for move in moves)


def test_a_worker_can_move_to_another_stage() -> None:
    before = start(eight_groups(tensor=2, stages=2), per_node=4)
    plan = plan_of(before.without_places((0, 0, 1), (1, 0, 0)))
    ((old, member),) = plan.movers
    assert plan.degrees() == ((2, 2), (1, 1)) and old == Coordinate(1, 1, 0)
    assert device_at(plan, 0, 0, 1) == member.device
    ranks = plan.meeting_ranks(0), plan.meeting_ranks(1)
    assert ranks[1][old.slot_ref] == ranks[0][Coordinate(0, 0, 1).slot_ref]


def test_a_replica_that_slows_down_all_others_is_given_up() -> None:
    shape = replace(eight_groups(), split_batch_by=SplitBatchBy.EQUAL, replicas=3)
    plan = plan_of(start(shape, per_node=4).without_places((2, 0, 1), (2, 0, 2), (2, 0, 3)))
    # One slot takes 8 groups, and the other replicas would wait: 1/4 instead of 2/3.
    assert plan.action is Action.DROP_REPLICA and plan.throughput == pytest.approx(2 / 3)
    (donor,) = plan.donors
    assert donor.coordinate == Coordinate(2, 0, 0)


def test_the_second_last_replica_is_kept_however_slow_it_is() -> None:
    shape = replace(eight_groups(), split_batch_by=SplitBatchBy.EQUAL)
    plan = plan_of(start(shape, per_node=4).without_places((1, 0, 1), (1, 0, 2), (1, 0, 3)))
    assert plan.action is Action.REDUCE_TP and plan.throughput == 0.25
    dropped = next(each for each in plan.alternatives if each.action is Action.DROP_REPLICA)
    assert dropped.throughput == 0.5
    assert dropped.why_not == "leaves out replica 1, a copy of the state"


# Memory.


def test_a_replica_that_would_not_fit_reduced_is_left_out() -> None:
    shape = eight_groups()
    held = 2 * 1000 + 2 + 2 + 5
    roomy = PlacementRules(device_memory_bytes=2 * held + 1100, element_bytes=1)
    lost = (1, 0, 3)
    assert plan_of(start(replace(shape, rules=roomy)).without_places(lost)).degrees()[1] == (3,)
    tight = PlacementRules(device_memory_bytes=2 * held + 900, element_bytes=1)
    plan = plan_of(start(replace(shape, rules=tight)).without_places(lost))
    assert plan.action is Action.DROP_REPLICA and plan.degrees() == ((4,),)
    assert plan.alternatives[0].throughput > plan.throughput
    assert plan.alternatives[0].why_not == (
        "replica 1: the change from TP4 to TP3 needs 5020 bytes a device, above "
        "cluster.device_memory_bytes (4918)"
    )


def test_a_job_that_does_not_fit_says_what_it_needs() -> None:
    rules = PlacementRules(device_memory_bytes=2000, element_bytes=1)
    with pytest.raises(AssertionError, match=r"no replica fits: TP4 needs 2009 bytes a device"):
        start(replace(eight_groups(), rules=rules))


# Quarantine, checkpoints, and what is missing.


def test_a_quarantined_device_takes_no_part() -> None:
    cluster = start(job_shape(), per_node=2, spares=2)
    lost = cluster.without_places((0, 0, 1))
    plan = plan_of(lost.with_settings(quarantined=frozenset({DeviceId(2, 0)})))
    assert device_at(plan, 0, 0, 1) == DeviceId(2, 1)
    holder = plan_of(cluster.with_settings(quarantined=frozenset({DeviceId(1, 0)})))
    assert DeviceId(1, 0) not in {member.device for _, member in holder.participants}
    assert holder.action is Action.SWAP_SPARE


def test_what_nobody_holds_is_restored_from_a_checkpoint() -> None:
    lost = start(job_shape(), per_node=2, spares=1).without_places((0, 0, 1), (1, 0, 1))
    plan = plan_of(lost.with_settings(checkpoint=3))
    assert plan.action is Action.RESTORE and plan.state_source is StateSource.CHECKPOINT
    assert (plan.resume_step, plan.apply_vote, plan.source_layout) == (4, None, None)
    assert len(plan.placement) == 3 and not plan.survives(plan.placement[0].member)
    assert "step 3 is restored from its checkpoint" in plan.reason
    halt = lost.next_plan()
    assert isinstance(halt, NoPlan) and "KV groups 2-3, MLP columns 3-5" in halt.reason


def test_every_missing_part_is_named_with_its_stage() -> None:
    cluster = start(job_shape(stages=2), per_node=4)
    halt = cluster.without_places((0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)).next_plan()
    assert isinstance(halt, NoPlan) and halt.reason == (
        "nobody alive holds KV groups 0-1, MLP columns 0-2 and vocabulary rows 0-2 of stage 0; "
        "KV groups 2-3, MLP columns 3-5 and vocabulary rows 3-4 of stage 1, and there are no "
        "checkpoints"
    )


def test_too_few_workers_for_a_slot_in_every_stage_end_the_job() -> None:
    cluster = start(job_shape(stages=2, tensor=1, replicas=1), per_node=2)
    halt = cluster.without_places((0, 1, 0)).next_plan()
    assert isinstance(halt, NoPlan)
    assert halt.reason == "no slot has a worker in each of the 2 pipeline stages"
